// Products with a part of a matrix, written once. A unit defines its vectors and what they can do, then includes this:
//
//   Bytes                  64 bytes: a quad of 16 rows, or a vector as it is stored
//     load, load_once (kept in a register while a tile uses it), store, field<shift, width>(bytes), join<shift>(low, high) = low | high << shift
//   Quad broadcast(x)      four activations
//   Sums                   16 integers: no_sums(), load_sums, store_sums, add_sums
//   Accumulator<largest>   sums of u * x for u up to `largest`: reset(), add(Bytes, Quad), widen() at the latest every
//                          `capacity` quads, total(); bound(largest) is the `largest` that serves instead of it
//   Trits, trits(bytes)    the base-3 digits of a vector: store_trit<f>(Trits, to)
//   TernarySums            sums over base-3 digits, at most 64 quads: add<f>(Trits, x), add_pair<f>(Bytes of 2-bit
//                          fields, x), take() = the total since the last take or the beginning
//   Sums all(number)       16 times the same
//   Floats                 16 numbers: no_floats(), load_floats, store_floats, load_halves (from fp16)
//     fold(y, total, w_scales, x_scale):  y += float(total) * (x_scale * w_scales)
//   kTileBlocks, kTileTokens, kChains   sizes of the tiles in registers, and independent sums at a time
//
// Every fold is one rounding of the same numbers in the same order, so that all instruction sets, one token and many
// give the same bits as `reference.linear`.
#pragma once
#include <stdlib.h>
#include <string.h>

#include "kernels.hpp"
#include "unroll.hpp"

namespace {

using namespace edgerazor;

constexpr int kNear = 1024, kFar = 8192; // bytes ahead, into the first cache and into the second: across pages
constexpr int kTokenBlock = 240; // tokens whose sums stay in the cache: a multiple of all tile sizes

EDGERAZOR_INLINE int smaller(int a, int b) { return a < b ? a : b; }
EDGERAZOR_INLINE int larger(int a, int b) { return a > b ? a : b; }

// The sum of x * level from that of u * x, in units of `unit(lowest)`.
EDGERAZOR_INLINE Sums settle(Sums total, int lowest, int sum) {
    return lowest % 2 == 0 ? add_sums(total, all(lowest / 2 * sum)) : add_sums(add_sums(total, total), all(lowest * sum));
}

EDGERAZOR_INLINE float unit(int lowest) { return lowest % 2 == 0 ? 1.0f : 0.5f; }

// What is fetched ahead. The CPU's own prefetchers learn from where an instruction lies: a stream that one instruction
// reads in a short loop comes a fifth faster than through many in a long one.
EDGERAZOR_INLINE const uint8_t* ahead(const uint8_t* w) {
    __builtin_prefetch(w + kNear);
    __builtin_prefetch(w + kFar, 0, 2);
    return w;
}

// Largest u that the sums of a format are made for.
constexpr int largest_code(int bits) { return bound(bits == kTernary ? 2 : (1 << bits) - 1); }

// Chunks to quads ------------------------------------------------------------------------------------------------

// Quad q of a whole chunk of b-bit codes at w.
template <int bits, int q, int width = 8, int offset = 0>
EDGERAZOR_INLINE Bytes bits_quad(const uint8_t* w) {
    if constexpr ((bits & width) == 0) {
        return bits_quad<bits, q, width / 2, offset>(w);
    } else {
        constexpr int fields = 8 / width;
        const Bytes low = field<(q % fields) * width, width>(load(w + offset + q / fields * kVector));
        if constexpr ((bits & (width - 1)) == 0) {
            return low;
        } else {
            return join<width>(low, bits_quad<bits, q, width / 2, offset + width * kVector>(w));
        }
    }
}

// A last, shorter chunk of b-bit codes, one byte at a time.
inline void unpack_bits_tail(int bits, const uint8_t* w, int quads, uint8_t* out, int stride) {
    for (int q = 0; q < quads; q++) memset(out + q * stride, 0, kVector);
    int shift = 0;
    for (int width = 8; width > 0; width /= 2) {
        if ((bits & width) == 0) continue;
        const int fields = 8 / width, mask = (1 << width) - 1;
        for (int q = 0; q < quads; q++)
            for (int i = 0; i < kVector; i++)
                out[q * stride + i] |= (w[q / fields * kVector + i] >> (q % fields * width) & mask) << shift;
        w += (quads * width + 7) / 8 * kVector;
        shift += width;
    }
}

// A chunk of at most 64 quads of ternary codes.
inline void unpack_ternary(const uint8_t* w, int quads, uint8_t* out, int stride) {
    for (; quads >= 5; quads -= 5, w += kVector, out += 5 * stride) {
        const Trits five = trits(load(w));
        unroll<0, 5>(UNROLL(f) { store_trit<f.value>(five, out + f.value * stride); });
    }
    if (quads > 0) unpack_bits_tail(2, w, quads, out, stride);
}

// Quads [first, last) of a row block, `first` at the beginning of a chunk, to out + (quad - first) * stride.
template <int bits>
void unpack(const uint8_t* block, int first, int last, uint8_t* out, int stride) {
    constexpr int chunk = chunk_quads(bits), bytes = chunk_vectors(bits, chunk) * kVector;
    const uint8_t* w = block + (int64_t)(first / chunk) * bytes;
    for (int q = first; q < last; q += chunk, w += bytes, out += (int64_t)chunk * stride) {
        const int quads = smaller(chunk, last - q);
        if constexpr (bits == kTernary) {
            unpack_ternary(w, quads, out, stride);
        } else if (quads == chunk) {
            unroll<0, chunk>(UNROLL(i) { store(out + i.value * stride, bits_quad<bits, i.value>(w)); });
        } else {
            unpack_bits_tail(bits, w, quads, out, stride);
        }
    }
}

// One token ------------------------------------------------------------------------------------------------------

// A row block and a token on the way to 16 results.
struct Line {
    const Geometry& geometry;
    const uint8_t* w;
    const uint16_t* w_scales;
    const int8_t* x;
    const float* x_scales;
    const int32_t* sums;
    int lowest;
    Floats y;

