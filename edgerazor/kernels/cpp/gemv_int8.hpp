// The product of packed rows with the int8 activations of one token (a GEMV), included by `matmul.hpp`: codes go from
// memory to registers and into sums at once, since reading them is what takes the time when a token is decoded.
#pragma once

namespace {

constexpr int kPrefetchL1 = 1024, kPrefetchL2 = 8192; // bytes ahead; prefetches into the second cache cross pages

// Prefetches what lies ahead of w, and returns w. The CPU's own prefetchers learn from the address of an instruction: a
// stream that one instruction reads in a short loop arrives a fifth faster than through many instructions of a long
// one.
EDGERAZOR_INLINE const uint8_t* prefetch_ahead(const uint8_t* w) {
    __builtin_prefetch(w + kPrefetchL1);
    __builtin_prefetch(w + kPrefetchL2, 0, 2);
    return w;
}

// The product of one row block with one token, whose 16 results add up segment by segment.
struct GemvBlock {
    const RowLayout& layout;
    const uint8_t* w;
    const uint16_t* w_scales;
    const int8_t* x;
    const float* x_scales;
    const int32_t* x_sums;
    int min_level_x2;
    RowFloats y;

    EDGERAZOR_INLINE void add_segment(int segment, RowSums dot) {
        const RowFloats scales = load_f16(w_scales + (int64_t)layout.segments[segment].group * kBlockRows);
        add_scaled(y, add_min_level(dot, min_level_x2, x_sums[segment]), scales,
                   level_unit(min_level_x2) * x_scales[segment]);
    }
};

// The dot products with a whole ternary chunk. After every `span` quads it calls at_end(number of the span, its sums).
template <int span, class AtEnd>
EDGERAZOR_INLINE void ternary_chunk(const uint8_t* w, const int8_t* x, AtEnd&& at_end) {
    TernaryDot dot;
    const uint8_t* const end = w + 12 * kVectorBytes;
    if constexpr (span == kTernaryChunkQuads) {
        const int8_t* quads = x;
        EDGERAZOR_ROLLED for (; w < end; w += kVectorBytes, quads += 20) {
            const Trits five = unpack_trits(load(prefetch_ahead(w)));
            unroll<0, 5>(UNROLL(f) { dot.template add<f.value>(five, quads + f.value * 4); });
        }
    } else {
        EDGERAZOR_ROLLED for (const uint8_t* v = w; v < end; v += kVectorBytes) prefetch_ahead(v);
        unroll<0, 12>(UNROLL(v) {
            const Trits five = unpack_trits(load(w + v.value * kVectorBytes));
            unroll<0, 5>(UNROLL(f) {
                constexpr int q = v.value * 5 + f.value;
                dot.template add<f.value>(five, x + q * 4);
                if constexpr ((q + 1) % span == 0) at_end(q / span, dot.take());
            });
        });
    }
    const u8x64 fields = load(prefetch_ahead(end));
    unroll<0, 4>(UNROLL(f) { dot.template add_2bit<f.value>(fields, x + (60 + f.value) * 4); });
    at_end(63 / span, dot.take());
}

// Segments of `span` quads, of which a chunk holds several. Returns how many segments the whole chunks hold.
template <int span>
int short_ternary_segments(GemvBlock& product) {
    constexpr int bytes = chunk_vectors(kTernary, kTernaryChunkQuads) * kVectorBytes;
    const int chunks = product.layout.quads / kTernaryChunkQuads;
    for (int c = 0; c < chunks; c++)
        ternary_chunk<span>(product.w + (int64_t)c * bytes, product.x + c * kTernaryChunkQuads * 4,
                            [&](int i, RowSums dot) __attribute__((always_inline)) {
                                product.add_segment(c * (kTernaryChunkQuads / span) + i, dot);
                            });
    return chunks * (kTernaryChunkQuads / span);
}

EDGERAZOR_INLINE RowSums ternary_chunks(const uint8_t* w, const int8_t* x, int quads) {
    constexpr int bytes = chunk_vectors(kTernary, kTernaryChunkQuads) * kVectorBytes;
    RowSums total = zero_sums();
    for (; quads > 0; quads -= kTernaryChunkQuads, w += bytes, x += kTernaryChunkQuads * 4)
        ternary_chunk<kTernaryChunkQuads>(w, x, [&](int, RowSums dot) __attribute__((always_inline)) {
            total = add_sums(total, dot);
        });
    return total;
}

// Codes of one bit plane are read vector by vector, those of several planes chunk by chunk.
template <int bits>
EDGERAZOR_INLINE RowSums bits_chunks(const uint8_t* w, const int8_t* x, int quads) {
    constexpr int step = (bits & (bits - 1)) == 0 ? 8 / bits : kBitsChunkQuads, vectors = chunk_vectors(bits, step);
    constexpr int chains = step < kChains ? step : kChains;
    DotAccumulator<max_code_of(bits)> sums[chains];
    unroll<0, chains>(UNROLL(i) { sums[i.value].reset(); });
    for (; quads > 0; quads -= kBitsChunkQuads) {
        EDGERAZOR_ROLLED for (int done = 0; done < kBitsChunkQuads;
                              done += step, w += vectors * kVectorBytes, x += step * 4) {
            EDGERAZOR_ROLLED for (int v = 0; v < vectors; v++) prefetch_ahead(w + v * kVectorBytes);
            unroll<0, step>(UNROLL(q) {
                sums[q.value % chains].add(unpack_bits_quad<bits, q.value>(w), broadcast(x + q.value * 4));
            });
        }
        unroll<0, chains>(UNROLL(i) { sums[i.value].widen(); });
    }
    RowSums total = sums[0].total();
    unroll<1, chains>(UNROLL(i) { total = add_sums(total, sums[i.value].total()); });
    return total;
}

template <int bits>
EDGERAZOR_INLINE RowSums whole_chunks(const uint8_t* w, const int8_t* x, int quads) {
    if constexpr (bits == kTernary) {
        return ternary_chunks(w, x, quads);
    } else {
        return bits_chunks<bits>(w, x, quads);
    }
}

// The last chunk of a row, which has fewer quads than the others.
template <int bits>
EDGERAZOR_INLINE RowSums last_chunk(const uint8_t* w, const int8_t* x, int quads) {
    if constexpr (bits == kTernary) {
        TernaryDot dot;
        EDGERAZOR_ROLLED for (; quads >= 5; quads -= 5, w += kVectorBytes, x += 20) {
            const Trits five = unpack_trits(load(prefetch_ahead(w)));
            unroll<0, 5>(UNROLL(f) { dot.template add<f.value>(five, x + f.value * 4); });
        }
        if (quads == 0) return dot.take();
        const u8x64 fields = load(w);
        unroll<0, 4>(UNROLL(f) {
            if (f.value < quads) dot.template add_2bit<f.value>(fields, x + f.value * 4);
        });
        return dot.take();
    } else {
        alignas(kVectorBytes) uint8_t buffer[kBitsChunkQuads * kVectorBytes];
        unpack_bits_tail(bits, w, quads, buffer, kVectorBytes);
        DotAccumulator<max_code_of(bits)> sums;
        sums.reset();
        for (int q = 0; q < quads; q++) sums.add(load(buffer + q * kVectorBytes), broadcast(x + q * 4));
        sums.widen();
        return sums.total();
    }
}

// A segment that ends with a shorter chunk. It is not inlined, because it would slow down the loop over the others.
template <int bits>
__attribute__((noinline)) RowSums last_segment(const uint8_t* w, const int8_t* x, int quads) {
    constexpr int chunk = chunk_quads(bits), bytes = chunk_vectors(bits, chunk) * kVectorBytes;
    const int rest = quads % chunk, whole = quads - rest;
    return add_sums(whole_chunks<bits>(w, x, whole),
                    last_chunk<bits>(w + (int64_t)(whole / chunk) * bytes, x + whole * 4, rest));
}

// All segments of a row in which every segment begins with a chunk. Returns their number.
template <int bits>
int aligned_segments(GemvBlock& product) {
    constexpr int chunk = chunk_quads(bits), bytes = chunk_vectors(bits, chunk) * kVectorBytes;
    const RowLayout& layout = product.layout;
    const int count = layout.segment_count - (layout.segments[layout.segment_count - 1].quads % chunk != 0);
    for (int i = 0; i < count; i++) {
        const Segment& segment = layout.segments[i];
        const uint8_t* w = product.w + (int64_t)(segment.first_quad / chunk) * bytes;
        product.add_segment(i, whole_chunks<bits>(w, product.x + (int64_t)segment.first_quad * 4, segment.quads));
    }
    if (count < layout.segment_count) {
        const Segment& segment = layout.segments[count];
        const uint8_t* w = product.w + (int64_t)(segment.first_quad / chunk) * bytes;
        product.add_segment(count, last_segment<bits>(w, product.x + (int64_t)segment.first_quad * 4, segment.quads));
    }
    return layout.segment_count;
}

// The first segments, as far as codes can go from memory to registers at once. Returns how many they are.
template <int bits>
int fast_segments(GemvBlock& product) {
    const int span = product.layout.uniform_quads;
    if (span == 0) return 0;
    if (span % chunk_quads(bits) == 0) return aligned_segments<bits>(product);
    if constexpr (bits == kTernary) {
        if (span == 8) return short_ternary_segments<8>(product);
        if (span == 16) return short_ternary_segments<16>(product);
        if (span == 32) return short_ternary_segments<32>(product);
    }
    return 0;
}

// Segments of any length from number `next` on, through a buffer of unpacked quads.
template <int bits>
void remaining_segments(GemvBlock& product, int next) {
    constexpr int chunk = chunk_quads(bits);
    alignas(kVectorBytes) uint8_t buffer[kSlabQuads * kVectorBytes];
    const RowLayout& layout = product.layout;
    int begin = 0, end = 0; // quads in the buffer
    for (int i = next; i < layout.segment_count; i++) {
        const Segment& segment = layout.segments[i];
        RowSums total = zero_sums();
        for (int q = 0; q < segment.quads;) {
            const int quad = segment.first_quad + q;
            if (quad < begin || quad >= end) {
                begin = quad - quad % chunk;
                end = smaller(begin + kSlabQuads, layout.quads);
                const uint8_t* const stop = product.w + codes_bytes(bits, end);
                EDGERAZOR_ROLLED for (const uint8_t* w = product.w + codes_bytes(bits, begin); w < stop;
                                      w += kVectorBytes)
                    prefetch_ahead(w);
                unpack<bits>(product.w, begin, end, buffer, kVectorBytes);
            }
            using Accumulator = DotAccumulator<max_code_of(bits)>;
            const int stop = smaller(segment.quads, q + smaller(end - quad, Accumulator::capacity));
            const uint8_t* u = buffer + (quad - begin) * kVectorBytes;
            const int8_t* x = product.x + (int64_t)(segment.x_quad + q) * 4;
            Accumulator sums;
            sums.reset();
            for (; q < stop; q++, u += kVectorBytes, x += 4) sums.add(load(u), broadcast(x));
            sums.widen();
            total = add_sums(total, sums.total());
        }
        product.add_segment(i, total);
    }
}

// Row blocks [first, last) times one token.
template <int bits>
void gemv(const RowLayout& layout, const FormatRows& rows, const QuantizedActivations& x, const MatmulOutput& output,
          int64_t first, int64_t last) {
    const int64_t block_bytes = codes_bytes(bits, layout.quads), block_scales = (int64_t)layout.groups * kBlockRows;
    for (int64_t block = first; block < last; block++) {
        GemvBlock product{layout, rows.codes + block * block_bytes, rows.scales + block * block_scales, x.codes,
                          x.scales, x.sums, rows.min_level_x2, zero_floats()};
        remaining_segments<bits>(product, fast_segments<bits>(product));
        alignas(kVectorBytes) float results[kBlockRows];
        store_floats(results, product.y);
        const int64_t count = rows.count - block * kBlockRows;
        store_rows(results, count < kBlockRows ? (int)count : kBlockRows, block * kBlockRows, rows, output, 0);
    }
}

} // namespace
