// `f32x16`, a vector of sixteen floats in one to four registers of the instruction set, and the register tile of a
// matrix product of such vectors. It uses the vector extensions of gcc and clang, and intrinsics where the compilers do
// not find the instruction by themselves.
#pragma once
#include <stdint.h>
#include <string.h>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "compiler.hpp"
#include "rounding.hpp"

namespace {

// kLanes: floats of a register; kAccumulators: registers that the sums of a tile may take.
#if defined(__AVX512F__)
constexpr int kLanes = 16, kAccumulators = 24; // of 32 registers
#elif defined(__AVX2__)
constexpr int kLanes = 8, kAccumulators = 12; // of 16 registers
#elif defined(__aarch64__)
constexpr int kLanes = 4, kAccumulators = 20; // of 32 registers, of which broadcast numbers take some
#else
constexpr int kLanes = 4, kAccumulators = 12;
#endif
constexpr int kRegisters = 16 / kLanes;

typedef float Lanes __attribute__((vector_size(4 * kLanes)));
typedef float UnalignedLanes __attribute__((vector_size(4 * kLanes), aligned(4), may_alias)); // for loads and stores
typedef int32_t IntLanes __attribute__((vector_size(4 * kLanes)));
typedef uint32_t UintLanes __attribute__((vector_size(4 * kLanes)));

struct f32x16 { Lanes reg[kRegisters]; };
struct i32x16 { IntLanes reg[kRegisters]; };
struct bfloat16 { uint16_t bits; }; // the upper half of a float

// The vector whose registers are function(Constant<number of the register>).
template <class Function>
EDGERAZOR_INLINE f32x16 map_registers(Function&& function) {
    f32x16 result;
    unroll<0, kRegisters>(UNROLL(i) { result.reg[i.value] = function(i); });
    return result;
}

// a * b + sum
EDGERAZOR_INLINE Lanes fmadd(Lanes a, Lanes b, Lanes sum) {
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

EDGERAZOR_INLINE Lanes splat_lanes(float x) { return x - Lanes{}; } // x + 0 would turn -0 into 0

EDGERAZOR_INLINE f32x16 splat(float x) {
    return map_registers(UNROLL() { return splat_lanes(x); });
}

EDGERAZOR_INLINE f32x16 operator+(f32x16 a, f32x16 b) {
    return map_registers(UNROLL(i) { return a.reg[i.value] + b.reg[i.value]; });
}

EDGERAZOR_INLINE f32x16 operator-(f32x16 a, f32x16 b) {
    return map_registers(UNROLL(i) { return a.reg[i.value] - b.reg[i.value]; });
}

EDGERAZOR_INLINE f32x16 operator*(f32x16 a, f32x16 b) {
    return map_registers(UNROLL(i) { return a.reg[i.value] * b.reg[i.value]; });
}

EDGERAZOR_INLINE f32x16 operator/(f32x16 a, f32x16 b) {
    return map_registers(UNROLL(i) { return a.reg[i.value] / b.reg[i.value]; });
}

EDGERAZOR_INLINE f32x16 fmadd(f32x16 a, f32x16 b, f32x16 sum) {
    return map_registers(UNROLL(i) { return fmadd(a.reg[i.value], b.reg[i.value], sum.reg[i.value]); });
}

// The larger one of a and b in each lane; b where a is NaN.
EDGERAZOR_INLINE f32x16 max(f32x16 a, f32x16 b) {
    return map_registers(UNROLL(i) { return a.reg[i.value] > b.reg[i.value] ? a.reg[i.value] : b.reg[i.value]; });
}

// x, but at least `low` and at most `high`; NaN stays NaN.
EDGERAZOR_INLINE f32x16 clamp(f32x16 x, float low, float high) {
    const Lanes lows = splat_lanes(low), highs = splat_lanes(high);
    return map_registers(UNROLL(i) {
        const Lanes below = x.reg[i.value] > highs ? highs : x.reg[i.value];
        return below < lows ? lows : below;
    });
}

EDGERAZOR_INLINE float reduce_max(f32x16 x) {
    Lanes lanes = x.reg[0];
    unroll<1, kRegisters>(UNROLL(i) { lanes = lanes > x.reg[i.value] ? lanes : x.reg[i.value]; });
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

// The nearest integers of small numbers, ties to even; 0 is never negative.
EDGERAZOR_INLINE Lanes round_lanes(Lanes x) { return (x + kRoundShift) - kRoundShift; }

// Register by register, because gcc copies a whole struct through memory in smaller pieces.
EDGERAZOR_INLINE f32x16 load(const float* p) {
    return map_registers(UNROLL(i) { return *(const UnalignedLanes*)(p + i.value * kLanes); });
}

EDGERAZOR_INLINE void store(float* p, f32x16 x) {
    unroll<0, kRegisters>(UNROLL(i) { *(UnalignedLanes*)(p + i.value * kLanes) = x.reg[i.value]; });
}

EDGERAZOR_INLINE float reduce_add(f32x16 x) {
    float lanes[16], sum = 0;
    store(lanes, x);
    for (int i = 0; i < 16; i++) sum += lanes[i];
    return sum;
}

EDGERAZOR_INLINE f32x16 load(const int8_t* p) {
#if defined(__AVX512F__)
    return {{_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)))}};
#elif defined(__AVX2__)
    return map_registers(UNROLL(i) {
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

EDGERAZOR_INLINE f32x16 load(const bfloat16* p) {
#if defined(__AVX512F__)
    const __m512i bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
    return {{(Lanes)_mm512_slli_epi32(bits, 16)}};
#elif defined(__AVX2__)
    return map_registers(UNROLL(i) {
        const __m128i half = _mm_loadu_si128((const __m128i*)(p + 8 * i.value));
        return (Lanes)_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16);
    });
#elif defined(__aarch64__)
    return map_registers(UNROLL(i) { return (Lanes)vshlq_n_u32(vmovl_u16(vld1_u16((const uint16_t*)(p + 4 * i.value))), 16); });
#else
    uint32_t bits[16];
    for (int i = 0; i < 16; i++) bits[i] = (uint32_t)p[i].bits << 16;
    float x[16];
    memcpy(x, bits, sizeof x);
    return load(x);
#endif
}

EDGERAZOR_INLINE i32x16 load_i32(const void* p) {
    i32x16 x;
    unroll<0, kRegisters>(UNROLL(i) { x.reg[i.value] = (IntLanes)((const UnalignedLanes*)p)[i.value]; });
    return x;
}

EDGERAZOR_INLINE f32x16 to_f32(i32x16 x) {
    return map_registers(UNROLL(i) { return __builtin_convertvector(x.reg[i.value], Lanes); });
}

// The register tile of a matrix product has at most kTileRows rows, and the fewer rows, the more columns of 16 numbers.
constexpr int kTileRows = kAccumulators / kRegisters < 6 ? kAccumulators / kRegisters : 6;

constexpr int tile_columns(int rows) {
    const int most = kAccumulators / (rows * kRegisters);
    return most >= 4 ? 4 : most >= 2 ? 2 : 1;
}

constexpr int kL1Ahead = 1024; // bytes ahead of those in use, which move on from the second cache into the first

// sums[r][c] += x[r * x_row + k * x_step] * y[c * y_column + k * y_step], with 16 numbers of y each, for all k < depth.
// Prefetches as many bytes as it reads of y, from `next` on, into the second cache; none where `next` is null.
template <int rows, int columns, class T>
EDGERAZOR_INLINE void multiply_tile(const float* x, int64_t x_row, int64_t x_step, const T* y, int64_t y_column,
                                    int64_t y_step, int64_t depth, const void* next, f32x16 (&sums)[rows][columns]) {
    constexpr int bytes = columns * 16 * (int)sizeof(T), lines = (bytes + 63) / 64;
    for (int64_t k = 0; k < depth; k++, x += x_step, y += y_step) {
        if (next != nullptr) {
            __builtin_prefetch((const char*)(y + k % columns * y_column) + kL1Ahead);
            unroll<0, lines>(UNROLL(i) { __builtin_prefetch((const char*)next + k * bytes + i.value * 64, 0, 2); });
        }
        f32x16 column[columns];
        unroll<0, columns>(UNROLL(c) { column[c.value] = load(y + c.value * y_column); });
        unroll<0, rows>(UNROLL(r) {
            const f32x16 factor = splat(x[r.value * x_row]);
            unroll<0, columns>(UNROLL(c) {
                sums[r.value][c.value] = fmadd(factor, column[c.value], sums[r.value][c.value]);
            });
        });
    }
}

template <int rows, int columns>
EDGERAZOR_INLINE void clear_tile(f32x16 (&sums)[rows][columns]) {
    unroll<0, rows>(UNROLL(r) { unroll<0, columns>(UNROLL(c) { sums[r.value][c.value] = splat(0); }); });
}

} // namespace
