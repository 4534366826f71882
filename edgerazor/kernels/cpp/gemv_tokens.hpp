// The product of packed rows with the int8 activations of a few tokens, included by `matmul.hpp`: as in a GEMV, codes go
// from memory to registers and into sums at once, but into those of up to kGemvTokens tokens. A row block that more
// tokens need is read again from the first cache. A GEMM's detour through a slab of unpacked codes only pays off for
// many tokens. The activations are copied once, so that those which a quad of weights is multiplied by lie side by side.
// Ternary segments of 16 or 32 quads (groups of 64 or 128), of which a chunk holds several, have functions of their own.
#pragma once

namespace {

// Tokens of a group: fewer for codes of several bit planes, each size of which takes the compiler long.
constexpr int group_tokens(int bits) { return (bits & (bits - 1)) == 0 ? kGemvTokens : smaller(kGemvTokens, 4); }

// A row block and the activations of some tokens.
struct GemvTokens {
    const RowLayout& layout;
    const uint8_t* w;
    const uint16_t* w_scales;
    const int8_t* x;          // [quads, tokens, 4]
    const float* x_scales;    // [segments, tokens], times the unit of the levels
    const int32_t* x_offsets; // [segments, tokens]: what the lowest level adds to the dot products of codes
    bool doubled;             // whether the unit is a half, and dot products are doubled
};

// Tokens of a group where ternary segments are short: their code is unrolled for each number. And the most tokens for
// which that is faster than a GEMM.
constexpr int kShortTokens = smaller(kGemvTokens, 8), kFewShortTokens = smaller(kFewTokens, 16);

// Whether every segment begins with a chunk.
template <int bits>
bool has_aligned_segments(const RowLayout& layout) {
    return layout.uniform_quads != 0 && layout.uniform_quads % chunk_quads(bits) == 0;
}

// The dot products of a segment with one token.
template <int bits, bool dots = false>
struct TokenSums : DotAccumulator<max_code_of(bits)> {
    using DotAccumulator<max_code_of(bits)>::add;

    template <int f>
    EDGERAZOR_INLINE void add(const Trits& five, const int8_t* x) { add(digit<f>(five), broadcast(x)); }

    template <int f>
    EDGERAZOR_INLINE void add_2bit(u8x64 fields, const int8_t* x) { add(extract_bits<2 * f, 2>(fields), broadcast(x)); }

