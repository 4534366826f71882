// AArch64 NEON with dot products, and with those of unsigned and signed bytes (i8mm) where the options of the
// translation unit allow it. A vector is four registers of 4 rows each.
#include <arm_neon.h>

#include "base3_tables.hpp"
#include "compiler.hpp"
#include "matmul_kernels.hpp"
#include "quantize_activations.hpp"
#include "rotate.hpp"

namespace {

using namespace edgerazor;

constexpr int kTileBlocks = 1, kTileTokens = 6, kGemvTokens = 6, kDotTokens = 0, kFewTokens = 4 * kGemvTokens, kChains = 2;
constexpr bool kUnpackAhead = false;

struct u8x64 { uint8x16_t reg[4]; };
struct RowSums { int32x4_t reg[4]; };
struct RowFloats { float32x4_t reg[4]; };
using i8x4 = int8x16_t;

EDGERAZOR_INLINE u8x64 load(const uint8_t* p) {
    return {{vld1q_u8(p), vld1q_u8(p + 16), vld1q_u8(p + 32), vld1q_u8(p + 48)}};
}

EDGERAZOR_INLINE u8x64 load_to_register(const uint8_t* p) { return load(p); }

EDGERAZOR_INLINE void store(uint8_t* p, u8x64 bytes) {
    vst1q_u8(p, bytes.reg[0]);
    vst1q_u8(p + 16, bytes.reg[1]);
    vst1q_u8(p + 32, bytes.reg[2]);
    vst1q_u8(p + 48, bytes.reg[3]);
}

template <int shift, int width>
EDGERAZOR_INLINE uint8x16_t extract_bits_register(uint8x16_t bytes) {
    if constexpr (shift > 0) bytes = vshrq_n_u8(bytes, shift);
    return shift + width < 8 ? vandq_u8(bytes, vdupq_n_u8((1 << width) - 1)) : bytes;
}

template <int shift, int width>
EDGERAZOR_INLINE u8x64 extract_bits(u8x64 bytes) {
    return {{extract_bits_register<shift, width>(bytes.reg[0]), extract_bits_register<shift, width>(bytes.reg[1]),
             extract_bits_register<shift, width>(bytes.reg[2]), extract_bits_register<shift, width>(bytes.reg[3])}};
}

template <int shift>
EDGERAZOR_INLINE uint8x16_t combine_bits_register(uint8x16_t low, uint8x16_t high) {
    return vorrq_u8(low, vshlq_n_u8(high, shift));
}

template <int shift>
EDGERAZOR_INLINE u8x64 combine_bits(u8x64 low, u8x64 high) {
    return {{combine_bits_register<shift>(low.reg[0], high.reg[0]),
             combine_bits_register<shift>(low.reg[1], high.reg[1]),
             combine_bits_register<shift>(low.reg[2], high.reg[2]),
             combine_bits_register<shift>(low.reg[3], high.reg[3])}};
}

EDGERAZOR_INLINE i8x4 broadcast(const int8_t* x) {
    int32_t quad;
    __builtin_memcpy(&quad, x, 4);
    return vreinterpretq_s8_s32(vdupq_n_s32(quad));
}

EDGERAZOR_INLINE RowSums splat_sums(int number) {
    const int32x4_t part = vdupq_n_s32(number);
    return {{part, part, part, part}};
}

EDGERAZOR_INLINE RowSums zero_sums() { return splat_sums(0); }

EDGERAZOR_INLINE RowSums load_sums(const int32_t* p) {
    return {{vld1q_s32(p), vld1q_s32(p + 4), vld1q_s32(p + 8), vld1q_s32(p + 12)}};
}

EDGERAZOR_INLINE void store_sums(int32_t* p, RowSums sums) {
    vst1q_s32(p, sums.reg[0]);
    vst1q_s32(p + 4, sums.reg[1]);
    vst1q_s32(p + 8, sums.reg[2]);
    vst1q_s32(p + 12, sums.reg[3]);
}

EDGERAZOR_INLINE RowSums add_sums(RowSums a, RowSums b) {
    return {{vaddq_s32(a.reg[0], b.reg[0]), vaddq_s32(a.reg[1], b.reg[1]), vaddq_s32(a.reg[2], b.reg[2]),
             vaddq_s32(a.reg[3], b.reg[3])}};
}

#ifdef __ARM_FEATURE_MATMUL_INT8

constexpr int accumulator_bound(int) { return 255; }

template <int max_code>
EDGERAZOR_INLINE int32x4_t dot_add(int32x4_t sums, uint8x16_t u, i8x4 x) {
    return vusdotq_s32(sums, u, x);
}

#else

constexpr int accumulator_bound(int max_code) { return max_code <= 127 ? 127 : 255; }

// Both operands of `sdot` are signed, so a u above 127 is multiplied as its upper seven bits, twice, and its lowest
// bit.
template <int max_code>
EDGERAZOR_INLINE int32x4_t dot_add(int32x4_t sums, uint8x16_t u, i8x4 x) {
    if constexpr (max_code <= 127) return vdotq_s32(sums, vreinterpretq_s8_u8(u), x);
    const int8x16_t half = vreinterpretq_s8_u8(extract_bits_register<1, 7>(u));
    const int8x16_t rest = vreinterpretq_s8_u8(extract_bits_register<0, 1>(u));
    return vdotq_s32(vdotq_s32(vdotq_s32(sums, half, x), half, x), rest, x);
}

#endif

template <int max_code>
struct DotAccumulator {
    static constexpr int capacity = kMaxSegmentColumns;
    RowSums sums;
    EDGERAZOR_INLINE void reset() { sums = zero_sums(); }
    EDGERAZOR_INLINE void add(u8x64 u, i8x4 x) {
        sums.reg[0] = dot_add<max_code>(sums.reg[0], u.reg[0], x);
        sums.reg[1] = dot_add<max_code>(sums.reg[1], u.reg[1], x);
        sums.reg[2] = dot_add<max_code>(sums.reg[2], u.reg[2], x);
        sums.reg[3] = dot_add<max_code>(sums.reg[3], u.reg[3], x);
    }
    EDGERAZOR_INLINE void widen() {}
    EDGERAZOR_INLINE RowSums total() const { return sums; }
};

struct Trits {
    u8x64 fields; // four 2-bit fields
    u8x64 last;   // the fifth digit
};

EDGERAZOR_INLINE uint8x16x4_t table(const uint8_t* bytes) {
    return {{vld1q_u8(bytes), vld1q_u8(bytes + 16), vld1q_u8(bytes + 32), vld1q_u8(bytes + 48)}};
}

// A look-up after the 64 bytes of a table gives 0.
EDGERAZOR_INLINE void unpack_trits_register(uint8x16_t bytes, uint8x16_t& fields, uint8x16_t& last) {
    const uint8x16_t is_long = vcgeq_u8(bytes, vdupq_n_u8(kLongBytes));
    const uint8x16_t rest = vsubq_u8(bytes, vdupq_n_u8(kLongBytes));
    const uint8x16_t short_fields = vqtbl4q_u8(table(kBase3.short_fields), extract_bits_register<0, 6>(bytes));
    fields = vbslq_u8(is_long, vqtbl4q_u8(table(kBase3.long_fields), rest), short_fields);
    const uint8x16_t ones = vcgeq_u8(rest, vdupq_n_u8(kLongPerDigit));
    const uint8x16_t twos = vcgeq_u8(rest, vdupq_n_u8(2 * kLongPerDigit));
    const uint8x16_t long_last = vsubq_u8(vsubq_u8(vdupq_n_u8(0), ones), twos); // true is -1
    last = vbslq_u8(is_long, long_last, vshrq_n_u8(bytes, 6));
}

EDGERAZOR_INLINE Trits unpack_trits(u8x64 bytes) {
    Trits five;
    unpack_trits_register(bytes.reg[0], five.fields.reg[0], five.last.reg[0]);
    unpack_trits_register(bytes.reg[1], five.fields.reg[1], five.last.reg[1]);
    unpack_trits_register(bytes.reg[2], five.fields.reg[2], five.last.reg[2]);
    unpack_trits_register(bytes.reg[3], five.fields.reg[3], five.last.reg[3]);
    return five;
}

template <int f>
EDGERAZOR_INLINE u8x64 digit(const Trits& five) {
    if constexpr (f == 4) return five.last;
    else return extract_bits<2 * f, 2>(five.fields);
}

struct TernaryDot {
    DotAccumulator<accumulator_bound(2)> sums;
    EDGERAZOR_INLINE TernaryDot() { sums.reset(); }

