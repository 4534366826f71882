// Sixteen floats, in one to four registers of the unit's instruction set, and the product of small matrices of them.
// `Lanes` are vectors of the compilers; intrinsics stand where these do not find the instruction.
#pragma once
#include <stdint.h>
#include <string.h>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "kernels.hpp"
#include "unroll.hpp"

namespace {

using namespace edgerazor;

#if defined(__AVX512F__)
constexpr int kLanes = 16, kAccumulators = 24; // of 32 registers
#elif defined(__AVX2__)
constexpr int kLanes = 8, kAccumulators = 12; // of 16
#elif defined(__aarch64__)
constexpr int kLanes = 4, kAccumulators = 20; // of 32, of which broadcast numbers take some
#else
constexpr int kLanes = 4, kAccumulators = 12;
#endif
constexpr int kParts = 16 / kLanes;

typedef float Lanes __attribute__((vector_size(4 * kLanes)));
typedef float AnyLanes __attribute__((vector_size(4 * kLanes), aligned(4), may_alias)); // in memory
typedef int32_t IntLanes __attribute__((vector_size(4 * kLanes)));
typedef uint32_t UnsignedLanes __attribute__((vector_size(4 * kLanes)));

struct Sixteen { Lanes part[kParts]; };
struct SixteenInts { IntLanes part[kParts]; };

// function(Constant<number of a part>) for each part.
template <class Function>
EDGERAZOR_INLINE Sixteen in_parts(Function&& function) {
    Sixteen result;
    unroll<0, kParts>(UNROLL(i) { result.part[i.value] = function(i); });
    return result;
}

EDGERAZOR_INLINE Lanes multiply_add(Lanes a, Lanes b, Lanes sum) {
#if defined(__AVX512F__)
    return _mm512_fmadd_ps(a, b, sum);
#elif defined(__AVX2__)
    return _mm256_fmadd_ps(a, b, sum);
#elif defined(__aarch64__)
    return vfmaq_f32(sum, a, b);
#else
    return a * b + sum;
#endif
}

EDGERAZOR_INLINE Lanes fill_lanes(float x) { return x - Lanes{}; } // x + 0 would not be -0 for -0

EDGERAZOR_INLINE Sixteen fill(float x) {
    return in_parts(UNROLL() { return fill_lanes(x); });
}

EDGERAZOR_INLINE Sixteen operator+(Sixteen a, Sixteen b) {
    return in_parts(UNROLL(i) { return a.part[i.value] + b.part[i.value]; });
}

EDGERAZOR_INLINE Sixteen operator-(Sixteen a, Sixteen b) {
    return in_parts(UNROLL(i) { return a.part[i.value] - b.part[i.value]; });
}

EDGERAZOR_INLINE Sixteen operator*(Sixteen a, Sixteen b) {
    return in_parts(UNROLL(i) { return a.part[i.value] * b.part[i.value]; });
}

EDGERAZOR_INLINE Sixteen operator/(Sixteen a, Sixteen b) {
    return in_parts(UNROLL(i) { return a.part[i.value] / b.part[i.value]; });
}

EDGERAZOR_INLINE Sixteen multiply_add(Sixteen a, Sixteen b, Sixteen sum) {
    return in_parts(UNROLL(i) { return multiply_add(a.part[i.value], b.part[i.value], sum.part[i.value]); });
}

// The larger ones; b where a is not a number.
EDGERAZOR_INLINE Sixteen larger(Sixteen a, Sixteen b) {
    return in_parts(UNROLL(i) { return a.part[i.value] > b.part[i.value] ? a.part[i.value] : b.part[i.value]; });
}

// x between two bounds; what is not a number stays so.
EDGERAZOR_INLINE Sixteen clamp(Sixteen x, float low, float high) {
    const Lanes lows = fill_lanes(low), highs = fill_lanes(high);
    return in_parts(UNROLL(i) {
        const Lanes below = x.part[i.value] > highs ? highs : x.part[i.value];
        return below < lows ? lows : below;
    });
}

EDGERAZOR_INLINE float largest_of(Sixteen x) {
    Lanes lanes = x.part[0];
    unroll<1, kParts>(UNROLL(i) { lanes = lanes > x.part[i.value] ? lanes : x.part[i.value]; });
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps(lanes);
#elif defined(__AVX2__)
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128(lanes), _mm256_extractf128_ps(lanes, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
#elif defined(__aarch64__)
    return vmaxvq_f32(lanes);
#else
    float largest = lanes[0];
    for (int i = 1; i < kLanes; i++) largest = lanes[i] > largest ? lanes[i] : largest;
    return largest;
#endif
}

// Part by part: gcc copies the whole through memory in smaller pieces.
EDGERAZOR_INLINE Sixteen load(const float* p) {
    return in_parts(UNROLL(i) { return *(const AnyLanes*)(p + i.value * kLanes); });
}

EDGERAZOR_INLINE void store(float* p, Sixteen x) {
    unroll<0, kParts>(UNROLL(i) { *(AnyLanes*)(p + i.value * kLanes) = x.part[i.value]; });
}

EDGERAZOR_INLINE float sum_of(Sixteen x) {
    float each[16], sum = 0;
    store(each, x);
    for (int i = 0; i < 16; i++) sum += each[i];
    return sum;
}

EDGERAZOR_INLINE Sixteen load(const int8_t* p) {
#if defined(__AVX512F__)
    return {{_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)))}};
