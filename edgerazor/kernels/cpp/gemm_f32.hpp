// The product of packed rows with float32 activations, included by `matmul.hpp`: the codes of a slab become float
// levels once for all tokens of a call. The order of the sums differs from one instruction set to another.
#pragma once
#include <stdlib.h>
#include <string.h>

#include "f32x16.hpp"

namespace {

constexpr int kF32TileBlocks = 4; // row blocks side by side
constexpr int kSlabColumns = 4 * kSlabQuads;

struct F32Workspace {
    alignas(kVectorBytes) uint8_t u[kSlabQuads * kVectorBytes];                        // [quads, rows, 4]
    alignas(kVectorBytes) float levels[kF32TileBlocks * kSlabColumns * kBlockRows];    // [blocks, columns, rows]
    alignas(kVectorBytes) float scales[kF32TileBlocks * kBlockRows];
    alignas(kVectorBytes) float y[kTokenBlock * kF32TileBlocks * kBlockRows];          // [tokens, blocks, rows]
};

// Activations [tokens, 4 * quads] in which every group begins with a quad, as those of the weights do, with 0 in
// between.
struct F32Activations {
    const float* x;
    int64_t stride;
};

int group_quads(const RowLayout& layout) { return (layout.group_size + 3) / 4; }

void pad_groups(const RowLayout& layout, const float* x, int64_t tokens, float* padded) {
    memset(padded, 0, sizeof(float) * tokens * layout.quads * 4);
    for (int64_t token = 0; token < tokens; token++, x += layout.columns, padded += (int64_t)layout.quads * 4)
        for (int group = 0; group < layout.groups; group++) {
            const int begin = group * layout.group_size;
            memcpy(padded + (int64_t)group * group_quads(layout) * 4, x + begin,
                   sizeof(float) * smaller(layout.group_size, layout.columns - begin));
        }
}

// Codes u [quads, rows, 4] to levels [quads, 4, rows].
void to_levels(const uint8_t* u, int quads, int min_level_x2, float* levels) {
    const f32x16 min_level = splat(0.5f * (float)min_level_x2);
    for (int q = 0; q < quads; q++, u += kVectorBytes) {
        const i32x16 rows = load_i32(u);
        for (int j = 0; j < 4; j++, levels += kBlockRows) {
            i32x16 codes;
            unroll<0, kRegisters>(UNROLL(i) { codes.reg[i.value] = rows.reg[i.value] >> 8 * j & 255; });
            store(levels, to_f32(codes) + min_level);
        }
    }
}

// y += scales * (levels * x), for the rows of `columns` row blocks.
template <int tokens, int columns>
EDGERAZOR_INLINE void f32_tile_columns(const float* x, int64_t stride, const float* levels, int depth,
                                       const float* scales, float* y) {
    f32x16 sums[tokens][columns];
    clear_tile(sums);
    multiply_tile(x, stride, 1, levels, kSlabColumns * kBlockRows, kBlockRows, depth, nullptr, sums);
    unroll<0, tokens>(UNROLL(t) {
        unroll<0, columns>(UNROLL(c) {
            float* at = y + (t.value * kF32TileBlocks + c.value) * kBlockRows;
            store(at, fmadd(sums[t.value][c.value], load(scales + c.value * kBlockRows), load(at)));
        });
    });
}

template <int tokens>
__attribute__((noinline)) void f32_tile(const float* x, int64_t stride, const float* levels, int depth,
                                        const float* scales, int blocks, float* y) {
    constexpr int wide = tile_columns(tokens), size = kSlabColumns * kBlockRows;
    int b = 0;
    for (; b + wide <= blocks; b += wide)
        f32_tile_columns<tokens, wide>(x, stride, levels + b * size, depth, scales + b * kBlockRows,
                                       y + b * kBlockRows);
    for (; b < blocks; b++)
        f32_tile_columns<tokens, 1>(x, stride, levels + b * size, depth, scales + b * kBlockRows, y + b * kBlockRows);
}

// The columns of quads [first, last), all of one group; the workspace holds the levels from quad `begin` on.
void f32_tiles(const F32Activations& x, int begin, int first, int last, int tokens, int blocks, F32Workspace& work) {
    const float* levels = work.levels + (int64_t)(first - begin) * 4 * kBlockRows;
    for (int token = 0; token < tokens; token += kTileRows) {
        const int count = smaller(kTileRows, tokens - token);
        unroll<1, kTileRows + 1>(UNROLL(n) {
            if (count == n.value)
                f32_tile<n.value>(x.x + token * x.stride + (int64_t)first * 4, x.stride, levels, (last - first) * 4,
                                  work.scales, blocks, work.y + (int64_t)token * kF32TileBlocks * kBlockRows);
        });
    }
}

// Up to kF32TileBlocks row blocks times up to kTokenBlock tokens, into work.y.
template <int bits>
void f32_row_blocks(const RowLayout& layout, const FormatRows& rows, const F32Activations& x, int64_t block, int blocks,
                    int tokens, F32Workspace& work) {
    const int64_t block_bytes = codes_bytes(bits, layout.quads), block_scales = (int64_t)layout.groups * kBlockRows;
    const int span = group_quads(layout);
    memset(work.y, 0, sizeof(float) * tokens * kF32TileBlocks * kBlockRows);
    for (int begin = 0; begin < layout.quads; begin += kSlabQuads) {
        const int end = smaller(begin + kSlabQuads, layout.quads);
        for (int b = 0; b < blocks; b++) {
            unpack<bits>(rows.codes + (block + b) * block_bytes, begin, end, work.u, kVectorBytes);
            to_levels(work.u, end - begin, rows.min_level_x2, work.levels + b * kSlabColumns * kBlockRows);
        }
        for (int first = begin; first < end;) {
            const int group = first / span, last = smaller(end, (group + 1) * span);
            for (int b = 0; b < blocks; b++)
                store_floats(work.scales + b * kBlockRows,
                             load_f16(rows.scales + (block + b) * block_scales + (int64_t)group * kBlockRows));
            f32_tiles(x, begin, first, last, tokens, blocks, work);
            first = last;
        }
    }
}

template <int bits>
void linear_float_bits(const RowLayout& layout, const FormatRows& rows, int64_t tokens, const F32Activations& x,
                       const MatmulOutput& output, int64_t first, int64_t last, F32Workspace& work) {
    for (int64_t token = 0; token < tokens; token += kTokenBlock) {
        const int token_count = tokens - token < kTokenBlock ? (int)(tokens - token) : kTokenBlock;
        for (int64_t block = first; block < last; block += kF32TileBlocks) {
            const int blocks = last - block < kF32TileBlocks ? (int)(last - block) : kF32TileBlocks;
            f32_row_blocks<bits>(layout, rows, {x.x + token * x.stride, x.stride}, block, blocks, token_count, work);
            int64_t count = rows.count - block * kBlockRows;
            if (count > blocks * kBlockRows) count = blocks * kBlockRows;
            for (int t = 0; t < token_count; t++)
                store_rows(work.y + t * kF32TileBlocks * kBlockRows, (int)count, block * kBlockRows, rows, output,
                           token + t);
        }
    }
}

// Row blocks [first, last) times x [tokens, columns].
void linear_float(const RowLayout& layout, const FormatRows& rows, int64_t tokens, const float* x,
                  const MatmulOutput& output, int64_t first, int64_t last) {
    const int64_t width = (int64_t)layout.quads * 4;
    const bool padded = width != layout.columns; // a group ends within a quad
    F32Workspace* work;
    if (posix_memalign((void**)&work, kVectorBytes, sizeof *work + (padded ? sizeof(float) * tokens * width : 0)) != 0)
        abort();
    if (padded) pad_groups(layout, x, tokens, (float*)(work + 1));
    const F32Activations activations = {padded ? (const float*)(work + 1) : x, width};
    unroll<0, 9>(UNROLL(bits) {
        if (rows.bits == bits.value)
            linear_float_bits<bits.value>(layout, rows, tokens, activations, output, first, last, *work);
    });
    free(work);
}

} // namespace
