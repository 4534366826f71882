// AVX2, and AVX-VNNI where the options of the translation unit allow it. A vector is two registers of 8 rows each.
#include <immintrin.h>

#include "base3_tables.hpp"
#include "compiler.hpp"
#include "matmul_kernels.hpp"
#include "quantize_activations.hpp"
#include "rotate.hpp"

namespace {

using namespace edgerazor;

#ifdef __AVXVNNI__
constexpr int kTileTokens = 6;
#else
constexpr int kTileTokens = 4;
#endif
constexpr int kTileBlocks = 1, kGemvTokens = kTileTokens, kDotTokens = 0, kFewTokens = 4 * kGemvTokens, kChains = 2;
constexpr bool kUnpackAhead = false;

struct u8x64 { __m256i half[2]; };
struct RowSums { __m256i half[2]; };
struct RowFloats { __m256 half[2]; };
using i8x4 = __m256i;

EDGERAZOR_INLINE u8x64 load(const uint8_t* p) {
    return {{_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)(p + 32))}};
}

EDGERAZOR_INLINE u8x64 load_to_register(const uint8_t* p) { return load(p); }

EDGERAZOR_INLINE void store(uint8_t* p, u8x64 bytes) {
    _mm256_storeu_si256((__m256i*)p, bytes.half[0]);
    _mm256_storeu_si256((__m256i*)(p + 32), bytes.half[1]);
}

template <int shift, int width>
EDGERAZOR_INLINE __m256i extract_bits_half(__m256i bytes) {
    if constexpr (width == 8) return bytes;
    const __m256i shifted = shift == 0 ? bytes : _mm256_srli_epi16(bytes, shift);
    return _mm256_and_si256(shifted, _mm256_set1_epi8((1 << width) - 1));
}

template <int shift, int width>
EDGERAZOR_INLINE u8x64 extract_bits(u8x64 bytes) {
    return {{extract_bits_half<shift, width>(bytes.half[0]), extract_bits_half<shift, width>(bytes.half[1])}};
}

template <int shift>
EDGERAZOR_INLINE u8x64 combine_bits(u8x64 low, u8x64 high) {
    return {{_mm256_or_si256(low.half[0], _mm256_slli_epi16(high.half[0], shift)),
             _mm256_or_si256(low.half[1], _mm256_slli_epi16(high.half[1], shift))}};
}

// Keeps gcc from loading everything that a tile needs at its beginning, for which there are too few registers.
EDGERAZOR_INLINE void keep_order(__m256i& value) { asm volatile("" : "+x"(value)); }

EDGERAZOR_INLINE i8x4 broadcast(const int8_t* x) {
    int32_t number;
    __builtin_memcpy(&number, x, 4);
    i8x4 quad = _mm256_set1_epi32(number);
    keep_order(quad);
    return quad;
}

EDGERAZOR_INLINE RowSums zero_sums() { return {{_mm256_setzero_si256(), _mm256_setzero_si256()}}; }

EDGERAZOR_INLINE RowSums splat_sums(int number) { return {{_mm256_set1_epi32(number), _mm256_set1_epi32(number)}}; }

EDGERAZOR_INLINE RowSums load_sums(const int32_t* p) {
    return {{_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)(p + 8))}};
}

EDGERAZOR_INLINE void store_sums(int32_t* p, RowSums sums) {
    _mm256_storeu_si256((__m256i*)p, sums.half[0]);
    _mm256_storeu_si256((__m256i*)(p + 8), sums.half[1]);
}

EDGERAZOR_INLINE RowSums add_sums(RowSums a, RowSums b) {
    return {{_mm256_add_epi32(a.half[0], b.half[0]), _mm256_add_epi32(a.half[1], b.half[1])}};
}

#ifdef __AVXVNNI__

constexpr int accumulator_bound(int) { return 255; }

