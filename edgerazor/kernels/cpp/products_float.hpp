// Products of a part of a matrix with activations as they are, included by `products.hpp`: the weights of a slab are
// made floats once for all tokens of a call. The order of the sums differs from one instruction set to another.
#pragma once
#include "sixteen.hpp"

namespace {

constexpr int kFloatBlocks = 4; // row blocks side by side
constexpr int kSlabColumns = 4 * kSlab;

struct FloatWorkspace {
    alignas(kVector) uint8_t bytes[kSlab * kVector];
    alignas(kVector) float levels[kFloatBlocks * kSlabColumns * kRows]; // [blocks, columns, rows]
    alignas(kVector) float scales[kFloatBlocks * kRows];
    alignas(kVector) float y[kTokenBlock * kFloatBlocks * kRows]; // [tokens, blocks, rows]
};

// Activations [tokens, 4 * quads] of which every group begins with a quad, as those of weights do; 0 in between.
struct FloatActivations {
    const float* x;
    int64_t stride;
};

int group_quads(const Geometry& geometry) { return (geometry.group + 3) / 4; }

void pad(const Geometry& geometry, const float* x, int64_t tokens, float* padded) {
    memset(padded, 0, sizeof(float) * tokens * geometry.quads * 4);
    for (int64_t token = 0; token < tokens; token++, x += geometry.columns, padded += (int64_t)geometry.quads * 4)
        for (int group = 0; group < geometry.groups; group++) {
            const int begin = group * geometry.group;
            memcpy(padded + (int64_t)group * group_quads(geometry) * 4, x + begin,
                   sizeof(float) * smaller(geometry.group, geometry.columns - begin));
        }
}

// Bytes of quads to floats: [quads, rows, 4] to [quads, 4, rows].
void to_levels(const uint8_t* bytes, int quads, int lowest, float* levels) {
    const Sixteen offset = fill(0.5f * (float)lowest);
    for (int q = 0; q < quads; q++, bytes += kVector) {
        const SixteenInts rows = load_ints(bytes);
        for (int j = 0; j < 4; j++, levels += kRows) {
            SixteenInts u;
            unroll<0, kParts>(UNROLL(i) { u.part[i.value] = rows.part[i.value] >> 8 * j & 255; });
            store(levels, to_floats(u) + offset);
        }
    }
}

// y += scales * (levels * x), for the rows of `columns` row blocks.
template <int tokens, int columns>
EDGERAZOR_INLINE void float_blocks(const float* x, int64_t stride, const float* levels, int depth, const float* scales,
                                   float* y) {
    Sixteen sums[tokens][columns];
    clear(sums);
    multiply(x, stride, 1, levels, kSlabColumns * kRows, kRows, depth, nullptr, sums);
    unroll<0, tokens>(UNROLL(t) {
        unroll<0, columns>(UNROLL(c) {
            float* at = y + (t.value * kFloatBlocks + c.value) * kRows;
            store(at, multiply_add(sums[t.value][c.value], load(scales + c.value * kRows), load(at)));
        });
    });
}

template <int tokens>
__attribute__((noinline)) void float_tile(const float* x, int64_t stride, const float* levels, int depth,
                                          const float* scales, int blocks, float* y) {
    constexpr int wide = tile_columns(tokens), size = kSlabColumns * kRows;
    int b = 0;
    for (; b + wide <= blocks; b += wide)
        float_blocks<tokens, wide>(x, stride, levels + b * size, depth, scales + b * kRows, y + b * kRows);
    for (; b < blocks; b++)
        float_blocks<tokens, 1>(x, stride, levels + b * size, depth, scales + b * kRows, y + b * kRows);
}

// The columns of quads [first, last), all of one group, which lie in the workspace from quad `begin` on.
void float_tiles(const FloatActivations& x, int begin, int first, int last, int tokens, int blocks,
                 FloatWorkspace& work) {
    const float* levels = work.levels + (int64_t)(first - begin) * 4 * kRows;
    for (int token = 0; token < tokens; token += kTileRows) {
        const int now = smaller(kTileRows, tokens - token);
        unroll<1, kTileRows + 1>(UNROLL(n) {
            if (now == n.value)
                float_tile<n.value>(x.x + token * x.stride + (int64_t)first * 4, x.stride, levels, (last - first) * 4,
                                    work.scales, blocks, work.y + (int64_t)token * kFloatBlocks * kRows);
        });
    }
}

// Up to kFloatBlocks row blocks times up to kTokenBlock tokens, into work.y.
template <int bits>
void float_row_blocks(const Geometry& geometry, const Part& part, const FloatActivations& x, int64_t block, int blocks,
                      int tokens, FloatWorkspace& work) {
    const int64_t block_bytes = codes_bytes(bits, geometry.quads), block_scales = (int64_t)geometry.groups * kRows;
    const int span = group_quads(geometry);
    memset(work.y, 0, sizeof(float) * tokens * kFloatBlocks * kRows);
    for (int begin = 0; begin < geometry.quads; begin += kSlab) {
        const int end = smaller(begin + kSlab, geometry.quads);
        for (int b = 0; b < blocks; b++) {
            unpack<bits>(part.codes + (block + b) * block_bytes, begin, end, work.bytes, kVector);
            to_levels(work.bytes, end - begin, part.lowest, work.levels + b * kSlabColumns * kRows);
        }
        for (int first = begin; first < end;) {
            const int group = first / span, last = smaller(end, (group + 1) * span);
            for (int b = 0; b < blocks; b++)
                store_floats(work.scales + b * kRows,
                             load_halves(part.scales + (block + b) * block_scales + (int64_t)group * kRows));
            float_tiles(x, begin, first, last, tokens, blocks, work);
            first = last;
        }
    }
}

template <int bits>
void linear_float_bits(const Geometry& geometry, const Part& part, int64_t tokens, const FloatActivations& x,
                       const Output& output, int64_t first, int64_t last, FloatWorkspace& work) {
    for (int64_t token = 0; token < tokens; token += kTokenBlock) {
        const int now = tokens - token < kTokenBlock ? (int)(tokens - token) : kTokenBlock;
        for (int64_t block = first; block < last; block += kFloatBlocks) {
            const int blocks = last - block < kFloatBlocks ? (int)(last - block) : kFloatBlocks;
            float_row_blocks<bits>(geometry, part, {x.x + token * x.stride, x.stride}, block, blocks, now, work);
            int64_t rows = part.count - block * kRows;
            if (rows > blocks * kRows) rows = blocks * kRows;
            for (int t = 0; t < now; t++)
                deliver(work.y + t * kFloatBlocks * kRows, (int)rows, block * kRows, part, output, token + t);
        }
    }
}

// Row blocks [first, last) of a part, times x [tokens, columns].
void linear_float(const Geometry& geometry, const Part& part, int64_t tokens, const float* x, const Output& output,
                  int64_t first, int64_t last) {
    const int64_t width = (int64_t)geometry.quads * 4;
    const bool same = width == geometry.columns; // no group ends within a quad
    FloatWorkspace* work;
    if (posix_memalign((void**)&work, kVector, sizeof *work + (same ? 0 : sizeof(float) * tokens * width)) != 0) abort();
    if (!same) pad(geometry, x, tokens, (float*)(work + 1));
    const FloatActivations activations = {same ? x : (const float*)(work + 1), width};
    unroll<0, 9>(UNROLL(bits) {
        if (part.bits == bits.value)
            linear_float_bits<bits.value>(geometry, part, tokens, activations, output, first, last, *work);
    });
    free(work);
}

} // namespace
