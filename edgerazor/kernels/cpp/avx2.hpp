// AVX2, with AVX-VNNI where the unit's options allow it: a vector is two registers of 8 rows each.
#include <immintrin.h>

#include "digits.hpp"
#include "kernels.hpp"
#include "quantize.hpp"

namespace {

#ifdef __AVXVNNI__
constexpr int kTileTokens = 6;
#else
constexpr int kTileTokens = 4;
#endif
constexpr int kTileBlocks = 1, kChains = 2;

struct Bytes { __m256i half[2]; };
struct Sums { __m256i half[2]; };
struct Floats { __m256 half[2]; };
using Quad = __m256i;

EDGERAZOR_INLINE Bytes load(const uint8_t* p) {
    return {{_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)(p + 32))}};
}

EDGERAZOR_INLINE Bytes load_once(const uint8_t* p) { return load(p); }

EDGERAZOR_INLINE void store(uint8_t* p, Bytes bytes) {
    _mm256_storeu_si256((__m256i*)p, bytes.half[0]);
    _mm256_storeu_si256((__m256i*)(p + 32), bytes.half[1]);
}

template <int shift, int width>
EDGERAZOR_INLINE __m256i half_field(__m256i bytes) {
    if constexpr (width == 8) return bytes;
    const __m256i shifted = shift == 0 ? bytes : _mm256_srli_epi16(bytes, shift);
    return _mm256_and_si256(shifted, _mm256_set1_epi8((1 << width) - 1));
}

template <int shift, int width>
EDGERAZOR_INLINE Bytes field(Bytes bytes) {
    return {{half_field<shift, width>(bytes.half[0]), half_field<shift, width>(bytes.half[1])}};
}

template <int shift>
EDGERAZOR_INLINE Bytes join(Bytes low, Bytes high) {
    return {{_mm256_or_si256(low.half[0], _mm256_slli_epi16(high.half[0], shift)),
             _mm256_or_si256(low.half[1], _mm256_slli_epi16(high.half[1], shift))}};
}

// Keeps gcc from loading all that a tile needs first, for which there are too few registers.
EDGERAZOR_INLINE void in_order(__m256i& value) { asm volatile("" : "+x"(value)); }

EDGERAZOR_INLINE Quad broadcast(const int8_t* x) {
    int32_t number;
    __builtin_memcpy(&number, x, 4);
    Quad quad = _mm256_set1_epi32(number);
    in_order(quad);
    return quad;
}

EDGERAZOR_INLINE Sums no_sums() { return {{_mm256_setzero_si256(), _mm256_setzero_si256()}}; }

EDGERAZOR_INLINE Sums all(int number) { return {{_mm256_set1_epi32(number), _mm256_set1_epi32(number)}}; }

EDGERAZOR_INLINE Sums load_sums(const int32_t* p) {
    return {{_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)(p + 8))}};
}

EDGERAZOR_INLINE void store_sums(int32_t* p, Sums sums) {
    _mm256_storeu_si256((__m256i*)p, sums.half[0]);
    _mm256_storeu_si256((__m256i*)(p + 8), sums.half[1]);
}

EDGERAZOR_INLINE Sums add_sums(Sums a, Sums b) {
    return {{_mm256_add_epi32(a.half[0], b.half[0]), _mm256_add_epi32(a.half[1], b.half[1])}};
}

#ifdef __AVXVNNI__

constexpr int bound(int) { return 255; }

template <int largest>
struct Accumulator {
    static constexpr int capacity = kLongest;
    Sums sums;
    EDGERAZOR_INLINE void reset() { sums = no_sums(); }
    EDGERAZOR_INLINE void add(Bytes u, Quad x) {
        sums.half[0] = _mm256_dpbusd_avx_epi32(sums.half[0], u.half[0], x);
        sums.half[1] = _mm256_dpbusd_avx_epi32(sums.half[1], u.half[1], x);
    }
    EDGERAZOR_INLINE void widen() {}
    EDGERAZOR_INLINE Sums total() const { return sums; }
};

#else

constexpr int bound(int largest) { return largest <= 3 ? largest : largest <= 15 ? 15 : largest <= 127 ? 127 : 255; }

// Sums of adjacent 16-bit numbers.
EDGERAZOR_INLINE __m256i pair_sums(__m256i shorts) { return _mm256_madd_epi16(shorts, _mm256_set1_epi16(1)); }

// u * x in pairs, as 32-bit sums of four. `vpmaddubsw` saturates at 16 bits, so a u above 127 goes in two portions.
template <int largest>
EDGERAZOR_INLINE __m256i quad_sums(__m256i u, Quad x) {
    if constexpr (largest <= 127) {
        return pair_sums(_mm256_maddubs_epi16(u, x));
    } else {
        const __m256i upper = pair_sums(_mm256_maddubs_epi16(half_field<1, 7>(u), x));
        const __m256i lowest_bit = pair_sums(_mm256_maddubs_epi16(half_field<0, 1>(u), x));
        return _mm256_add_epi32(_mm256_add_epi32(upper, upper), lowest_bit);
    }
}

// Small codes add up in 16 bits for a while: a pair is at most 2 * 127 * largest.
template <int largest>
struct Accumulator {
    static constexpr int safe = 32767 / (2 * 127 * largest);
    static constexpr bool narrow = safe >= kBitsQuads;
    static constexpr int capacity = narrow ? safe : kLongest;
    Sums sums, shorts;

    EDGERAZOR_INLINE void reset() { sums = shorts = no_sums(); }

