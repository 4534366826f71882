// The rotation of rows by a signed block Hadamard matrix: section "Rotation" of `packed/FORMAT.md`, to the bit.
//
// A pass loads some registers, adds and subtracts them for as many strides as they span, and stores them. The first one
// also applies the signs and the strides within a register, the last one the factor. With eight registers to a pass, a
// block of 512 takes two passes with AVX2 or AVX-512, and three with registers of four numbers.
//
// Signs come as bits: as floats, they would be read anew from a farther cache for every layer, since weights stream by.
#pragma once
#include "f32x16.hpp"

namespace {

constexpr int kPassRegisters = 8;  // of a pass: three strides
constexpr int kSmallestBlock = 16; // of those that registers compute; no shape that is in use has smaller ones

// Lane i of the result is lane i ^ stride of x.
template <int stride>
EDGERAZOR_INLINE Lanes swap_lanes(Lanes x) {
#if defined(__AVX512F__)
    if constexpr (stride == 1) return _mm512_permute_ps(x, 0xb1);
    if constexpr (stride == 2) return _mm512_permute_ps(x, 0x4e);
    if constexpr (stride == 4) return _mm512_shuffle_f32x4(x, x, 0xb1);
    if constexpr (stride == 8) return _mm512_shuffle_f32x4(x, x, 0x4e);
#elif defined(__AVX2__)
    if constexpr (stride == 1) return _mm256_permute_ps(x, 0xb1);
    if constexpr (stride == 2) return _mm256_permute_ps(x, 0x4e);
    if constexpr (stride == 4) return _mm256_permute2f128_ps(x, x, 1);
#elif defined(__aarch64__)
    if constexpr (stride == 1) return vrev64q_f32(x);
    if constexpr (stride == 2) return vextq_f32(x, x, 2);
#else
    if constexpr (stride == 1) return Lanes{x[1], x[0], x[3], x[2]};
    if constexpr (stride == 2) return Lanes{x[2], x[3], x[0], x[1]};
#endif
}

// x of the columns from `column` on, a multiple of kLanes, with the signs of these columns: a bit is 1 for -1, the first
// column's the lowest of its byte.
EDGERAZOR_INLINE Lanes apply_signs(Lanes x, const uint8_t* signs, int column) {
    constexpr int bytes = kLanes >= 8 ? kLanes / 8 : 1;
    uint32_t bits = 0;
    memcpy(&bits, signs + column / 8, bytes);
    if constexpr (kLanes < 8) bits >>= column % 8;
    UintLanes places;
    unroll<0, kLanes>(UNROLL(i) { places[i.value] = 31 - i.value; }); // how far each lane's bit is from the highest
    return (Lanes)((UintLanes)x ^ ((UintLanes{} + bits) << places & 0x80000000u));
}

EDGERAZOR_INLINE float apply_sign(float x, const uint8_t* signs, int column) {
    return signs[column / 8] >> column % 8 & 1 ? -x : x;
}

// 1 in the lanes whose number has the bit `stride` clear, -1 in the others.
template <int stride>
EDGERAZOR_INLINE Lanes alternating() {
    Lanes signs;
    unroll<0, kLanes>(UNROLL(i) { signs[i.value] = i.value & stride ? -1.0f : 1.0f; });
    return signs;
}

// The strides from `stride` on that are below the width of a register. x * 1 or x * -1 is exact, so the fused product
// and sum rounds just as the sum or difference would.
template <int stride>
EDGERAZOR_INLINE Lanes transform_lanes(Lanes x) {
    if constexpr (stride < kLanes) {
        return transform_lanes<2 * stride>(fmadd(x, alternating<stride>(), swap_lanes<stride>(x)));
    } else {
        return x;
    }
}

// The strides between registers, counted in registers, from `stride` on.
template <int stride, int count>
EDGERAZOR_INLINE void transform_registers(Lanes (&x)[count]) {
    if constexpr (stride < count) {
        unroll<0, count>(UNROLL(i) {
            if constexpr ((i.value & stride) == 0) {
                const Lanes first = x[i.value], second = x[i.value + stride];
                x[i.value] = first + second;
                x[i.value + stride] = first - second;
            }
        });
        transform_registers<2 * stride>(x);
    }
}

// The strides below count * kLanes. `signs` are used where `with_signs`.
template <int count, bool with_signs>
void first_pass(const float* x, int columns, const uint8_t* signs, float factor, float* out) {
    const Lanes factors = splat_lanes(factor);
    for (int begin = 0; begin < columns; begin += count * kLanes) {
        Lanes tile[count];
        unroll<0, count>(UNROLL(i) {
            const int at = begin + i.value * kLanes;
            const Lanes loaded = *(const UnalignedLanes*)(x + at);
            tile[i.value] = transform_lanes<1>(with_signs ? apply_signs(loaded, signs, at) : loaded);
        });
        transform_registers<1>(tile);
        unroll<0, count>(UNROLL(i) {
            *(UnalignedLanes*)(out + begin + i.value * kLanes) = tile[i.value] * factors;
        });
    }
}

// The strides from `stride`, at least the width of a register, to count / 2 * stride.
template <int count>
void later_pass(float* x, int columns, int stride, float factor) {
    const Lanes factors = splat_lanes(factor);
    for (int begin = 0; begin < columns; begin += count * stride)
        for (float* row = x + begin; row < x + begin + stride; row += kLanes) {
            Lanes tile[count];
            unroll<0, count>(UNROLL(i) { tile[i.value] = *(const UnalignedLanes*)(row + i.value * stride); });
            transform_registers<1>(tile);
            unroll<0, count>(UNROLL(i) { *(UnalignedLanes*)(row + i.value * stride) = tile[i.value] * factors; });
        }
}

// Blocks that are smaller than some registers.
inline void transform_small(float* x, int columns, int block, float factor) {
    for (int stride = 1; stride < block; stride *= 2)
        for (int begin = 0; begin < columns; begin += 2 * stride)
            for (int i = begin; i < begin + stride; i++) {
                const float first = x[i], second = x[i + stride];
                x[i] = first + second;
                x[i + stride] = first - second;
            }
    for (int i = 0; i < columns; i++) x[i] *= factor;
}

// The orthonormal transform of each block of a row, of x or of x times the signs.
template <bool with_signs>
void transform_blocks(const float* x, int columns, int block, const uint8_t* signs, float* out) {
    const float factor = (float)(1 / __builtin_sqrt((double)block));
    if (block < kSmallestBlock) {
        for (int i = 0; i < columns; i++) out[i] = with_signs ? apply_sign(x[i], signs, i) : x[i];
        return transform_small(out, columns, block, factor);
    }
    // A product with 1 changes nothing: all passes but the last.
    int stride = 0; // those below it are done
    unroll<0, 4>(UNROLL(log) {
        constexpr int count = 8 >> log.value;
        if (stride != 0 || block < count * kLanes) return;
        stride = count * kLanes;
        first_pass<count, with_signs>(x, columns, signs, stride == block ? factor : 1, out);
    });
    while (stride < block) {
        const int count = block / stride < kPassRegisters ? block / stride : kPassRegisters;
        const float last = count * stride == block ? factor : 1;
        if (count == 8) later_pass<8>(out, columns, stride, last);
        if (count == 4) later_pass<4>(out, columns, stride, last);
        if (count == 2) later_pass<2>(out, columns, stride, last);
        stride *= count;
    }
}

void rotate(const float* x, int columns, int block, const uint8_t* signs, float* out) {
    transform_blocks<true>(x, columns, block, signs, out);
}

void rotate_back(const float* x, int columns, int block, const uint8_t* signs, float* out) {
    transform_blocks<false>(x, columns, block, nullptr, out);
    for (int i = 0; i < columns; i++) out[i] = apply_sign(out[i], signs, i);
}

} // namespace
