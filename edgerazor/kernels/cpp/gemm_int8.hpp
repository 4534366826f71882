// The product of packed rows with the int8 activations of many tokens (a GEMM), included by `matmul.hpp`: codes are
// unpacked once for up to kTokenBlock tokens, slab by slab, and multiplied in tiles whose sums stay in registers. The
// last segment of whole tiles goes to the output from the registers: rows of the output lie kilobytes apart, so that each
// line misses the first cache, which the products of the next tile hide.
#pragma once
#include <stdlib.h>
#include <string.h>

namespace {

// The quads of a segment that lie in the unpacked slab, and the activations that they are multiplied by.
struct GemmPanel {
    const uint8_t* u; // [quads, kTileBlocks, 64]
    int quads;
    const int8_t* x; // of the first token
    int64_t x_stride;
    const float* x_scales; // of this segment and the first token
    const int32_t* x_sums;
    int64_t scale_stride; // from one token's scale and sum to the next one's
    const uint16_t* w_scales[kTileBlocks];
    int min_level_x2;
    bool begins_segment, ends_segment; // whether the panel holds the first and the last quad of its segment
    float* out;                        // of the first token, for the results of the last segment; null: they stay in y
    int64_t out_stride;
};

template <int max_code, int tokens>
__attribute__((noinline)) void gemm_tile(const GemmPanel& panel, float* y, int32_t* totals) {
    constexpr int blocks = kTileBlocks, width = blocks * kBlockRows;
    DotAccumulator<max_code> sums[tokens][blocks]; // reset without a loop, which would keep them in memory
    unroll<0, tokens>(UNROLL(t) { unroll<0, blocks>(UNROLL(b) { sums[t.value][b.value].reset(); }); });
    for (int q = 0; q < panel.quads;) {
        const int stop = q + smaller(panel.quads - q, DotAccumulator<max_code>::capacity);
        const uint8_t* u = panel.u + (int64_t)q * blocks * kVectorBytes;
        const int8_t* x = panel.x + (int64_t)q * 4;
        for (; q < stop; q++, u += blocks * kVectorBytes, x += 4) {
            u8x64 bytes[blocks];
            unroll<0, blocks>(UNROLL(b) { bytes[b.value] = load_to_register(u + b.value * kVectorBytes); });
            unroll<0, tokens>(UNROLL(t) {
                const i8x4 quad = broadcast(x + t.value * panel.x_stride);
                unroll<0, blocks>(UNROLL(b) { sums[t.value][b.value].add(bytes[b.value], quad); });
            });
        }
        unroll<0, tokens>(UNROLL(t) { unroll<0, blocks>(UNROLL(b) { sums[t.value][b.value].widen(); }); });
    }
    RowFloats w_scales[blocks];
    unroll<0, blocks>(UNROLL(b) { w_scales[b.value] = load_f16(panel.w_scales[b.value]); });
    unroll<0, tokens>(UNROLL(t) {
        const float x_scale = level_unit(panel.min_level_x2) * panel.x_scales[t.value * panel.scale_stride];
        const int x_sum = panel.x_sums[t.value * panel.scale_stride];
        unroll<0, blocks>(UNROLL(b) {
            constexpr int at = t.value * width + b.value * kBlockRows;
            RowSums dot = sums[t.value][b.value].total();
            if (!panel.begins_segment) dot = add_sums(dot, load_sums(totals + at));
            if (panel.ends_segment) {
                RowFloats results = load_floats(y + at);
                add_scaled(results, add_min_level(dot, panel.min_level_x2, x_sum), w_scales[b.value], x_scale);
                float* to = y + at;
                if (panel.out) to = panel.out + t.value * panel.out_stride + b.value * kBlockRows;
                store_floats(to, results);
            } else {
                store_sums(totals + at, dot);
            }
        });
    });
}

// The panel times `tokens` tokens, tile by tile.
template <int max_code>
void gemm_tiles(GemmPanel panel, int tokens, float* y, int32_t* totals) {
    constexpr int width = kTileBlocks * kBlockRows;
    for (; tokens > 0; tokens -= kTileTokens) {
        const int count = smaller(tokens, kTileTokens);
        unroll<1, kTileTokens + 1>(UNROLL(n) {
            if (count == n.value) gemm_tile<max_code, n.value>(panel, y, totals);
        });
        panel.x += count * panel.x_stride;
        panel.x_scales += count * panel.scale_stride;
        panel.x_sums += count * panel.scale_stride;
        if (panel.out) panel.out += count * panel.out_stride;
        y += count * width;
        totals += count * width;
    }
}

struct GemmWorkspace {
    alignas(kVectorBytes) uint8_t slab[kSlabQuads * kTileBlocks * kVectorBytes];  // [quads, blocks, 64]
    alignas(kVectorBytes) float y[kTokenBlock * kTileBlocks * kBlockRows];        // [tokens, blocks, rows]
    alignas(kVectorBytes) int32_t totals[kTokenBlock * kTileBlocks * kBlockRows]; // of a segment that goes on
};

// Unpacks the quads [begin, end) of up to kTileBlocks row blocks side by side, and leaves the places of missing row
// blocks as they are.
template <int bits>
void unpack_slab(const uint8_t* codes, int64_t block_bytes, int blocks, int begin, int end, uint8_t* slab) {
    for (int b = 0; b < blocks; b++)
        unpack<bits>(codes + b * block_bytes, begin, end, slab + b * kVectorBytes, kTileBlocks * kVectorBytes);
}

// Up to kTileBlocks row blocks times up to kTokenBlock tokens, from `token` on, into `out`, or where that is null into
// work.y.
template <int bits>
void gemm_row_blocks(const RowLayout& layout, const FormatRows& rows, const QuantizedActivations& x, int64_t block,
                     int blocks, int64_t token, int tokens, GemmWorkspace& work, float* out, int64_t out_stride) {
    const int64_t block_bytes = codes_bytes(bits, layout.quads), block_scales = (int64_t)layout.groups * kBlockRows;
    const uint16_t* scales = rows.scales + block * block_scales;
    memset(work.y, 0, sizeof(float) * tokens * kTileBlocks * kBlockRows);
    int next = 0; // the first segment that is not finished
    for (int begin = 0; begin < layout.quads; begin += kSlabQuads) {
        const int end = smaller(begin + kSlabQuads, layout.quads);
        unpack_slab<bits>(rows.codes + block * block_bytes, block_bytes, blocks, begin, end, work.slab);
        for (; next < layout.segment_count && layout.segments[next].first_quad < end; next++) {
            const Segment& segment = layout.segments[next];
            const int first = larger(begin, segment.first_quad);
            const int last = smaller(end, segment.first_quad + segment.quads);
            GemmPanel panel;
            panel.u = work.slab + (int64_t)(first - begin) * kTileBlocks * kVectorBytes;
            panel.quads = last - first;
            panel.x_stride = (int64_t)layout.x_quads * 4;
            panel.x = x.codes + token * panel.x_stride + (int64_t)(segment.x_quad + first - segment.first_quad) * 4;
            panel.scale_stride = layout.segment_count;
            panel.x_scales = x.scales + token * panel.scale_stride + next;
            panel.x_sums = x.sums + token * panel.scale_stride + next;
            // The results of missing row blocks are never stored; they use the scales of the last row block.
            for (int b = 0; b < kTileBlocks; b++)
                panel.w_scales[b] =
                    scales + smaller(b, blocks - 1) * block_scales + (int64_t)segment.group * kBlockRows;
            panel.min_level_x2 = rows.min_level_x2;
            panel.begins_segment = first == segment.first_quad;
            panel.ends_segment = last == segment.first_quad + segment.quads;
            panel.out = next + 1 == layout.segment_count ? out : nullptr;
            panel.out_stride = out_stride;
            gemm_tiles<max_code_of(bits)>(panel, tokens, work.y, work.totals);
            if (!panel.ends_segment) break;
        }
    }
}

// Row blocks [first, last) times all tokens.
template <int bits>
void gemm(const RowLayout& layout, const FormatRows& rows, const QuantizedActivations& x, const MatmulOutput& output,
          int64_t first, int64_t last) {
    if (x.tokens == 0) return;
    GemmWorkspace* work;
    if (posix_memalign((void**)&work, kVectorBytes, sizeof(GemmWorkspace)) != 0) abort();
    memset(work->slab, 0, sizeof work->slab);
    // Every block of tokens unpacks all weights, so there are as few as possible, of about equal length in whole tiles.
    const int64_t token_blocks = (x.tokens + kTokenBlock - 1) / kTokenBlock, stride = token_blocks * kTileTokens;
    const int64_t block_tokens = (x.tokens + stride - 1) / stride * kTileTokens;
    for (int64_t token = 0; token < x.tokens; token += block_tokens) {
        const int tokens = x.tokens - token < block_tokens ? (int)(x.tokens - token) : (int)block_tokens;
        for (int64_t block = first; block < last; block += kTileBlocks) {
            const int blocks = last - block < kTileBlocks ? (int)(last - block) : kTileBlocks;
            int64_t count = rows.count - block * kBlockRows;
            if (count > blocks * kBlockRows) count = blocks * kBlockRows;
            const bool whole = count == kTileBlocks * kBlockRows && !rows.rows && !output.bias;
            float* const out = whole ? output.y + token * output.stride + block * kBlockRows : nullptr;
            gemm_row_blocks<bits>(layout, rows, x, block, blocks, token, tokens, *work, out, output.stride);
            if (whole) continue;
            for (int t = 0; t < tokens; t++)
                store_rows(work->y + t * kTileBlocks * kBlockRows, (int)count, block * kBlockRows, rows, output,
                           token + t);
        }
    }
    free(work);
}

} // namespace