    EDGERAZOR_INLINE void add(Bytes u, Quad x) {
        if constexpr (narrow) {
            shorts.half[0] = _mm256_add_epi16(shorts.half[0], _mm256_maddubs_epi16(u.half[0], x));
            shorts.half[1] = _mm256_add_epi16(shorts.half[1], _mm256_maddubs_epi16(u.half[1], x));
            in_order(shorts.half[1]);
        } else {
            sums = add_sums(sums, {{quad_sums<largest>(u.half[0], x), quad_sums<largest>(u.half[1], x)}});
        }
    }

    EDGERAZOR_INLINE void widen() {
        if constexpr (!narrow) return;
        sums = add_sums(sums, {{pair_sums(shorts.half[0]), pair_sums(shorts.half[1])}});
        shorts = no_sums();
    }

    EDGERAZOR_INLINE Sums total() const { return sums; }
};

#endif

struct Trits {
    Bytes digits[5];
};

template <int... numbers>
struct Table {
    alignas(16) static constexpr int8_t at[16] = {numbers...}; // then zeros
};

// The numbers at places below 16.
template <int... numbers>
EDGERAZOR_INLINE __m256i look_up(__m256i places) {
    const __m128i table = _mm_load_si128((const __m128i*)Table<numbers...>::at);
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(table), places);
}

// bytes / step for (signed) bytes below 3 * step.
EDGERAZOR_INLINE __m256i digit_of(__m256i bytes, int step) {
    const __m256i one = _mm256_cmpgt_epi8(bytes, _mm256_set1_epi8((char)(step - 1)));
    const __m256i two = _mm256_cmpgt_epi8(bytes, _mm256_set1_epi8((char)(2 * step - 1)));
    return _mm256_abs_epi8(_mm256_add_epi8(one, two)); // a mask is -1
}

EDGERAZOR_INLINE void half_trits(__m256i bytes, __m256i* digits) {
    const __m256i is_long = _mm256_cmpeq_epi8(_mm256_max_epu8(bytes, _mm256_set1_epi8((char)kLongDigits)), bytes);
    const __m256i beyond = _mm256_sub_epi8(bytes, _mm256_set1_epi8((char)kLongDigits));
    const __m256i long_last = digit_of(beyond, kLongCount);
    const __m256i long_rest = _mm256_add_epi8(beyond, look_up<64, 64 - kLongCount, 64 - 2 * kLongCount>(long_last));
    digits[4] = _mm256_blendv_epi8(half_field<6, 2>(bytes), long_last, is_long);
    const __m256i below_81 = _mm256_blendv_epi8(half_field<0, 6>(bytes), long_rest, is_long);
    digits[3] = digit_of(below_81, 27);
    const __m256i below_27 = _mm256_sub_epi8(below_81, look_up<0, 27, 54>(digits[3]));
    digits[2] = digit_of(below_27, 9);
    const __m256i below_9 = _mm256_sub_epi8(below_27, look_up<0, 9, 18>(digits[2]));
    digits[1] = look_up<0, 0, 0, 1, 1, 1, 2, 2, 2>(below_9);
    digits[0] = look_up<0, 1, 2, 0, 1, 2, 0, 1, 2>(below_9);
}

EDGERAZOR_INLINE Trits trits(Bytes bytes) {
    __m256i low[5], high[5];
    half_trits(bytes.half[0], low);
    half_trits(bytes.half[1], high);
    return {{{{low[0], high[0]}}, {{low[1], high[1]}}, {{low[2], high[2]}}, {{low[3], high[3]}}, {{low[4], high[4]}}}};
}

template <int f>
EDGERAZOR_INLINE void store_trit(const Trits& five, uint8_t* to) { store(to, five.digits[f]); }

struct TernarySums {
    Accumulator<bound(2)> sums;
    EDGERAZOR_INLINE TernarySums() { sums.reset(); }

    template <int f>
    EDGERAZOR_INLINE void add(const Trits& five, const int8_t* x) { sums.add(five.digits[f], broadcast(x)); }

    template <int f>
    EDGERAZOR_INLINE void add_pair(Bytes pairs, const int8_t* x) { sums.add(field<2 * f, 2>(pairs), broadcast(x)); }

    EDGERAZOR_INLINE Sums take() {
        sums.widen();
        const Sums total = sums.total();
        sums.reset();
        return total;
    }
};

EDGERAZOR_INLINE Floats no_floats() { return {{_mm256_setzero_ps(), _mm256_setzero_ps()}}; }
EDGERAZOR_INLINE Floats load_floats(const float* p) { return {{_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}}; }

EDGERAZOR_INLINE void store_floats(float* p, Floats floats) {
    _mm256_storeu_ps(p, floats.half[0]);
    _mm256_storeu_ps(p + 8, floats.half[1]);
}

EDGERAZOR_INLINE Floats load_halves(const uint16_t* p) {
    return {{_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)), _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + 8)))}};
}

EDGERAZOR_INLINE __m256 half_fold(__m256 y, __m256i total, __m256 w_scales, float x_scale) {
    const __m256 scales = _mm256_mul_ps(_mm256_set1_ps(x_scale), w_scales);
    return _mm256_add_ps(y, _mm256_mul_ps(_mm256_cvtepi32_ps(total), scales));
}

EDGERAZOR_INLINE void fold(Floats& y, Sums total, Floats w_scales, float x_scale) {
    y.half[0] = half_fold(y.half[0], total.half[0], w_scales.half[0], x_scale);
    y.half[1] = half_fold(y.half[1], total.half[1], w_scales.half[1], x_scale);
}

} // namespace

#include "products.hpp"
