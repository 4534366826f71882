// AArch64 NEON with dot products, and with products of unsigned and signed bytes (i8mm) where the unit's options allow
// them: a vector is four registers of 4 rows each.
#include <arm_neon.h>

#include "digits.hpp"
#include "kernels.hpp"
#include "quantize.hpp"

namespace {

constexpr int kTileBlocks = 1, kTileTokens = 6, kChains = 2;

struct Bytes { uint8x16_t part[4]; };
struct Sums { int32x4_t part[4]; };
struct Floats { float32x4_t part[4]; };
using Quad = int8x16_t;

EDGERAZOR_INLINE Bytes load(const uint8_t* p) {
    return {{vld1q_u8(p), vld1q_u8(p + 16), vld1q_u8(p + 32), vld1q_u8(p + 48)}};
}

EDGERAZOR_INLINE Bytes load_once(const uint8_t* p) { return load(p); }

EDGERAZOR_INLINE void store(uint8_t* p, Bytes bytes) {
    vst1q_u8(p, bytes.part[0]);
    vst1q_u8(p + 16, bytes.part[1]);
    vst1q_u8(p + 32, bytes.part[2]);
    vst1q_u8(p + 48, bytes.part[3]);
}

template <int shift, int width>
EDGERAZOR_INLINE uint8x16_t part_field(uint8x16_t bytes) {
    if constexpr (shift > 0) bytes = vshrq_n_u8(bytes, shift);
    return shift + width < 8 ? vandq_u8(bytes, vdupq_n_u8((1 << width) - 1)) : bytes;
}

template <int shift, int width>
EDGERAZOR_INLINE Bytes field(Bytes bytes) {
    return {{part_field<shift, width>(bytes.part[0]), part_field<shift, width>(bytes.part[1]),
             part_field<shift, width>(bytes.part[2]), part_field<shift, width>(bytes.part[3])}};
}

template <int shift>
EDGERAZOR_INLINE uint8x16_t part_join(uint8x16_t low, uint8x16_t high) {
    return vorrq_u8(low, vshlq_n_u8(high, shift));
}

template <int shift>
EDGERAZOR_INLINE Bytes join(Bytes low, Bytes high) {
    return {{part_join<shift>(low.part[0], high.part[0]), part_join<shift>(low.part[1], high.part[1]),
             part_join<shift>(low.part[2], high.part[2]), part_join<shift>(low.part[3], high.part[3])}};
}

EDGERAZOR_INLINE Quad broadcast(const int8_t* x) {
    int32_t quad;
    __builtin_memcpy(&quad, x, 4);
    return vreinterpretq_s8_s32(vdupq_n_s32(quad));
}

EDGERAZOR_INLINE Sums all(int number) {
    const int32x4_t part = vdupq_n_s32(number);
    return {{part, part, part, part}};
}

EDGERAZOR_INLINE Sums no_sums() { return all(0); }

EDGERAZOR_INLINE Sums load_sums(const int32_t* p) {
    return {{vld1q_s32(p), vld1q_s32(p + 4), vld1q_s32(p + 8), vld1q_s32(p + 12)}};
}

EDGERAZOR_INLINE void store_sums(int32_t* p, Sums sums) {
    vst1q_s32(p, sums.part[0]);
    vst1q_s32(p + 4, sums.part[1]);
    vst1q_s32(p + 8, sums.part[2]);
    vst1q_s32(p + 12, sums.part[3]);
}

EDGERAZOR_INLINE Sums add_sums(Sums a, Sums b) {
    return {{vaddq_s32(a.part[0], b.part[0]), vaddq_s32(a.part[1], b.part[1]), vaddq_s32(a.part[2], b.part[2]),
             vaddq_s32(a.part[3], b.part[3])}};
}

#ifdef __ARM_FEATURE_MATMUL_INT8

constexpr int bound(int) { return 255; }

template <int largest>
EDGERAZOR_INLINE int32x4_t multiply_add(int32x4_t sums, uint8x16_t u, Quad x) {
    return vusdotq_s32(sums, u, x);
}

#else

constexpr int bound(int largest) { return largest <= 127 ? 127 : 255; }

// Both operands of `sdot` are signed, so a u above 127 goes as twice its half and its lowest bit.
template <int largest>
EDGERAZOR_INLINE int32x4_t multiply_add(int32x4_t sums, uint8x16_t u, Quad x) {
    if constexpr (largest <= 127) return vdotq_s32(sums, vreinterpretq_s8_u8(u), x);
    const int8x16_t half = vreinterpretq_s8_u8(part_field<1, 7>(u)), rest = vreinterpretq_s8_u8(part_field<0, 1>(u));
    return vdotq_s32(vdotq_s32(vdotq_s32(sums, half, x), half, x), rest, x);
}

#endif

template <int largest>
struct Accumulator {
    static constexpr int capacity = kLongest;
    Sums sums;
    EDGERAZOR_INLINE void reset() { sums = no_sums(); }
    EDGERAZOR_INLINE void add(Bytes u, Quad x) {
        sums.part[0] = multiply_add<largest>(sums.part[0], u.part[0], x);
        sums.part[1] = multiply_add<largest>(sums.part[1], u.part[1], x);
        sums.part[2] = multiply_add<largest>(sums.part[2], u.part[2], x);
        sums.part[3] = multiply_add<largest>(sums.part[3], u.part[3], x);
    }
    EDGERAZOR_INLINE void widen() {}
    EDGERAZOR_INLINE Sums total() const { return sums; }
};

struct Trits {
    Bytes fields; // four 2-bit fields
    Bytes last;   // the fifth digit
};

EDGERAZOR_INLINE uint8x16x4_t table(const uint8_t* bytes) {
    return {{vld1q_u8(bytes), vld1q_u8(bytes + 16), vld1q_u8(bytes + 32), vld1q_u8(bytes + 48)}};
}

// A look-up beyond the 64 bytes of a table gives 0.
EDGERAZOR_INLINE void part_trits(uint8x16_t bytes, uint8x16_t& fields, uint8x16_t& last) {
    const uint8x16_t is_long = vcgeq_u8(bytes, vdupq_n_u8(kLongDigits));
    const uint8x16_t rest = vsubq_u8(bytes, vdupq_n_u8(kLongDigits));
    const uint8x16_t short_fields = vqtbl4q_u8(table(kDigits.short_fields), part_field<0, 6>(bytes));
    fields = vbslq_u8(is_long, vqtbl4q_u8(table(kDigits.long_fields), rest), short_fields);
    const uint8x16_t ones = vcgeq_u8(rest, vdupq_n_u8(kLongCount)), twos = vcgeq_u8(rest, vdupq_n_u8(2 * kLongCount));
    const uint8x16_t long_last = vsubq_u8(vsubq_u8(vdupq_n_u8(0), ones), twos); // a mask is -1
    last = vbslq_u8(is_long, long_last, vshrq_n_u8(bytes, 6));
}

EDGERAZOR_INLINE Trits trits(Bytes bytes) {
    Trits five;
    part_trits(bytes.part[0], five.fields.part[0], five.last.part[0]);
    part_trits(bytes.part[1], five.fields.part[1], five.last.part[1]);
    part_trits(bytes.part[2], five.fields.part[2], five.last.part[2]);
    part_trits(bytes.part[3], five.fields.part[3], five.last.part[3]);
    return five;
}

template <int f>
EDGERAZOR_INLINE Bytes digit(const Trits& five) {
    if constexpr (f == 4) return five.last;
    else return field<2 * f, 2>(five.fields);
}

template <int f>
EDGERAZOR_INLINE void store_trit(const Trits& five, uint8_t* to) { store(to, digit<f>(five)); }

struct TernarySums {
    Accumulator<bound(2)> sums;
    EDGERAZOR_INLINE TernarySums() { sums.reset(); }