template <int max_code>
struct DotAccumulator {
    static constexpr int capacity = kMaxSegmentColumns;
    RowSums sums;
    EDGERAZOR_INLINE void reset() { sums = zero_sums(); }
    EDGERAZOR_INLINE void add(u8x64 u, i8x4 x) {
        sums.half[0] = _mm256_dpbusd_avx_epi32(sums.half[0], u.half[0], x);
        sums.half[1] = _mm256_dpbusd_avx_epi32(sums.half[1], u.half[1], x);
    }
    EDGERAZOR_INLINE void widen() {}
    EDGERAZOR_INLINE RowSums total() const { return sums; }
};

#else

constexpr int accumulator_bound(int max_code) {
    return max_code <= 3 ? max_code : max_code <= 15 ? 15 : max_code <= 127 ? 127 : 255;
}

// Sums of adjacent 16-bit numbers.
EDGERAZOR_INLINE __m256i pair_sums(__m256i shorts) { return _mm256_madd_epi16(shorts, _mm256_set1_epi16(1)); }

// Dot products of four bytes as 32-bit numbers. `vpmaddubsw` saturates at 16 bits, so a u above 127 is multiplied in
// two steps: its upper seven bits and its lowest bit.
template <int max_code>
EDGERAZOR_INLINE __m256i quad_sums(__m256i u, i8x4 x) {
    if constexpr (max_code <= 127) {
        return pair_sums(_mm256_maddubs_epi16(u, x));
    } else {
        const __m256i upper = pair_sums(_mm256_maddubs_epi16(extract_bits_half<1, 7>(u), x));
        const __m256i lowest_bit = pair_sums(_mm256_maddubs_epi16(extract_bits_half<0, 1>(u), x));
        return _mm256_add_epi32(_mm256_add_epi32(upper, upper), lowest_bit);
    }
}

// Products of small codes are added up in 16 bits for up to `max_quads` quads: a pair is at most 2 * 127 * max_code.
template <int max_code>
struct DotAccumulator {
    static constexpr int max_quads = 32767 / (2 * 127 * max_code);
    static constexpr bool narrow = max_quads >= kBitsChunkQuads;
    static constexpr int capacity = narrow ? max_quads : kMaxSegmentColumns;
    RowSums sums, shorts;

    EDGERAZOR_INLINE void reset() { sums = shorts = zero_sums(); }

    EDGERAZOR_INLINE void add(u8x64 u, i8x4 x) {
        if constexpr (narrow) {
            shorts.half[0] = _mm256_add_epi16(shorts.half[0], _mm256_maddubs_epi16(u.half[0], x));
            shorts.half[1] = _mm256_add_epi16(shorts.half[1], _mm256_maddubs_epi16(u.half[1], x));
            keep_order(shorts.half[1]);
        } else {
            sums = add_sums(sums, {{quad_sums<max_code>(u.half[0], x), quad_sums<max_code>(u.half[1], x)}});
        }
    }

    EDGERAZOR_INLINE void widen() {
        if constexpr (!narrow) return;
        sums = add_sums(sums, {{pair_sums(shorts.half[0]), pair_sums(shorts.half[1])}});
        shorts = zero_sums();
    }

    EDGERAZOR_INLINE RowSums total() const { return sums; }
};

#endif

struct Trits {
    u8x64 digits[5];
};

template <int... numbers>
struct Table {
    alignas(16) static constexpr int8_t at[16] = {numbers...}; // the rest is zero
};

// The numbers of the table at indices below 16.
template <int... numbers>
EDGERAZOR_INLINE __m256i lookup(__m256i indices) {
    const __m128i table = _mm_load_si128((const __m128i*)Table<numbers...>::at);
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(table), indices);
}

// bytes / step, for (signed) bytes below 3 * step.
EDGERAZOR_INLINE __m256i divide_small(__m256i bytes, int step) {
    const __m256i one = _mm256_cmpgt_epi8(bytes, _mm256_set1_epi8((char)(step - 1)));
    const __m256i two = _mm256_cmpgt_epi8(bytes, _mm256_set1_epi8((char)(2 * step - 1)));
    return _mm256_abs_epi8(_mm256_add_epi8(one, two)); // true is -1
}