    template <int f>
    EDGERAZOR_INLINE void add(const Trits& five, const int8_t* x) { sums.add(digit<f>(five), broadcast(x)); }

    template <int f>
    EDGERAZOR_INLINE void add_2bit(u8x64 fields, const int8_t* x) {
        sums.add(extract_bits<2 * f, 2>(fields), broadcast(x));
    }

    EDGERAZOR_INLINE RowSums take() {
        const RowSums total = sums.total();
        sums.reset();
        return total;
    }
};

EDGERAZOR_INLINE RowFloats zero_floats() { return {{vdupq_n_f32(0), vdupq_n_f32(0), vdupq_n_f32(0), vdupq_n_f32(0)}}; }

EDGERAZOR_INLINE RowFloats load_floats(const float* p) {
    return {{vld1q_f32(p), vld1q_f32(p + 4), vld1q_f32(p + 8), vld1q_f32(p + 12)}};
}

EDGERAZOR_INLINE void store_floats(float* p, RowFloats floats) {
    vst1q_f32(p, floats.reg[0]);
    vst1q_f32(p + 4, floats.reg[1]);
    vst1q_f32(p + 8, floats.reg[2]);
    vst1q_f32(p + 12, floats.reg[3]);
}

EDGERAZOR_INLINE float32x4_t load_f16_register(const uint16_t* p) {
    return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p)));
}

EDGERAZOR_INLINE RowFloats load_f16(const uint16_t* p) {
    return {{load_f16_register(p), load_f16_register(p + 4), load_f16_register(p + 8), load_f16_register(p + 12)}};
}

EDGERAZOR_INLINE float32x4_t add_scaled_register(float32x4_t y, int32x4_t total, float32x4_t w_scales, float x_scale) {
    return vaddq_f32(y, vmulq_f32(vcvtq_f32_s32(total), vmulq_f32(vdupq_n_f32(x_scale), w_scales)));
}

EDGERAZOR_INLINE void add_scaled(RowFloats& y, RowSums total, RowFloats w_scales, float x_scale) {
    y.reg[0] = add_scaled_register(y.reg[0], total.reg[0], w_scales.reg[0], x_scale);
    y.reg[1] = add_scaled_register(y.reg[1], total.reg[1], w_scales.reg[1], x_scale);
    y.reg[2] = add_scaled_register(y.reg[2], total.reg[2], w_scales.reg[2], x_scale);
    y.reg[3] = add_scaled_register(y.reg[3], total.reg[3], w_scales.reg[3], x_scale);
}

} // namespace

#include "matmul.hpp"