    template <int f>
    EDGERAZOR_INLINE void add(const Trits& five, const int8_t* x) { sums.add(digit<f>(five), broadcast(x)); }

    template <int f>
    EDGERAZOR_INLINE void add_pair(Bytes pairs, const int8_t* x) { sums.add(field<2 * f, 2>(pairs), broadcast(x)); }

    EDGERAZOR_INLINE Sums take() {
        const Sums total = sums.total();
        sums.reset();
        return total;
    }
};

EDGERAZOR_INLINE Floats no_floats() { return {{vdupq_n_f32(0), vdupq_n_f32(0), vdupq_n_f32(0), vdupq_n_f32(0)}}; }

EDGERAZOR_INLINE Floats load_floats(const float* p) {
    return {{vld1q_f32(p), vld1q_f32(p + 4), vld1q_f32(p + 8), vld1q_f32(p + 12)}};
}

EDGERAZOR_INLINE void store_floats(float* p, Floats floats) {
    vst1q_f32(p, floats.part[0]);
    vst1q_f32(p + 4, floats.part[1]);
    vst1q_f32(p + 8, floats.part[2]);
    vst1q_f32(p + 12, floats.part[3]);
}

EDGERAZOR_INLINE float32x4_t part_halves(const uint16_t* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }

EDGERAZOR_INLINE Floats load_halves(const uint16_t* p) {
    return {{part_halves(p), part_halves(p + 4), part_halves(p + 8), part_halves(p + 12)}};
}

EDGERAZOR_INLINE float32x4_t part_fold(float32x4_t y, int32x4_t total, float32x4_t w_scales, float x_scale) {
    return vaddq_f32(y, vmulq_f32(vcvtq_f32_s32(total), vmulq_f32(vdupq_n_f32(x_scale), w_scales)));
}

EDGERAZOR_INLINE void fold(Floats& y, Sums total, Floats w_scales, float x_scale) {
    y.part[0] = part_fold(y.part[0], total.part[0], w_scales.part[0], x_scale);
    y.part[1] = part_fold(y.part[1], total.part[1], w_scales.part[1], x_scale);
    y.part[2] = part_fold(y.part[2], total.part[2], w_scales.part[2], x_scale);
    y.part[3] = part_fold(y.part[3], total.part[3], w_scales.part[3], x_scale);
}

} // namespace

#include "products.hpp"