EDGERAZOR_INLINE void unpack_trits_half(__m256i bytes, __m256i* digits) {
    const __m256i is_long = _mm256_cmpeq_epi8(_mm256_max_epu8(bytes, _mm256_set1_epi8((char)kLongBytes)), bytes);
    const __m256i beyond = _mm256_sub_epi8(bytes, _mm256_set1_epi8((char)kLongBytes));
    const __m256i long_last = divide_small(beyond, kLongPerDigit);
    const __m256i long_rest =
        _mm256_add_epi8(beyond, lookup<64, 64 - kLongPerDigit, 64 - 2 * kLongPerDigit>(long_last));
    digits[4] = _mm256_blendv_epi8(extract_bits_half<6, 2>(bytes), long_last, is_long);
    const __m256i below_81 = _mm256_blendv_epi8(extract_bits_half<0, 6>(bytes), long_rest, is_long);
    digits[3] = divide_small(below_81, 27);
    const __m256i below_27 = _mm256_sub_epi8(below_81, lookup<0, 27, 54>(digits[3]));
    digits[2] = divide_small(below_27, 9);
    const __m256i below_9 = _mm256_sub_epi8(below_27, lookup<0, 9, 18>(digits[2]));
    digits[1] = lookup<0, 0, 0, 1, 1, 1, 2, 2, 2>(below_9);
    digits[0] = lookup<0, 1, 2, 0, 1, 2, 0, 1, 2>(below_9);
}

EDGERAZOR_INLINE Trits unpack_trits(u8x64 bytes) {
    __m256i low[5], high[5];
    unpack_trits_half(bytes.half[0], low);
    unpack_trits_half(bytes.half[1], high);
    return {{{{low[0], high[0]}}, {{low[1], high[1]}}, {{low[2], high[2]}}, {{low[3], high[3]}}, {{low[4], high[4]}}}};
}

template <int f>
EDGERAZOR_INLINE u8x64 digit(const Trits& five) { return five.digits[f]; }

struct TernaryDot {
    DotAccumulator<accumulator_bound(2)> sums;
    EDGERAZOR_INLINE TernaryDot() { sums.reset(); }

    template <int f>
    EDGERAZOR_INLINE void add(const Trits& five, const int8_t* x) { sums.add(five.digits[f], broadcast(x)); }

    template <int f>
    EDGERAZOR_INLINE void add_2bit(u8x64 fields, const int8_t* x) {
        sums.add(extract_bits<2 * f, 2>(fields), broadcast(x));
    }

    EDGERAZOR_INLINE RowSums take() {
        sums.widen();
        const RowSums total = sums.total();
        sums.reset();
        return total;
    }
};

EDGERAZOR_INLINE RowFloats zero_floats() { return {{_mm256_setzero_ps(), _mm256_setzero_ps()}}; }
EDGERAZOR_INLINE RowFloats load_floats(const float* p) { return {{_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}}; }

EDGERAZOR_INLINE void store_floats(float* p, RowFloats floats) {
    _mm256_storeu_ps(p, floats.half[0]);
    _mm256_storeu_ps(p + 8, floats.half[1]);
}

EDGERAZOR_INLINE RowFloats load_f16(const uint16_t* p) {
    return {{_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)),
             _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + 8)))}};
}

EDGERAZOR_INLINE __m256 add_scaled_half(__m256 y, __m256i total, __m256 w_scales, float x_scale) {
    const __m256 scales = _mm256_mul_ps(_mm256_set1_ps(x_scale), w_scales);
    return _mm256_add_ps(y, _mm256_mul_ps(_mm256_cvtepi32_ps(total), scales));
}

EDGERAZOR_INLINE void add_scaled(RowFloats& y, RowSums total, RowFloats w_scales, float x_scale) {
    y.half[0] = add_scaled_half(y.half[0], total.half[0], w_scales.half[0], x_scale);
    y.half[1] = add_scaled_half(y.half[1], total.half[1], w_scales.half[1], x_scale);
}

} // namespace

#include "matmul.hpp"