    EDGERAZOR_INLINE void add_quad(u8x64 u, const int8_t* x) { add(u, broadcast(x)); }
};

template <>
struct TokenSums<kTernary, true> : TernaryDot {
    static constexpr int capacity = kMaxSegmentColumns;
    EDGERAZOR_INLINE void reset() {}
    EDGERAZOR_INLINE void widen() {}
    EDGERAZOR_INLINE RowSums total() { return take(); }
    EDGERAZOR_INLINE void add_quad(u8x64 u, const int8_t* x) { add_2bit<0>(u, x); }
};

// Adds the dot products of a whole ternary chunk. `next` are the digits of its first vector, and then of the chunk's at
// `following`: those of every vector are unpacked while the ones before it are multiplied, because so many products are
// in flight that the CPU does not see the next vector in time.
template <int tokens, class Sums>
EDGERAZOR_INLINE void add_ternary_chunk(Sums* sums, const uint8_t* w, const int8_t* x, const uint8_t* following,
                                        Trits& next) {
    constexpr int quad = tokens * 4; // bytes
    const uint8_t* const end = w + 12 * kVectorBytes;
    EDGERAZOR_ROLLED for (; w < end; x += 5 * quad) {
        if constexpr (!kUnpackAhead) next = unpack_trits(load(w));
        const Trits five = next;
        prefetch_ahead(w);
        w += kVectorBytes;
        unroll<0, 5>(UNROLL(f) {
            unroll<0, tokens>(UNROLL(t) { sums[t.value].template add<f.value>(five, x + f.value * quad + t.value * 4); });
            if constexpr (kUnpackAhead && f.value == 0) next = unpack_trits(load(w < end ? w : following));
        });
    }
    const u8x64 fields = load(prefetch_ahead(end));
    unroll<0, 4>(UNROLL(f) {
        unroll<0, tokens>(UNROLL(t) {
            sums[t.value].template add_2bit<f.value>(fields, x + f.value * quad + t.value * 4);
        });
    });
}

// Adds the dot products of a whole chunk of codes in one bit plane. `next` is its first vector, and then the one at
// `following`.
template <int bits, int tokens, class Sums>
EDGERAZOR_INLINE void add_plane_chunk(Sums* sums, const uint8_t* w, const int8_t* x, const uint8_t* following,
                                      u8x64& next) {
    constexpr int step = 8 / bits, quad = tokens * 4;
    const uint8_t* const end = w + bits * kVectorBytes;
    EDGERAZOR_ROLLED for (; w < end; x += step * quad) {
        if constexpr (!kUnpackAhead) next = load(w);
        const u8x64 bytes = next;
        prefetch_ahead(w);
        w += kVectorBytes;
        if constexpr (kUnpackAhead) next = load(w < end ? w : following);
        unroll<0, step>(UNROLL(q) {
            const u8x64 u = extract_bits<q.value * bits, bits>(bytes);
            unroll<0, tokens>(UNROLL(t) { sums[t.value].add(u, broadcast(x + q.value * quad + t.value * 4)); });
        });
    }
}

// Adds the dot products of a whole chunk of codes in several bit planes.
template <int bits, int tokens, class Sums>
EDGERAZOR_INLINE void add_planes_chunk(Sums* sums, const uint8_t* w, const int8_t* x) {
    constexpr int quad = tokens * 4;
    unroll<0, chunk_vectors(bits, kBitsChunkQuads)>(UNROLL(v) { prefetch_ahead(w + v.value * kVectorBytes); });
    unroll<0, kBitsChunkQuads>(UNROLL(q) {
        const u8x64 u = unpack_bits_quad<bits, q.value>(w);
        unroll<0, tokens>(UNROLL(t) { sums[t.value].add(u, broadcast(x + q.value * quad + t.value * 4)); });
    });
}

EDGERAZOR_INLINE Trits first_vector(const uint8_t* w, Constant<kTernary>) { return unpack_trits(load(w)); }

template <int bits>
EDGERAZOR_INLINE u8x64 first_vector(const uint8_t* w, Constant<bits>) { return load(w); }

// Adds the dot products of the last ternary chunk of a row, which has fewer quads than the others.
template <int tokens, class Sums>
EDGERAZOR_INLINE void add_last_ternary_chunk(Sums* sums, const uint8_t* w, const int8_t* x, int quads) {
    constexpr int quad = tokens * 4; // bytes
    EDGERAZOR_ROLLED for (; quads >= 5; quads -= 5, w += kVectorBytes, x += 5 * quad) {
        const Trits five = unpack_trits(load(prefetch_ahead(w)));
        unroll<0, 5>(UNROLL(f) {
            unroll<0, tokens>(UNROLL(t) { sums[t.value].template add<f.value>(five, x + f.value * quad + t.value * 4); });
        });
    }
    if (quads == 0) return;
    const u8x64 fields = load(w);
    unroll<0, 4>(UNROLL(f) {
        if (f.value >= quads) return;
        unroll<0, tokens>(UNROLL(t) {
            sums[t.value].template add_2bit<f.value>(fields, x + f.value * quad + t.value * 4);
        });
    });
}

// The last chunk of a row block, which has fewer quads than the others, in single quads.
template <int bits>
struct LastChunk {
    alignas(kVectorBytes) uint8_t quads[chunk_quads(bits) * kVectorBytes];
    int first; // number of its first quad in the row

    explicit LastChunk(const GemvTokens& product) {
        first = product.layout.quads / chunk_quads(bits) * chunk_quads(bits);
        if (first < product.layout.quads)
            unpack<bits>(product.w, first, product.layout.quads, quads, kVectorBytes);
    }

