// Matrix products with packed rows, written once for all instruction sets. The file of an instruction set defines the
// vectors below and what they can do, and then includes this file, which defines the functions of `MatmulKernels`:
// `linear` (gemv_int8.hpp for one token, gemv_tokens.hpp for a few, gemm_int8.hpp for more), `linear_float` (gemm_f32.hpp) and `expand_ternary`
// (unpack_codes.hpp).
//
//   u8x64                     64 bytes: a quad of 16 rows, or a vector as it is stored
//     load, store; load_to_register (stays in a register while a tile uses it)
//     extract_bits<shift, width>(bytes): that field of each byte; combine_bits<shift>(low, high) = low | high << shift
//   i8x4 broadcast(x)         four activations, for all 16 rows
//   RowSums                   16 integers, one for each row of the block
//     zero_sums(), splat_sums(number), load_sums, store_sums, add_sums
//   DotAccumulator<max_code>  dot products of u with x for u up to `max_code`
//     reset(), add(u8x64, i8x4), widen() at the latest after `capacity` quads, total()
//     accumulator_bound(max_code): the `max_code` of the accumulator that serves codes up to this one
//   Trits unpack_trits(bytes) the five base-3 digits of each byte of a vector; digit<f>(Trits) is one as u8x64
//   TernaryDot                dot products of base-3 digits with x, of at most 64 quads
//     add<f>(Trits, x), add_2bit<f>(u8x64 of 2-bit fields, x), take(): the total since the last take or the beginning
//   RowFloats                 16 floats, one for each row of the block
//     zero_floats(), load_floats, store_floats, load_f16
//     add_scaled(y, sums, w_scales, x_scale): y += float(sums) * (x_scale * w_scales)
//   kTileBlocks, kTileTokens  size of the register tile of a GEMM
//   kGemvTokens               tokens of a GEMV of several, of which kDotTokens may have a TernaryDot each that holds a
//                             whole segment; kFewTokens: up to which it is faster than a GEMM
//   kUnpackAhead              whether there are registers for the codes of the vector that comes next
//   kChains                   independent accumulators of a GEMV, which hide the latency of an addition
//
// Every `add_scaled` rounds the same numbers in the same order, so that all instruction sets give the same bits as
// `reference.linear`, for one token and for many.
#pragma once
#include <stdlib.h>
#include <string.h>

#include "compiler.hpp"
#include "matmul_kernels.hpp"

namespace {

using namespace edgerazor;

constexpr int kTokenBlock = 240; // tokens whose results stay in the cache: a multiple of kTileTokens, whatever that is

// From the dot product of u with x to that of the levels with x, in units of level_unit: whole where levels are whole.
EDGERAZOR_INLINE RowSums add_min_level(RowSums dot, int min_level_x2, int x_sum) {
    return min_level_x2 % 2 == 0 ? add_sums(dot, splat_sums(min_level_x2 / 2 * x_sum))
                                 : add_sums(add_sums(dot, dot), splat_sums(min_level_x2 * x_sum));
}

EDGERAZOR_INLINE float level_unit(int min_level_x2) { return min_level_x2 % 2 == 0 ? 1.0f : 0.5f; }

// Writes the results of `count` consecutive rows, from `first` on, of one token to their places in the output.
inline void store_rows(const float* results, int count, int64_t first, const FormatRows& rows,
                       const MatmulOutput& output, int64_t token) {
    float* y = output.y + token * output.stride;
    if (count == kBlockRows && !rows.rows && !output.bias) {
        memcpy(y + first, results, kBlockRows * sizeof(float));
        return;
    }
    for (int i = 0; i < count; i++) {
        const int64_t row = rows.rows ? rows.rows[first + i] : first + i;
        y[row] = output.bias ? results[i] + output.bias[row] : results[i];
    }
}

} // namespace

#include "unpack_codes.hpp"
#include "gemv_int8.hpp"
#include "gemv_tokens.hpp"
#include "gemm_int8.hpp"
#include "gemm_f32.hpp"

namespace {

template <int bits>
void linear_bits(const RowLayout& layout, const FormatRows& rows, const QuantizedActivations& x,
                 const MatmulOutput& output, int64_t first, int64_t last) {
    if (x.tokens == 1) {
        gemv<bits>(layout, rows, x, output, first, last);
    } else if (!few_tokens<bits>(layout, rows, x, output, first, last)) {
        gemm<bits>(layout, rows, x, output, first, last);
    }
}

void linear(const RowLayout& layout, const FormatRows& rows, const QuantizedActivations& x, const MatmulOutput& output,
            int64_t first, int64_t last) {
    unroll<0, 9>(UNROLL(bits) {
        if (rows.bits == bits.value) linear_bits<bits.value>(layout, rows, x, output, first, last);
    });
}

// Of several ways to read all words, this one was the fastest.
uint64_t read(const uint64_t* words, int64_t count) {
    uint64_t sums[8] = {};
    int64_t i = 0;
    for (; i + 8 <= count; i += 8) { // a cache line
        __builtin_prefetch(words + i + 512, 0, 2);
        for (int k = 0; k < 8; k++) sums[k] ^= words[i + k];
    }
    for (; i < count; i++) sums[0] ^= words[i];
    return sums[0] ^ sums[1] ^ sums[2] ^ sums[3] ^ sums[4] ^ sums[5] ^ sums[6] ^ sums[7];
}

} // namespace