#elif defined(__AVX2__)
    return in_parts(UNROLL(i) {
        const __m128i codes = _mm_loadl_epi64((const __m128i*)(p + 8 * i.value));
        return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(codes));
    });
#elif defined(__aarch64__)
    const int8x16_t codes = vld1q_s8(p);
    const int16x8_t low = vmovl_s8(vget_low_s8(codes)), high = vmovl_s8(vget_high_s8(codes));
    return {{vcvtq_f32_s32(vmovl_s16(vget_low_s16(low))), vcvtq_f32_s32(vmovl_s16(vget_high_s16(low))),
             vcvtq_f32_s32(vmovl_s16(vget_low_s16(high))), vcvtq_f32_s32(vmovl_s16(vget_high_s16(high)))}};
#else
    float x[16];
    for (int i = 0; i < 16; i++) x[i] = p[i];
    return load(x);
#endif
}

EDGERAZOR_INLINE SixteenInts load_ints(const void* p) {
    SixteenInts x;
    unroll<0, kParts>(UNROLL(i) { x.part[i.value] = (IntLanes)((const AnyLanes*)p)[i.value]; });
    return x;
}

EDGERAZOR_INLINE Sixteen to_floats(SixteenInts x) {
    return in_parts(UNROLL(i) { return __builtin_convertvector(x.part[i.value], Lanes); });
}

// Rows of a tile whose sums have a register each, and columns of 16 for fewer rows.
constexpr int kTileRows = kAccumulators / kParts < 6 ? kAccumulators / kParts : 6;

constexpr int tile_columns(int rows) {
    const int most = kAccumulators / (rows * kParts);
    return most >= 4 ? 4 : most >= 2 ? 2 : 1;
}

constexpr int kSoon = 1024; // bytes ahead of those in use that go on from the second cache into the first

// sums[r][c] += x[r * x_row + k * x_step] * y[c * y_column + k * y_step], 16 numbers of y each, for k < depth. As many
// bytes as are read of y are fetched into the second cache at `next`, one after the other; null: none.
template <int rows, int columns, class T>
EDGERAZOR_INLINE void multiply(const float* x, int64_t x_row, int64_t x_step, const T* y, int64_t y_column,
                               int64_t y_step, int64_t depth, const void* next, Sixteen (&sums)[rows][columns]) {
    constexpr int bytes = columns * 16 * (int)sizeof(T), lines = (bytes + 63) / 64;
    for (int64_t k = 0; k < depth; k++, x += x_step, y += y_step) {
        if (next != nullptr) {
            __builtin_prefetch((const char*)(y + k % columns * y_column) + kSoon);
            unroll<0, lines>(UNROLL(i) { __builtin_prefetch((const char*)next + k * bytes + i.value * 64, 0, 2); });
        }
        Sixteen column[columns];
        unroll<0, columns>(UNROLL(c) { column[c.value] = load(y + c.value * y_column); });
        unroll<0, rows>(UNROLL(r) {
            const Sixteen same = fill(x[r.value * x_row]);
            unroll<0, columns>(UNROLL(c) {
                sums[r.value][c.value] = multiply_add(same, column[c.value], sums[r.value][c.value]);
            });
        });
    }
}

template <int rows, int columns>
EDGERAZOR_INLINE void clear(Sixteen (&sums)[rows][columns]) {
    unroll<0, rows>(UNROLL(r) { unroll<0, columns>(UNROLL(c) { sums[r.value][c.value] = fill(0); }); });
}

} // namespace
