// The product of packed rows with the int8 activations of a few tokens, included by `matmul.hpp`: as in a GEMV, codes go
// from memory to registers and into sums at once, but into those of up to kGemvTokens tokens. A row block that more
// tokens need is read again from the first cache. A GEMM's detour through a slab of unpacked codes only pays off for
// many tokens.
#pragma once

namespace {

constexpr int kFewTokens = 4 * kGemvTokens; // up to which it is faster than a GEMM

// Tokens of a group: fewer for codes of several bit planes, each size of which takes the compiler long.
constexpr int group_tokens(int bits) { return (bits & (bits - 1)) == 0 ? kGemvTokens : smaller(kGemvTokens, 4); }

// A row block and the activations of some tokens.
struct GemvTokens {
    const RowLayout& layout;
    const uint8_t* w;
    const uint16_t* w_scales;
    const int8_t* x; // of the first token
    int64_t x_stride;
    const float* x_scales; // of the first token
    const int32_t* x_sums;
    int min_level_x2;
};

// Whether the functions below serve the layout: every segment consists of whole chunks.
template <int bits>
bool has_whole_chunks(const RowLayout& layout) {
    constexpr int chunk = chunk_quads(bits);
    return layout.uniform_quads != 0 && layout.uniform_quads % chunk == 0 && layout.quads % chunk == 0;
}

// Adds the dot products of a quad.
template <int tokens, class Sums>
EDGERAZOR_INLINE void add_quad(Sums* sums, u8x64 u, const int8_t* x, int64_t x_stride) {
    unroll<0, tokens>(UNROLL(t) { sums[t.value].add(u, broadcast(x + t.value * x_stride)); });
}

// Adds the dot products of a whole ternary chunk.
template <int tokens, class Sums>
EDGERAZOR_INLINE void add_ternary_chunk(Sums* sums, const uint8_t* w, const int8_t* x, int64_t x_stride) {
    const uint8_t* const end = w + 12 * kVectorBytes;
    EDGERAZOR_ROLLED for (; w < end; w += kVectorBytes, x += 20) {
        const Trits five = unpack_trits(load(prefetch_ahead(w)));
        unroll<0, 5>(UNROLL(f) { add_quad<tokens>(sums, digit<f.value>(five), x + f.value * 4, x_stride); });
    }
    const u8x64 fields = load(prefetch_ahead(end));
    unroll<0, 4>(UNROLL(f) {
        add_quad<tokens>(sums, extract_bits<2 * f.value, 2>(fields), x + f.value * 4, x_stride);
    });
}

// Adds the dot products of a whole chunk of codes in bit planes.
template <int bits, int tokens, class Sums>
EDGERAZOR_INLINE void add_bits_chunk(Sums* sums, const uint8_t* w, const int8_t* x, int64_t x_stride) {
    constexpr int step = (bits & (bits - 1)) == 0 ? 8 / bits : kBitsChunkQuads, vectors = chunk_vectors(bits, step);
    EDGERAZOR_ROLLED for (int done = 0; done < kBitsChunkQuads; done += step, w += vectors * kVectorBytes,
                          x += step * 4) {
        EDGERAZOR_ROLLED for (int v = 0; v < vectors; v++) prefetch_ahead(w + v * kVectorBytes);
        unroll<0, step>(UNROLL(q) {
            add_quad<tokens>(sums, unpack_bits_quad<bits, q.value>(w), x + q.value * 4, x_stride);
        });
    }
}

// A row block times `tokens` tokens, into results [tokens, 16].
template <int bits, int tokens>
__attribute__((noinline)) void gemv_tokens_block(const GemvTokens& product, float* results) {
    constexpr int chunk = chunk_quads(bits), bytes = chunk_vectors(bits, chunk) * kVectorBytes;
    using Sums = DotAccumulator<max_code_of(bits)>;
    constexpr int chunks_together = larger(1, smaller(kSlabQuads, Sums::capacity) / chunk); // before sums are widened
    static_assert(Sums::capacity >= chunk, "");
    const RowLayout& layout = product.layout;
    const uint8_t* w = product.w;
    const int8_t* x = product.x;
    const int64_t x_stride = product.x_stride;
    RowFloats y[tokens];
    unroll<0, tokens>(UNROLL(t) { y[t.value] = zero_floats(); });
    for (int i = 0; i < layout.segment_count; i++) {
        Sums sums[tokens];
        unroll<0, tokens>(UNROLL(t) { sums[t.value].reset(); });
        for (int left = layout.segments[i].quads / chunk; left > 0;) {
            int count = smaller(left, chunks_together);
            left -= count;
            EDGERAZOR_ROLLED for (; count > 0; count--, w += bytes, x += chunk * 4) {
                if constexpr (bits == kTernary) {
                    add_ternary_chunk<tokens>(sums, w, x, x_stride);
                } else {
                    add_bits_chunk<bits, tokens>(sums, w, x, x_stride);
                }
            }
            unroll<0, tokens>(UNROLL(t) { sums[t.value].widen(); });
        }
        const RowFloats scales = load_f16(product.w_scales + (int64_t)layout.segments[i].group * kBlockRows);
        unroll<0, tokens>(UNROLL(t) {
            const int64_t at = t.value * (int64_t)layout.segment_count + i;
            add_scaled(y[t.value], add_min_level(sums[t.value].total(), product.min_level_x2, product.x_sums[at]),
                       scales, level_unit(product.min_level_x2) * product.x_scales[at]);
        });
    }
    unroll<0, tokens>(UNROLL(t) { store_floats(results + t.value * kBlockRows, y[t.value]); });
}

// Row blocks [first, last) times 2 to kFewTokens tokens, in groups of about equally many, never of a single one.
template <int bits>
void gemv_tokens(const RowLayout& layout, const FormatRows& rows, const QuantizedActivations& x,
                 const MatmulOutput& output, int64_t first, int64_t last) {
    const int64_t block_bytes = codes_bytes(bits, layout.quads), block_scales = (int64_t)layout.groups * kBlockRows;
    constexpr int most = group_tokens(bits);
    const int tokens = (int)x.tokens, groups = (tokens + most - 1) / most;
    for (int64_t block = first; block < last; block++) {
        const int64_t rest = rows.count - block * kBlockRows;
        const int count = rest < kBlockRows ? (int)rest : kBlockRows;
        for (int group = 0; group < groups; group++) {
            const int from = tokens * group / groups, together = tokens * (group + 1) / groups - from;
            const int64_t x_stride = (int64_t)layout.x_quads * 4, segment = (int64_t)from * layout.segment_count;
            const GemvTokens product = {layout, rows.codes + block * block_bytes, rows.scales + block * block_scales,
                                        x.codes + from * x_stride, x_stride, x.scales + segment, x.sums + segment,
                                        rows.min_level_x2};
            alignas(kVectorBytes) float results[most * kBlockRows];
            unroll<2, most + 1>(UNROLL(n) {
                if (together == n.value) gemv_tokens_block<bits, n.value>(product, results);
            });
            for (int t = 0; t < together; t++)
                store_rows(results + t * kBlockRows, count, block * kBlockRows, rows, output, from + t);
        }
    }
}

} // namespace
