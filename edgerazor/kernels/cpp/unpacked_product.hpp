// Products with matrices that are not packed, such as the router of a mixture of experts, and weighted sums. Included by
// `float_kernels.cpp`, once for each instruction set.
#pragma once
#include <stdint.h>

#include "f32x16.hpp"
#include "float_kernels.hpp"
#include "vector_math.hpp"

namespace {

using namespace edgerazor;

// Every product is added to the one sum of its token and row in the order of the columns, whatever the tile, so that a
// token has the same results in every batch.
template <int tokens, int blocks, class T>
EDGERAZOR_INLINE void unpacked_tile(const UnpackedArgs& args, const T* rows, int64_t token, int64_t block) {
    f32x16 sums[tokens][blocks];
    clear_tile(sums);
    multiply_tile(args.x + token * args.columns, args.columns, 1, rows + block * args.columns * 16, args.columns * 16,
                  16, args.columns, nullptr, sums);
    unroll<0, tokens>(UNROLL(t) {
        unroll<0, blocks>(UNROLL(b) {
            store(args.out + (token + t.value) * args.out_stride + (block + b.value) * 16, sums[t.value][b.value]);
        });
    });
}

template <int tokens, class T>
__attribute__((noinline)) void unpacked_tokens(const UnpackedArgs& args, const T* rows, int64_t token) {
    constexpr int wide = tile_columns(tokens);
    int64_t block = 0;
    for (; block + wide <= args.blocks; block += wide) unpacked_tile<tokens, wide>(args, rows, token, block);
    for (; block < args.blocks; block++) unpacked_tile<tokens, 1>(args, rows, token, block);
}

template <class T>
void multiply_rows(const UnpackedArgs& args, const T* rows) {
    for (int64_t token = 0; token < args.tokens; token += kTileRows) {
        const int count = (int)smaller(kTileRows, args.tokens - token);
        unroll<1, kTileRows + 1>(UNROLL(n) {
            if (count == n.value) unpacked_tokens<n.value>(args, rows, token);
        });
    }
}

void multiply_unpacked(const UnpackedArgs& args) {
    if (args.half)
        multiply_rows(args, (const bfloat16*)args.rows);
    else
        multiply_rows(args, (const float*)args.rows);
}

void add_scaled(float* x, const float* y, float factor, int64_t count) {
    for (int64_t i = 0; i < count; i += 16)
        store_partial(x + i, count - i, fmadd(load_partial(y + i, count - i, 0), splat(factor),
                                              load_partial(x + i, count - i, 0)));
}

} // namespace
