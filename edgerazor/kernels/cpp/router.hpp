// The router of a mixture of experts, and the weighted sum of what experts give. Included by `float_kernels.cpp`, once
// for each instruction set.
#pragma once
#include <stdint.h>

#include "f32x16.hpp"
#include "float_kernels.hpp"
#include "vector_math.hpp"

namespace {

using namespace edgerazor;

// Every product is added to the one sum of its token and expert in the order of the columns, whatever the tile, so that
// a token has the same scores in every batch.
template <int tokens, int blocks>
EDGERAZOR_INLINE void score_tile(const RouterArgs& args, int64_t token, int64_t block) {
    f32x16 sums[tokens][blocks];
    clear_tile(sums);
    multiply_tile(args.x + token * args.columns, args.columns, 1, args.rows + block * args.columns * 16,
                  args.columns * 16, 16, args.columns, nullptr, sums);
    unroll<0, tokens>(UNROLL(t) {
        unroll<0, blocks>(UNROLL(b) {
            store(args.out + (token + t.value) * args.out_stride + (block + b.value) * 16, sums[t.value][b.value]);
        });
    });
}

template <int tokens>
__attribute__((noinline)) void score_tokens(const RouterArgs& args, int64_t token) {
    constexpr int wide = tile_columns(tokens);
    int64_t block = 0;
    for (; block + wide <= args.blocks; block += wide) score_tile<tokens, wide>(args, token, block);
    for (; block < args.blocks; block++) score_tile<tokens, 1>(args, token, block);
}

void score_experts(const RouterArgs& args) {
    for (int64_t token = 0; token < args.tokens; token += kTileRows) {
        const int count = (int)smaller(kTileRows, args.tokens - token);
        unroll<1, kTileRows + 1>(UNROLL(n) {
            if (count == n.value) score_tokens<n.value>(args, token);
        });
    }
}

void add_scaled(float* x, const float* y, float factor, int64_t count) {
    for (int64_t i = 0; i < count; i += 16)
        store_partial(x + i, count - i, fmadd(load_partial(y + i, count - i, 0), splat(factor),
                                              load_partial(x + i, count - i, 0)));
}

} // namespace
