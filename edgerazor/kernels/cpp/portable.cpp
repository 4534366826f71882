// Plain C++ for any machine, which also says what the vectors of the other units mean.
#include <string.h>

#include "digits.hpp"
#include "kernels.hpp"
#include "quantize.hpp"

namespace {

constexpr int kTileBlocks = 1, kTileTokens = 4, kChains = 1;

struct Bytes { uint8_t at[64]; };
struct Quad { int8_t at[4]; };
struct Sums { int32_t at[16]; };
struct Floats { float at[16]; };

inline Bytes load(const uint8_t* p) {
    Bytes bytes;
    memcpy(bytes.at, p, 64);
    return bytes;
}

inline Bytes load_once(const uint8_t* p) { return load(p); }
inline void store(uint8_t* p, const Bytes& bytes) { memcpy(p, bytes.at, 64); }

template <int shift, int width>
inline Bytes field(Bytes bytes) {
    for (uint8_t& byte : bytes.at) byte = byte >> shift & ((1 << width) - 1);
    return bytes;
}

template <int shift>
inline Bytes join(Bytes low, const Bytes& high) {
    for (int i = 0; i < 64; i++) low.at[i] |= (uint8_t)(high.at[i] << shift);
    return low;
}

inline Quad broadcast(const int8_t* x) {
    Quad quad;
    memcpy(quad.at, x, 4);
    return quad;
}

inline Sums no_sums() { return Sums{}; }
inline Floats no_floats() { return Floats{}; }

inline Sums all(int number) {
    Sums sums;
    for (int32_t& each : sums.at) each = number;
    return sums;
}

inline Sums load_sums(const int32_t* p) {
    Sums sums;
    memcpy(sums.at, p, 64);
    return sums;
}

inline void store_sums(int32_t* p, const Sums& sums) { memcpy(p, sums.at, 64); }

inline Sums add_sums(Sums a, const Sums& b) {
    for (int i = 0; i < 16; i++) a.at[i] += b.at[i];
    return a;
}

inline Floats load_floats(const float* p) {
    Floats floats;
    memcpy(floats.at, p, 64);
    return floats;
}

inline void store_floats(float* p, const Floats& floats) { memcpy(p, floats.at, 64); }

constexpr int bound(int) { return 255; }

template <int largest>
struct Accumulator {
    static constexpr int capacity = kLongest;
    Sums sums;
    inline void reset() { sums = no_sums(); }
    inline void add(const Bytes& u, const Quad& x) {
        for (int lane = 0; lane < 16; lane++)
            for (int j = 0; j < 4; j++) sums.at[lane] += u.at[4 * lane + j] * x.at[j];
    }
    inline void widen() {}
    inline Sums total() const { return sums; }
};

struct Trits {
    Bytes digits[5];
};

inline Trits trits(const Bytes& bytes) {
    Trits five;
    for (int i = 0; i < 64; i++) {
        const int byte = bytes.at[i], low = byte & 63;
        const int fields = byte < kLongDigits ? kDigits.short_fields[low] : kDigits.long_fields[low];
        for (int f = 0; f < 4; f++) five.digits[f].at[i] = fields >> 2 * f & 3;
        five.digits[4].at[i] = byte < kLongDigits ? byte >> 6 : kDigits.long_last[low] >> 6;
    }
    return five;
}

template <int f>
inline void store_trit(const Trits& five, uint8_t* to) { store(to, five.digits[f]); }

struct TernarySums {
    Accumulator<bound(2)> sums;
    TernarySums() { sums.reset(); }

    template <int f>
    inline void add(const Trits& five, const int8_t* x) { sums.add(five.digits[f], broadcast(x)); }

    template <int f>
    inline void add_pair(const Bytes& pairs, const int8_t* x) { sums.add(field<2 * f, 2>(pairs), broadcast(x)); }

    inline Sums take() {
        const Sums total = sums.total();
        sums.reset();
        return total;
    }
};

inline float half_to_float(uint16_t half) {
    const uint32_t sign = (uint32_t)(half & 0x8000) << 16, magnitude = half & 0x7fff;
    if (magnitude < 0x0400) return (sign ? -1.0f : 1.0f) * (float)magnitude * 5.9604644775390625e-8f; // 2^-24
    return float_of(sign | ((magnitude << 13) + 0x38000000u));
}

inline Floats load_halves(const uint16_t* p) {
    Floats floats;
    for (int i = 0; i < 16; i++) floats.at[i] = half_to_float(p[i]);
    return floats;
}

inline void fold(Floats& y, const Sums& total, const Floats& w_scales, float x_scale) {
    for (int i = 0; i < 16; i++) y.at[i] += (float)total.at[i] * (x_scale * w_scales.at[i]);
}

} // namespace

#include "products.hpp"

const Kernels edgerazor::portable_kernels = {"portable", quantize, linear, linear_float, expand_ternary, read};