    EDGERAZOR_INLINE void finish(int segment, Sums total) {
        const Floats scales = load_halves(w_scales + (int64_t)geometry.segments[segment].group * kRows);
        fold(y, settle(total, lowest, sums[segment]), scales, unit(lowest) * x_scales[segment]);
    }
};

// The vectors of a whole ternary chunk; after every `span` quads comes at_end(number of the span, its total).
template <int span, class AtEnd>
EDGERAZOR_INLINE void ternary_chunk(const uint8_t* w, const int8_t* x, AtEnd&& at_end) {
    TernarySums sums;
    const uint8_t* const end = w + 12 * kVector;
    if constexpr (span == kTernaryQuads) {
        const int8_t* quads = x;
        EDGERAZOR_ROLLED for (; w < end; w += kVector, quads += 20) {
            const Trits five = trits(load(ahead(w)));
            unroll<0, 5>(UNROLL(f) { sums.template add<f.value>(five, quads + f.value * 4); });
        }
    } else {
        EDGERAZOR_ROLLED for (const uint8_t* v = w; v < end; v += kVector) ahead(v);
        unroll<0, 12>(UNROLL(v) {
            const Trits five = trits(load(w + v.value * kVector));
            unroll<0, 5>(UNROLL(f) {
                constexpr int q = v.value * 5 + f.value;
                sums.template add<f.value>(five, x + q * 4);
                if constexpr ((q + 1) % span == 0) at_end(q / span, sums.take());
            });
        });
    }
    const Bytes pairs = load(ahead(end));
    unroll<0, 4>(UNROLL(f) { sums.template add_pair<f.value>(pairs, x + (60 + f.value) * 4); });
    at_end(63 / span, sums.take());
}

// Segments of `span` quads, a part of a chunk; returns how many: those of whole chunks.
template <int span>
int short_ternary_segments(Line& line) {
    constexpr int bytes = chunk_vectors(kTernary, kTernaryQuads) * kVector;
    const int chunks = line.geometry.quads / kTernaryQuads;
    for (int c = 0; c < chunks; c++)
        ternary_chunk<span>(line.w + (int64_t)c * bytes, line.x + c * kTernaryQuads * 4,
                            [&](int i, Sums total) __attribute__((always_inline)) {
                                line.finish(c * (kTernaryQuads / span) + i, total);
                            });
    return chunks * (kTernaryQuads / span);
}

EDGERAZOR_INLINE Sums ternary_chunks(const uint8_t* w, const int8_t* x, int quads) {
    constexpr int bytes = chunk_vectors(kTernary, kTernaryQuads) * kVector;
    Sums total = no_sums();
    for (; quads > 0; quads -= kTernaryQuads, w += bytes, x += kTernaryQuads * 4)
        ternary_chunk<kTernaryQuads>(w, x, [&](int, Sums sums) __attribute__((always_inline)) {
            total = add_sums(total, sums);
        });
    return total;
}

// One plane of bits comes vector by vector, several come chunk by chunk.
template <int bits>
EDGERAZOR_INLINE Sums bits_chunks(const uint8_t* w, const int8_t* x, int quads) {
    constexpr int step = (bits & (bits - 1)) == 0 ? 8 / bits : kBitsQuads, vectors = chunk_vectors(bits, step);
    constexpr int chains = step < kChains ? step : kChains;
    Accumulator<largest_code(bits)> sums[chains];
    unroll<0, chains>(UNROLL(i) { sums[i.value].reset(); });
    for (; quads > 0; quads -= kBitsQuads) {
        EDGERAZOR_ROLLED for (int done = 0; done < kBitsQuads; done += step, w += vectors * kVector, x += step * 4) {
            EDGERAZOR_ROLLED for (int v = 0; v < vectors; v++) ahead(w + v * kVector);
            unroll<0, step>(UNROLL(q) {
                sums[q.value % chains].add(bits_quad<bits, q.value>(w), broadcast(x + q.value * 4));
            });
        }
        unroll<0, chains>(UNROLL(i) { sums[i.value].widen(); });
    }
    Sums total = sums[0].total();
    unroll<1, chains>(UNROLL(i) { total = add_sums(total, sums[i.value].total()); });
    return total;
}

template <int bits>
EDGERAZOR_INLINE Sums whole_chunks(const uint8_t* w, const int8_t* x, int quads) {
    if constexpr (bits == kTernary) {
        return ternary_chunks(w, x, quads);
    } else {
        return bits_chunks<bits>(w, x, quads);
    }
}

// Of a row's last chunk, which is shorter than the others.
template <int bits>
EDGERAZOR_INLINE Sums last_chunk(const uint8_t* w, const int8_t* x, int quads) {
    if constexpr (bits == kTernary) {
        TernarySums sums;
        EDGERAZOR_ROLLED for (; quads >= 5; quads -= 5, w += kVector, x += 20) {
            const Trits five = trits(load(ahead(w)));
            unroll<0, 5>(UNROLL(f) { sums.template add<f.value>(five, x + f.value * 4); });
        }
        if (quads == 0) return sums.take();
        const Bytes pairs = load(w);
        unroll<0, 4>(UNROLL(f) {
            if (f.value < quads) sums.template add_pair<f.value>(pairs, x + f.value * 4);
        });
        return sums.take();
    } else {
        alignas(kVector) uint8_t buffer[kBitsQuads * kVector];
        unpack_bits_tail(bits, w, quads, buffer, kVector);
        Accumulator<largest_code(bits)> sums;
        sums.reset();
        for (int q = 0; q < quads; q++) sums.add(load(buffer + q * kVector), broadcast(x + q * 4));
        sums.widen();
        return sums.total();
    }
}

// A segment that ends with such a chunk; not in the loop over the others, which would get slower.
template <int bits>
__attribute__((noinline)) Sums last_segment(const uint8_t* w, const int8_t* x, int quads) {
    constexpr int chunk = chunk_quads(bits), bytes = chunk_vectors(bits, chunk) * kVector;
    const int rest = quads % chunk, whole = quads - rest;
    return add_sums(whole_chunks<bits>(w, x, whole),
                    last_chunk<bits>(w + (int64_t)(whole / chunk) * bytes, x + whole * 4, rest));
}

// All segments, where each begins with a chunk; returns how many.
template <int bits>
int whole_segments(Line& line) {
    constexpr int chunk = chunk_quads(bits), bytes = chunk_vectors(bits, chunk) * kVector;
    const Geometry& geometry = line.geometry;
    const int count = geometry.count - (geometry.segments[geometry.count - 1].quads % chunk != 0);
    for (int i = 0; i < count; i++) {
        const Segment& segment = geometry.segments[i];
        const uint8_t* w = line.w + (int64_t)(segment.first_quad / chunk) * bytes;
        line.finish(i, whole_chunks<bits>(w, line.x + (int64_t)segment.first_quad * 4, segment.quads));
    }
    if (count < geometry.count) {
        const Segment& segment = geometry.segments[count];
        const uint8_t* w = line.w + (int64_t)(segment.first_quad / chunk) * bytes;
        line.finish(count, last_segment<bits>(w, line.x + (int64_t)segment.first_quad * 4, segment.quads));
    }
    return geometry.count;
}

// The segments that the ways without a buffer serve, from the first on; returns how many.
template <int bits>
int fast_segments(Line& line) {
    const int span = line.geometry.uniform;
    if (span == 0) return 0;
    if (span % chunk_quads(bits) == 0) return whole_segments<bits>(line);
    if constexpr (bits == kTernary) {
        if (span == 8) return short_ternary_segments<8>(line);
        if (span == 16) return short_ternary_segments<16>(line);
        if (span == 32) return short_ternary_segments<32>(line);
    }
    return 0;
}

// Any segments, from number `next` on, through a buffer of unpacked quads.
template <int bits>
void remaining_segments(Line& line, int next) {
    constexpr int chunk = chunk_quads(bits);
    alignas(kVector) uint8_t buffer[kSlab * kVector];
    const Geometry& geometry = line.geometry;
    int begin = 0, end = 0; // quads in the buffer
    for (int i = next; i < geometry.count; i++) {
        const Segment& segment = geometry.segments[i];
        Sums total = no_sums();
        for (int q = 0; q < segment.quads;) {
            const int quad = segment.first_quad + q;
            if (quad < begin || quad >= end) {
                begin = quad - quad % chunk;
                end = smaller(begin + kSlab, geometry.quads);
                const uint8_t* const behind = line.w + codes_bytes(bits, end);
                EDGERAZOR_ROLLED for (const uint8_t* w = line.w + codes_bytes(bits, begin); w < behind; w += kVector) ahead(w);
                unpack<bits>(line.w, begin, end, buffer, kVector);
            }
            using Accumulated = Accumulator<largest_code(bits)>;
            const int stop = smaller(segment.quads, q + smaller(end - quad, Accumulated::capacity));
            const uint8_t* u = buffer + (quad - begin) * kVector;
            const int8_t* x = line.x + (int64_t)(segment.x_quad + q) * 4;
            Accumulated sums;
            sums.reset();
            for (; q < stop; q++, u += kVector, x += 4) sums.add(load(u), broadcast(x));
            sums.widen();
            total = add_sums(total, sums.total());
        }
        line.finish(i, total);
    }
}

// Results of `rows` consecutive rows of a part, from `first` on, for one token.
inline void deliver(const float* results, int rows, int64_t first, const Part& part, const Output& output, int64_t token) {
    float* y = output.y + token * output.stride;
    for (int i = 0; i < rows; i++) {
        const int64_t row = part.rows ? part.rows[first + i] : first + i;
        y[row] = output.bias ? results[i] + output.bias[row] : results[i];
    }
}

template <int bits>
void one_token(const Geometry& geometry, const Part& part, const Activations& x, const Output& output, int64_t first,
               int64_t last) {
    const int64_t block_bytes = codes_bytes(bits, geometry.quads), block_scales = (int64_t)geometry.groups * kRows;
    for (int64_t block = first; block < last; block++) {
        Line line{geometry, part.codes + block * block_bytes, part.scales + block * block_scales, x.codes,
                  x.scales, x.sums, part.lowest, no_floats()};
        remaining_segments<bits>(line, fast_segments<bits>(line));
        alignas(kVector) float results[kRows];
        store_floats(results, line.y);
        const int64_t rows = part.count - block * kRows;
        deliver(results, rows < kRows ? (int)rows : kRows, block * kRows, part, output, 0);
    }
}

// Many tokens ----------------------------------------------------------------------------------------------------

// A piece of a segment that lies in the unpacked slab, for some tokens from `token` on.
struct Piece {
    const uint8_t* u; // [quads, kTileBlocks, 64]
    int quads;
    const int8_t* x; // of the first token
    int64_t x_stride;
    const float* x_scales; // of this segment and the first token
    const int32_t* sums;
    int64_t x_count;          // segments: from one token to the next
    const uint16_t* w_scales[kTileBlocks];
    int lowest;
    bool begins, ends; // whether the piece holds the first and the last quad of its segment
};

template <int largest, int tokens>
__attribute__((noinline)) void tile(const Piece& piece, float* y, int32_t* totals) {
    constexpr int blocks = kTileBlocks, width = blocks * kRows;
    Accumulator<largest> sums[tokens][blocks]; // begun by hand: a loop over them would keep them in memory
    unroll<0, tokens>(UNROLL(t) { unroll<0, blocks>(UNROLL(b) { sums[t.value][b.value].reset(); }); });
    for (int q = 0; q < piece.quads;) {
        const int stop = q + smaller(piece.quads - q, Accumulator<largest>::capacity);
        const uint8_t* u = piece.u + (int64_t)q * blocks * kVector;
        const int8_t* x = piece.x + (int64_t)q * 4;
        for (; q < stop; q++, u += blocks * kVector, x += 4) {
            Bytes bytes[blocks];
            unroll<0, blocks>(UNROLL(b) { bytes[b.value] = load_once(u + b.value * kVector); });
            unroll<0, tokens>(UNROLL(t) {
                const Quad quad = broadcast(x + t.value * piece.x_stride);
                unroll<0, blocks>(UNROLL(b) { sums[t.value][b.value].add(bytes[b.value], quad); });
            });
        }
        unroll<0, tokens>(UNROLL(t) { unroll<0, blocks>(UNROLL(b) { sums[t.value][b.value].widen(); }); });
    }
    Floats w_scales[blocks];
    unroll<0, blocks>(UNROLL(b) { w_scales[b.value] = load_halves(piece.w_scales[b.value]); });
    unroll<0, tokens>(UNROLL(t) {
        const float x_scale = unit(piece.lowest) * piece.x_scales[t.value * piece.x_count];
        const int sum = piece.sums[t.value * piece.x_count];
        unroll<0, blocks>(UNROLL(b) {
            constexpr int at = t.value * width + b.value * kRows;
            Sums total = sums[t.value][b.value].total();
            if (!piece.begins) total = add_sums(total, load_sums(totals + at));
            if (piece.ends) {
                Floats results = load_floats(y + at);
                fold(results, settle(total, piece.lowest, sum), w_scales[b.value], x_scale);
                store_floats(y + at, results);
            } else {
                store_sums(totals + at, total);
            }
        });
    });
}

// The piece for `tokens` tokens, tile by tile.
template <int largest>
void tiles(Piece piece, int tokens, float* y, int32_t* totals) {
    constexpr int width = kTileBlocks * kRows;
    for (; tokens > 0; tokens -= kTileTokens) {
        const int now = smaller(tokens, kTileTokens);
        unroll<1, kTileTokens + 1>(UNROLL(n) {
            if (now == n.value) tile<largest, n.value>(piece, y, totals);
        });
        piece.x += now * piece.x_stride;
        piece.x_scales += now * piece.x_count;
        piece.sums += now * piece.x_count;
        y += now * width;
        totals += now * width;
    }
}

// Buffers of `many_tokens`.
struct Workspace {
    alignas(kVector) uint8_t slab[kSlab * kTileBlocks * kVector];
    alignas(kVector) float y[kTokenBlock * kTileBlocks * kRows];
    alignas(kVector) int32_t totals[kTokenBlock * kTileBlocks * kRows];
};

// The quads of up to kTileBlocks row blocks in [begin, end), side by side; blocks that are not there are left as is.
template <int bits>
void unpack_slab(const uint8_t* codes, int64_t block_bytes, int blocks, int begin, int end, uint8_t* slab) {
    for (int b = 0; b < blocks; b++)
        unpack<bits>(codes + b * block_bytes, begin, end, slab + b * kVector, kTileBlocks * kVector);
}

// Up to kTileBlocks row blocks times up to kTokenBlock tokens, from `token` on, into work.y.
template <int bits>
void row_blocks_times_tokens(const Geometry& geometry, const Part& part, const Activations& x, int64_t block,
                             int blocks, int64_t token, int tokens, Workspace& work) {
    const int64_t block_bytes = codes_bytes(bits, geometry.quads), block_scales = (int64_t)geometry.groups * kRows;
    const uint16_t* scales = part.scales + block * block_scales;
    memset(work.y, 0, sizeof(float) * tokens * kTileBlocks * kRows);
    int next = 0; // the first segment that is not finished
    for (int begin = 0; begin < geometry.quads; begin += kSlab) {
        const int end = smaller(begin + kSlab, geometry.quads);
        unpack_slab<bits>(part.codes + block * block_bytes, block_bytes, blocks, begin, end, work.slab);
        for (; next < geometry.count && geometry.segments[next].first_quad < end; next++) {
            const Segment& segment = geometry.segments[next];
            const int first = larger(begin, segment.first_quad);
            const int last = smaller(end, segment.first_quad + segment.quads);
            Piece piece;
            piece.u = work.slab + (int64_t)(first - begin) * kTileBlocks * kVector;
            piece.quads = last - first;
            piece.x_stride = (int64_t)geometry.x_quads * 4;
            piece.x = x.codes + token * piece.x_stride + (int64_t)(segment.x_quad + first - segment.first_quad) * 4;
            piece.x_count = geometry.count;
            piece.x_scales = x.scales + token * piece.x_count + next;
            piece.sums = x.sums + token * piece.x_count + next;
            // Blocks that are not there have results that nobody looks at; they borrow the scales of the last.
            for (int b = 0; b < kTileBlocks; b++)
                piece.w_scales[b] = scales + smaller(b, blocks - 1) * block_scales + (int64_t)segment.group * kRows;
            piece.lowest = part.lowest;
            piece.begins = first == segment.first_quad;
            piece.ends = last == segment.first_quad + segment.quads;
            tiles<largest_code(bits)>(piece, tokens, work.y, work.totals);
            if (!piece.ends) break;
        }
    }
}

template <int bits>
void many_tokens(const Geometry& geometry, const Part& part, const Activations& x, const Output& output, int64_t first,
                 int64_t last) {
    if (x.tokens == 0) return;
    Workspace* work;
    if (posix_memalign((void**)&work, kVector, sizeof(Workspace)) != 0) abort();
    memset(work->slab, 0, sizeof work->slab);
    // Token blocks of about equal length, in whole tiles: each of them unpacks all weights.
    const int64_t token_blocks = (x.tokens + kTokenBlock - 1) / kTokenBlock, tiles_each = token_blocks * kTileTokens;
    const int64_t most = (x.tokens + tiles_each - 1) / tiles_each * kTileTokens;
    for (int64_t token = 0; token < x.tokens; token += most) {
        const int tokens = x.tokens - token < most ? (int)(x.tokens - token) : (int)most;
        for (int64_t block = first; block < last; block += kTileBlocks) {
            const int blocks = last - block < kTileBlocks ? (int)(last - block) : kTileBlocks;
            row_blocks_times_tokens<bits>(geometry, part, x, block, blocks, token, tokens, *work);
            int64_t rows = part.count - block * kRows;
            if (rows > blocks * kRows) rows = blocks * kRows;
            for (int t = 0; t < tokens; t++)
                deliver(work->y + t * kTileBlocks * kRows, (int)rows, block * kRows, part, output, token + t);
        }
    }
    free(work);
}

// Ternary codes of 2 bits ------------------------------------------------------------------------------------------

// Row blocks of base-3 codes as those of 2-bit codes, for machines on which taking digits apart costs more than bytes.
void expand_ternary(const Geometry& geometry, const uint8_t* codes, int64_t blocks, uint8_t* out) {
    const int64_t block_bytes = codes_bytes(kTernary, geometry.quads);
    alignas(kVector) uint8_t slab[kSlab * kVector];
    for (int64_t block = 0; block < blocks; block++, codes += block_bytes)
        for (int begin = 0; begin < geometry.quads; begin += kSlab) {
            const int end = smaller(begin + kSlab, geometry.quads);
            memset(slab, 0, sizeof slab);
            unpack<kTernary>(codes, begin, end, slab, kVector);
            for (int q = 0; q < end - begin; q += 4, out += kVector) {
                const uint8_t* u = slab + q * kVector;
                const Bytes high = join<2>(load(u + 2 * kVector), load(u + 3 * kVector));
                const Bytes fields = join<2>(load(u), join<2>(load(u + kVector), high));
                alignas(kVector) uint8_t vector[kVector];
                store(vector, fields);
                memcpy(out, vector, kVector);
            }
        }
}

// To measure bandwidth: every word is looked at. Of the ways to do so this was the fastest.
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

// By format --------------------------------------------------------------------------------------------------------

template <int bits>
void linear_bits(const Geometry& geometry, const Part& part, const Activations& x, const Output& output, int64_t first,
                 int64_t last) {
    if (x.tokens == 1) {
        one_token<bits>(geometry, part, x, output, first, last);
    } else {
        many_tokens<bits>(geometry, part, x, output, first, last);
    }
}

// Row blocks [first, last) of a part.
void linear(const Geometry& geometry, const Part& part, const Activations& x, const Output& output, int64_t first,
            int64_t last) {
    unroll<0, 9>(UNROLL(bits) {
        if (part.bits == bits.value) linear_bits<bits.value>(geometry, part, x, output, first, last);
    });
}

} // namespace

#include "products_float.hpp"