    // Adds the dot products of quads [begin, end) of the row.
    template <int tokens, class Sums>
    EDGERAZOR_INLINE void add(Sums* sums, const int8_t* x, int begin, int end) const {
        for (int q = begin; q < end; q++) {
            const u8x64 u = load(quads + (q - first) * kVectorBytes);
            unroll<0, tokens>(UNROLL(t) { sums[t.value].add_quad(u, x + (q * tokens + t.value) * 4); });
        }
    }
};

// Adds the dot products of segment number i with all tokens to the results [tokens, 16].
template <int tokens, class Sums>
EDGERAZOR_INLINE void end_segment(const GemvTokens& product, int i, Sums* sums, float* results) {
    const RowFloats scales = load_f16(product.w_scales + (int64_t)product.layout.segments[i].group * kBlockRows);
    const float* const x_scales = product.x_scales + i * tokens;
    const int32_t* const x_offsets = product.x_offsets + i * tokens;
    unroll<0, tokens>(UNROLL(t) {
        RowFloats y = i == 0 ? zero_floats() : load_floats(results + t.value * kBlockRows);
        sums[t.value].widen();
        RowSums dot = sums[t.value].total();
        if (product.doubled) dot = add_sums(dot, dot);
        add_scaled(y, add_sums(dot, splat_sums(x_offsets[t.value])), scales, x_scales[t.value]);
        store_floats(results + t.value * kBlockRows, y);
    });
}

// A row block times `tokens` tokens, into results [tokens, 16].
template <int bits, int tokens>
__attribute__((noinline)) void gemv_tokens_block(const GemvTokens& product, float* results) {
    constexpr int chunk = chunk_quads(bits), bytes = chunk_vectors(bits, chunk) * kVectorBytes;
    using Sums = TokenSums<bits, bits == kTernary && tokens <= kDotTokens>;
    constexpr int chunks_together = larger(1, smaller(kSlabQuads, Sums::capacity) / chunk); // before sums are widened
    static_assert(Sums::capacity >= chunk, "");
    const RowLayout& layout = product.layout;
    const uint8_t* w = product.w;
    const uint8_t* const last = w + (int64_t)(layout.quads / chunk - 1) * bytes;
    const int8_t* x = product.x;
    auto next = first_vector(w, Constant<bits>{});
    for (int i = 0; i < layout.segment_count; i++) {
        const Segment& segment = layout.segments[i];
        Sums sums[tokens];
        unroll<0, tokens>(UNROLL(t) { sums[t.value].reset(); });
        for (int left = segment.quads / chunk; left > 0;) {
            int count = smaller(left, chunks_together);
            left -= count;
            EDGERAZOR_ROLLED for (; count > 0; count--, w += bytes, x += chunk * tokens * 4) {
                const uint8_t* const following = w == last ? w : w + bytes;
                if constexpr (bits == kTernary) {
                    add_ternary_chunk<tokens>(sums, w, x, following, next);
                } else if constexpr ((bits & (bits - 1)) == 0) {
                    add_plane_chunk<bits, tokens>(sums, w, x, following, next);
                } else {
                    add_planes_chunk<bits, tokens>(sums, w, x);
                }
            }
            unroll<0, tokens>(UNROLL(t) { sums[t.value].widen(); });
        }
        if (segment.quads % chunk != 0) { // of the last segment
            if constexpr (bits == kTernary)
                add_last_ternary_chunk<tokens>(sums, w, x, segment.quads % chunk);
            else
                LastChunk<bits>(product).template add<tokens>(sums, product.x, layout.quads / chunk * chunk,
                                                              layout.quads);
        }
        end_segment<tokens>(product, i, sums, results);
    }
}

// The dot products of a whole ternary chunk, whose segments have `span` quads.
template <int span, int tokens, class Sums, class AtEnd>
EDGERAZOR_INLINE void add_short_segments(Sums* sums, const uint8_t* w, const int8_t* x, AtEnd&& at_end) {
    const uint8_t* const end = w + 12 * kVectorBytes;
    EDGERAZOR_ROLLED for (const uint8_t* v = w; v <= end; v += kVectorBytes) prefetch_ahead(v);
    unroll<0, 12>(UNROLL(v) {
        const Trits five = unpack_trits(load(w + v.value * kVectorBytes));
        unroll<0, 5>(UNROLL(f) {
            constexpr int q = v.value * 5 + f.value;
            unroll<0, tokens>(UNROLL(t) { sums[t.value].template add<f.value>(five, x + (q * tokens + t.value) * 4); });
            if constexpr ((q + 1) % span == 0) at_end(q / span);
        });
    });
    const u8x64 fields = load(end);
    unroll<0, 4>(UNROLL(f) {
        unroll<0, tokens>(UNROLL(t) {
            sums[t.value].template add_2bit<f.value>(fields, x + ((60 + f.value) * tokens + t.value) * 4);
        });
    });
    at_end(63 / span);
}

// As `gemv_tokens_block`, of ternary codes with segments of `span` quads; the last one may have fewer.
template <int span, int tokens>
__attribute__((noinline)) void short_ternary_block(const GemvTokens& product, float* results) {
    constexpr int chunk = kTernaryChunkQuads, bytes = chunk_vectors(kTernary, chunk) * kVectorBytes;
    const RowLayout& layout = product.layout;
    const LastChunk<kTernary> last_chunk(product);
    TokenSums<kTernary, tokens <= kDotTokens> sums[tokens];
    unroll<0, tokens>(UNROLL(t) { sums[t.value].reset(); });
    const auto end = [&](int i) __attribute__((always_inline)) {
        end_segment<tokens>(product, i, sums, results);
        unroll<0, tokens>(UNROLL(t) { sums[t.value].reset(); });
    };
    for (int c = 0; c < last_chunk.first / chunk; c++)
        add_short_segments<span, tokens>(
            sums, product.w + (int64_t)c * bytes, product.x + c * chunk * tokens * 4,
            [&](int i) __attribute__((always_inline)) { end(c * (chunk / span) + i); });
    for (int i = last_chunk.first / span; i < layout.segment_count; i++) {
        const Segment& segment = layout.segments[i];
        last_chunk.template add<tokens>(sums, product.x, segment.first_quad, segment.first_quad + segment.quads);
        end(i);
    }
}

typedef int32_t FourQuads __attribute__((vector_size(16)));

// The activations of a group of tokens, rearranged for it.
struct TokenGroup {
    int first, count;
    int8_t* x;
    float* x_scales;
    int32_t* x_offsets;

