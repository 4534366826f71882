// AVX-512 with VNNI and VBMI (Ice Lake, Zen 4 and later). A vector is one register.
#include <immintrin.h>

#include "base3_tables.hpp"
#include "compiler.hpp"
#include "matmul_kernels.hpp"
#include "quantize_activations.hpp"
#include "rotate.hpp"

namespace {

using namespace edgerazor;

using u8x64 = __m512i;
using i8x4 = __m512i;
using RowSums = __m512i;
using RowFloats = __m512;

constexpr int kTileBlocks = 4, kTileTokens = 6, kGemvTokens = 16, kDotTokens = 4, kFewTokens = 32, kChains = 4;
constexpr bool kUnpackAhead = true;

EDGERAZOR_INLINE u8x64 load(const uint8_t* p) { return _mm512_loadu_si512(p); }
EDGERAZOR_INLINE void store(uint8_t* p, u8x64 bytes) { _mm512_store_si512(p, bytes); }

// The empty assembly keeps gcc from repeating the load at every use, and then running out of registers.
EDGERAZOR_INLINE u8x64 load_to_register(const uint8_t* p) {
    u8x64 bytes = _mm512_load_si512(p);
    asm("" : "+v"(bytes));
    return bytes;
}

template <int shift, int width>
EDGERAZOR_INLINE u8x64 extract_bits(u8x64 bytes) {
    if constexpr (width == 8) return bytes;
    const u8x64 shifted = shift == 0 ? bytes : _mm512_srli_epi16(bytes, shift);
    return _mm512_and_si512(shifted, _mm512_set1_epi8((1 << width) - 1));
}

template <int shift>
EDGERAZOR_INLINE u8x64 combine_bits(u8x64 low, u8x64 high) {
    return _mm512_or_si512(low, _mm512_slli_epi16(high, shift));
}

EDGERAZOR_INLINE i8x4 broadcast(const int8_t* x) {
    int32_t quad;
    __builtin_memcpy(&quad, x, 4);
    return _mm512_set1_epi32(quad);
}

// Dot products of four bytes. In assembly, because gcc spills the accumulators of a tile around the intrinsic.
EDGERAZOR_INLINE void dot_add(RowSums& sums, u8x64 u, i8x4 x) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(u), "v"(x));
}

EDGERAZOR_INLINE void dot_add(RowSums& sums, u8x64 u, const int8_t* x) {
    struct __attribute__((packed)) Unaligned { int32_t value; };
    asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sums) : "v"(u), "m"(((const Unaligned*)x)->value));
}

EDGERAZOR_INLINE RowSums zero_sums() { return _mm512_setzero_si512(); }
EDGERAZOR_INLINE RowSums splat_sums(int number) { return _mm512_set1_epi32(number); }
EDGERAZOR_INLINE RowSums load_sums(const int32_t* p) { return _mm512_load_si512(p); }
EDGERAZOR_INLINE void store_sums(int32_t* p, RowSums sums) { _mm512_store_si512(p, sums); }
EDGERAZOR_INLINE RowSums add_sums(RowSums a, RowSums b) { return _mm512_add_epi32(a, b); }

constexpr int accumulator_bound(int) { return 255; }

template <int max_code>
struct DotAccumulator {
    static constexpr int capacity = kMaxSegmentColumns;
    RowSums sums;
    EDGERAZOR_INLINE void reset() { sums = zero_sums(); }
    EDGERAZOR_INLINE void add(u8x64 u, i8x4 x) { dot_add(sums, u, x); }
    EDGERAZOR_INLINE void widen() {}
    EDGERAZOR_INLINE RowSums total() const { return sums; }
};

struct Trits {
    u8x64 fields; // four 2-bit fields
    u8x64 last;   // the fifth digit, in the top two bits
};

EDGERAZOR_INLINE Trits unpack_trits(u8x64 bytes) {
    const __mmask64 is_long = _mm512_cmpge_epu8_mask(bytes, _mm512_set1_epi8((char)kLongBytes));
    const u8x64 fields = _mm512_permutexvar_epi8(bytes, _mm512_load_si512(kBase3.short_fields));
    const u8x64 last = _mm512_and_si512(bytes, _mm512_set1_epi8((char)0xc0));
    return {_mm512_mask_permutexvar_epi8(fields, is_long, bytes, _mm512_load_si512(kBase3.long_fields)),
            _mm512_mask_permutexvar_epi8(last, is_long, bytes, _mm512_load_si512(kBase3.long_last))};
}

template <int f>
EDGERAZOR_INLINE u8x64 digit(const Trits& five) {
    return f == 4 ? extract_bits<6, 2>(five.last) : extract_bits<f % 4 * 2, 2>(five.fields);
}

// Fields are masked but not shifted: each position of a byte has its own sum, which is shifted once at the end. What is
// shifted away is 0, and the fifth digit lies where the fourth field does.
struct TernaryDot {
    RowSums sums[4] = {zero_sums(), zero_sums(), zero_sums(), zero_sums()};

    template <int f>
    EDGERAZOR_INLINE void add_2bit(u8x64 fields, const int8_t* x) {
        dot_add(sums[f], _mm512_and_si512(fields, _mm512_set1_epi8((char)(3 << 2 * f))), x);
    }

    template <int f>
    EDGERAZOR_INLINE void add(const Trits& five, const int8_t* x) {
        if constexpr (f == 4) {
            dot_add(sums[3], five.last, x);
        } else {
            add_2bit<f>(five.fields, x);
        }
    }

    EDGERAZOR_INLINE RowSums take() {
        const RowSums low = add_sums(sums[0], _mm512_srai_epi32(sums[1], 2));
        const RowSums high = add_sums(_mm512_srai_epi32(sums[2], 4), _mm512_srai_epi32(sums[3], 6));
        sums[0] = sums[1] = sums[2] = sums[3] = zero_sums();
        return add_sums(low, high);
    }
};

EDGERAZOR_INLINE RowFloats zero_floats() { return _mm512_setzero_ps(); }
EDGERAZOR_INLINE RowFloats load_floats(const float* p) { return _mm512_load_ps(p); }
EDGERAZOR_INLINE void store_floats(float* p, RowFloats floats) { _mm512_storeu_ps(p, floats); }

EDGERAZOR_INLINE RowFloats load_f16(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
}

EDGERAZOR_INLINE void add_scaled(RowFloats& y, RowSums total, RowFloats w_scales, float x_scale) {
    const RowFloats scales = _mm512_mul_ps(_mm512_set1_ps(x_scale), w_scales);
    y = _mm512_add_ps(y, _mm512_mul_ps(_mm512_cvtepi32_ps(total), scales));
}

} // namespace

#include "matmul.hpp"

const edgerazor::MatmulKernels edgerazor::avx512_matmul = {
    "avx512", quantize, rotate, rotate_back, linear, linear_float, expand_ternary, read,
};
