// AVX-512 with VNNI and VBMI (Ice Lake, Zen 4 and later): a vector is one register.
#include <immintrin.h>

#include "digits.hpp"
#include "kernels.hpp"
#include "quantize.hpp"

namespace {

using Bytes = __m512i;
using Quad = __m512i;
using Sums = __m512i;
using Floats = __m512;

constexpr int kTileBlocks = 4, kTileTokens = 6, kChains = 4;

EDGERAZOR_INLINE Bytes load(const uint8_t* p) { return _mm512_loadu_si512(p); }
EDGERAZOR_INLINE void store(uint8_t* p, Bytes bytes) { _mm512_store_si512(p, bytes); }

// The barrier keeps gcc from folding the load into each use and then running out of registers.
EDGERAZOR_INLINE Bytes load_once(const uint8_t* p) {
    Bytes bytes = _mm512_load_si512(p);
    asm("" : "+v"(bytes));
    return bytes;
}

template <int shift, int width>
EDGERAZOR_INLINE Bytes field(Bytes bytes) {
    if constexpr (width == 8) return bytes;
    const Bytes shifted = shift == 0 ? bytes : _mm512_srli_epi16(bytes, shift);
    return _mm512_and_si512(shifted, _mm512_set1_epi8((1 << width) - 1));
}

template <int shift>
EDGERAZOR_INLINE Bytes join(Bytes low, Bytes high) {
    return _mm512_or_si512(low, _mm512_slli_epi16(high, shift));
}

EDGERAZOR_INLINE Quad broadcast(const int8_t* x) {
    int32_t quad;
    __builtin_memcpy(&quad, x, 4);
    return _mm512_set1_epi32(quad);
}

// Written in assembly because gcc spills the accumulators of a tile around the intrinsic.
EDGERAZOR_INLINE void multiply_add(Sums& sums, Bytes u, Quad x) { asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(u), "v"(x)); }

EDGERAZOR_INLINE void multiply_add(Sums& sums, Bytes u, const int8_t* x) {
    struct __attribute__((packed)) Unaligned { int32_t value; };
    asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sums) : "v"(u), "m"(((const Unaligned*)x)->value));
}

EDGERAZOR_INLINE Sums no_sums() { return _mm512_setzero_si512(); }
EDGERAZOR_INLINE Sums all(int number) { return _mm512_set1_epi32(number); }
EDGERAZOR_INLINE Sums load_sums(const int32_t* p) { return _mm512_load_si512(p); }
EDGERAZOR_INLINE void store_sums(int32_t* p, Sums sums) { _mm512_store_si512(p, sums); }
EDGERAZOR_INLINE Sums add_sums(Sums a, Sums b) { return _mm512_add_epi32(a, b); }

constexpr int bound(int) { return 255; }

template <int largest>
struct Accumulator {
    static constexpr int capacity = kLongest;
    Sums sums;
    EDGERAZOR_INLINE void reset() { sums = no_sums(); }
    EDGERAZOR_INLINE void add(Bytes u, Quad x) { multiply_add(sums, u, x); }
    EDGERAZOR_INLINE void widen() {}
    EDGERAZOR_INLINE Sums total() const { return sums; }
};

struct Trits {
    Bytes fields; // four 2-bit fields
    Bytes last;   // the fifth digit, in the top two bits
};

EDGERAZOR_INLINE Trits trits(Bytes bytes) {
    const __mmask64 is_long = _mm512_cmpge_epu8_mask(bytes, _mm512_set1_epi8((char)kLongDigits));
    const Bytes fields = _mm512_permutexvar_epi8(bytes, _mm512_load_si512(kDigits.short_fields));
    const Bytes last = _mm512_and_si512(bytes, _mm512_set1_epi8((char)0xc0));
    return {_mm512_mask_permutexvar_epi8(fields, is_long, bytes, _mm512_load_si512(kDigits.long_fields)),
            _mm512_mask_permutexvar_epi8(last, is_long, bytes, _mm512_load_si512(kDigits.long_last))};
}

template <int f>
EDGERAZOR_INLINE void store_trit(const Trits& five, uint8_t* to) {
    store(to, f == 4 ? field<6, 2>(five.last) : field<f % 4 * 2, 2>(five.fields));
}

// The fields are masked where they lie, not shifted: each position has its own sum, which is shifted once at the end.
struct TernarySums {
    Sums sums[5] = {no_sums(), no_sums(), no_sums(), no_sums(), no_sums()};

    template <int f>
    EDGERAZOR_INLINE void add_pair(Bytes fields, const int8_t* x) {
        multiply_add(sums[f], _mm512_and_si512(fields, _mm512_set1_epi8((char)(3 << 2 * f))), x);
    }

    template <int f>
    EDGERAZOR_INLINE void add(const Trits& five, const int8_t* x) {
        if constexpr (f == 4) {
            multiply_add(sums[4], five.last, x);
        } else {
            add_pair<f>(five.fields, x);
        }
    }

    EDGERAZOR_INLINE Sums take() {
        const Sums low = add_sums(sums[0], _mm512_srai_epi32(sums[1], 2));
        const Sums high = add_sums(_mm512_srai_epi32(sums[2], 4), _mm512_srai_epi32(add_sums(sums[3], sums[4]), 6));
        sums[0] = sums[1] = sums[2] = sums[3] = sums[4] = no_sums();
        return add_sums(low, high);
    }
};

EDGERAZOR_INLINE Floats no_floats() { return _mm512_setzero_ps(); }
EDGERAZOR_INLINE Floats load_floats(const float* p) { return _mm512_load_ps(p); }
EDGERAZOR_INLINE void store_floats(float* p, Floats floats) { _mm512_store_ps(p, floats); }

EDGERAZOR_INLINE Floats load_halves(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
}

EDGERAZOR_INLINE void fold(Floats& y, Sums total, Floats w_scales, float x_scale) {
    const Floats scales = _mm512_mul_ps(_mm512_set1_ps(x_scale), w_scales);
    y = _mm512_add_ps(y, _mm512_mul_ps(_mm512_cvtepi32_ps(total), scales));
}

} // namespace

#include "products.hpp"

const Kernels edgerazor::avx512_kernels = {"avx512", quantize, linear, linear_float, expand_ternary, read};