    void fill(const RowLayout& layout, const QuantizedActivations& from, int min_level_x2) const {
        const int64_t stride = (int64_t)layout.x_quads * 4;
        int t = 0;
        for (; t + 4 <= count; t += 4) interleave_four(from.codes + (first + t) * stride, layout.x_quads, t);
        for (; t < count; t++) interleave_one(from.codes + (first + t) * stride, layout.x_quads, t);
        for (t = 0; t < count; t++)
            for (int i = 0; i < layout.segment_count; i++) {
                const int64_t at = (first + t) * (int64_t)layout.segment_count + i;
                x_scales[i * count + t] = level_unit(min_level_x2) * from.scales[at];
                x_offsets[i * count + t] = (min_level_x2 % 2 == 0 ? min_level_x2 / 2 : min_level_x2) * from.sums[at];
            }
    }

    // Copies the quads of token number t, whose codes begin at `row`, or of four from number t on.
    void interleave_one(const int8_t* row, int quads, int t) const {
        int8_t* out = x + t * 4;
        for (int q = 0; q < quads; q++, row += 4, out += count * 4) memcpy(out, row, 4);
    }

    void interleave_four(const int8_t* row, int quads, int t) const {
        const int64_t stride = (int64_t)quads * 4;
        int q = 0;
        for (; q + 4 <= quads; q += 4) {
            FourQuads of_token[4];
            for (int i = 0; i < 4; i++) memcpy(&of_token[i], row + i * stride + q * 4, sizeof of_token[i]);
            const FourQuads &a = of_token[0], &b = of_token[1], &c = of_token[2], &d = of_token[3];
            const FourQuads of_quad[4] = {{a[0], b[0], c[0], d[0]},
                                          {a[1], b[1], c[1], d[1]},
                                          {a[2], b[2], c[2], d[2]},
                                          {a[3], b[3], c[3], d[3]}};
            for (int i = 0; i < 4; i++) memcpy(x + ((q + i) * count + t) * 4, &of_quad[i], sizeof of_quad[i]);
        }
        for (; q < quads; q++)
            for (int i = 0; i < 4; i++) memcpy(x + (q * count + t + i) * 4, row + i * stride + q * 4, 4);
    }
};

// Row blocks [first, last) times 2 to kFewTokens tokens, in groups of about equally many, never of a single one. `span`
// is that of short segments, or 0.
template <int bits, int span>
void gemv_tokens(const RowLayout& layout, const FormatRows& rows, const QuantizedActivations& x,
                 const MatmulOutput& output, int64_t first, int64_t last) {
    constexpr int most = span ? kShortTokens : group_tokens(bits);
    const int64_t block_bytes = codes_bytes(bits, layout.quads), block_scales = (int64_t)layout.groups * kBlockRows;
    const int tokens = (int)x.tokens, groups = (tokens + most - 1) / most;
    const int64_t numbers = tokens * (int64_t)layout.segment_count, quads = tokens * (int64_t)layout.x_quads;
    int32_t* memory; // codes, scales, offsets: of all tokens in the order of groups
    if (posix_memalign((void**)&memory, kVectorBytes, (quads + 2 * numbers) * sizeof(int32_t)) != 0) abort();
    TokenGroup token_groups[kFewTokens / 2];
    for (int i = 0, from = 0; i < groups; i++) {
        const int end = tokens * (i + 1) / groups;
        int32_t* const offsets = memory + quads + numbers + from * layout.segment_count;
        token_groups[i] = {from, end - from, (int8_t*)(memory + from * (int64_t)layout.x_quads),
                           (float*)(offsets - numbers), offsets};
        token_groups[i].fill(layout, x, rows.min_level_x2);
        from = end;
    }
    for (int64_t block = first; block < last; block++) {
        const int64_t rest = rows.count - block * kBlockRows;
        const int count = rest < kBlockRows ? (int)rest : kBlockRows;
        for (const TokenGroup* group = token_groups; group < token_groups + groups; group++) {
            const GemvTokens product = {layout, rows.codes + block * block_bytes, rows.scales + block * block_scales,
                                        group->x, group->x_scales, group->x_offsets, rows.min_level_x2 % 2 != 0};
            alignas(kVectorBytes) float results[most * kBlockRows];
            unroll<2, most + 1>(UNROLL(n) {
                if (group->count != n.value) return;
                if constexpr (span == 0) {
                    gemv_tokens_block<bits, n.value>(product, results);
                } else {
                    short_ternary_block<span, n.value>(product, results);
                }
            });
            for (int t = 0; t < group->count; t++)
                store_rows(results + t * kBlockRows, count, block * kBlockRows, rows, output, group->first + t);
        }
    }
    free(memory);
}

// The same, where there is a function for the layout and so many tokens; says whether there is.
template <int bits>
bool few_tokens(const RowLayout& layout, const FormatRows& rows, const QuantizedActivations& x,
                const MatmulOutput& output, int64_t first, int64_t last) {
    if (x.tokens <= kFewTokens && has_aligned_segments<bits>(layout)) {
        gemv_tokens<bits, 0>(layout, rows, x, output, first, last);
        return true;
    }
    if constexpr (bits == kTernary) {
        const int span = x.tokens <= kFewShortTokens ? layout.uniform_quads : 0;
        if (span == 16) gemv_tokens<bits, 16>(layout, rows, x, output, first, last);
        if (span == 32) gemv_tokens<bits, 32>(layout, rows, x, output, first, last);
        return span == 16 || span == 32;
    }
    return false;
}

} // namespace
