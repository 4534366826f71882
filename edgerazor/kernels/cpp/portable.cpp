// Plain C++ for any machine. It also defines what the vectors of the other instruction sets mean.
#include <string.h>

#include "base3_tables.hpp"
#include "compiler.hpp"
#include "matmul_kernels.hpp"
#include "quantize_activations.hpp"
#include "rotate.hpp"

namespace {

using namespace edgerazor;

constexpr int kTileBlocks = 1, kTileTokens = 4, kGemvTokens = 4, kDotTokens = 0, kFewTokens = 4 * kGemvTokens, kChains = 1;
constexpr bool kUnpackAhead = false;

struct u8x64 { uint8_t at[64]; };
struct i8x4 { int8_t at[4]; };
struct RowSums { int32_t at[16]; };
struct RowFloats { float at[16]; };

inline u8x64 load(const uint8_t* p) {
    u8x64 bytes;
    memcpy(bytes.at, p, 64);
    return bytes;
}

inline u8x64 load_to_register(const uint8_t* p) { return load(p); }
inline void store(uint8_t* p, const u8x64& bytes) { memcpy(p, bytes.at, 64); }

template <int shift, int width>
inline u8x64 extract_bits(u8x64 bytes) {
    for (uint8_t& byte : bytes.at) byte = byte >> shift & ((1 << width) - 1);
    return bytes;
}

template <int shift>
inline u8x64 combine_bits(u8x64 low, const u8x64& high) {
    for (int i = 0; i < 64; i++) low.at[i] |= (uint8_t)(high.at[i] << shift);
    return low;
}

inline i8x4 broadcast(const int8_t* x) {
    i8x4 quad;
    memcpy(quad.at, x, 4);
    return quad;
}

inline RowSums zero_sums() { return RowSums{}; }
inline RowFloats zero_floats() { return RowFloats{}; }

inline RowSums splat_sums(int number) {
    RowSums sums;
    for (int32_t& sum : sums.at) sum = number;
    return sums;
}

inline RowSums load_sums(const int32_t* p) {
    RowSums sums;
    memcpy(sums.at, p, 64);
    return sums;
}

inline void store_sums(int32_t* p, const RowSums& sums) { memcpy(p, sums.at, 64); }

inline RowSums add_sums(RowSums a, const RowSums& b) {
    for (int i = 0; i < 16; i++) a.at[i] += b.at[i];
    return a;
}

inline RowFloats load_floats(const float* p) {
    RowFloats floats;
    memcpy(floats.at, p, 64);
    return floats;
}

inline void store_floats(float* p, const RowFloats& floats) { memcpy(p, floats.at, 64); }

constexpr int accumulator_bound(int) { return 255; }

template <int max_code>
struct DotAccumulator {
    static constexpr int capacity = kMaxSegmentColumns;
    RowSums sums;
    inline void reset() { sums = zero_sums(); }
    inline void add(const u8x64& u, const i8x4& x) {
        for (int lane = 0; lane < 16; lane++)
            for (int j = 0; j < 4; j++) sums.at[lane] += u.at[4 * lane + j] * x.at[j];
    }
    inline void widen() {}
    inline RowSums total() const { return sums; }
};

struct Trits {
    u8x64 digits[5];
};

inline Trits unpack_trits(const u8x64& bytes) {
    Trits five;
    for (int i = 0; i < 64; i++) {
        const int byte = bytes.at[i], low = byte & 63;
        const int fields = byte < kLongBytes ? kBase3.short_fields[low] : kBase3.long_fields[low];
        for (int f = 0; f < 4; f++) five.digits[f].at[i] = fields >> 2 * f & 3;
        five.digits[4].at[i] = byte < kLongBytes ? byte >> 6 : kBase3.long_last[low] >> 6;
    }
    return five;
}

template <int f>
inline const u8x64& digit(const Trits& five) { return five.digits[f]; }

struct TernaryDot {
    DotAccumulator<accumulator_bound(2)> sums;
    TernaryDot() { sums.reset(); }

    template <int f>
    inline void add(const Trits& five, const int8_t* x) { sums.add(five.digits[f], broadcast(x)); }

    template <int f>
    inline void add_2bit(const u8x64& fields, const int8_t* x) {
        sums.add(extract_bits<2 * f, 2>(fields), broadcast(x));
    }

    inline RowSums take() {
        const RowSums total = sums.total();
        sums.reset();
        return total;
    }
};

inline float f16_to_f32(uint16_t half) {
    const uint32_t sign = (uint32_t)(half & 0x8000) << 16, magnitude = half & 0x7fff;
    if (magnitude < 0x0400) return (sign ? -1.0f : 1.0f) * (float)magnitude * 5.9604644775390625e-8f; // 2^-24
    return float_of(sign | ((magnitude << 13) + 0x38000000u));
}

inline RowFloats load_f16(const uint16_t* p) {
    RowFloats floats;
    for (int i = 0; i < 16; i++) floats.at[i] = f16_to_f32(p[i]);
    return floats;
}

inline void add_scaled(RowFloats& y, const RowSums& total, const RowFloats& w_scales, float x_scale) {
    for (int i = 0; i < 16; i++) y.at[i] += (float)total.at[i] * (x_scale * w_scales.at[i]);
}

} // namespace

#include "matmul.hpp"

const edgerazor::MatmulKernels edgerazor::portable_matmul = {
    "portable", quantize, rotate, rotate_back, linear, linear_float, expand_ternary, read,
};
