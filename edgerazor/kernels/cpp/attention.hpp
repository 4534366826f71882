// Attention over the KV cache. Included by `float_kernels.cpp`, once for each instruction set.
//
// It is one algorithm for one token (decode) and for many (prefill): flash attention on a CPU. The KV slots are visited
// in blocks of 64, every block by tiles of query rows whose sums stay in registers, with an online softmax that moves
// along with the blocks (Milakov and Gimelshein, arXiv 1805.02867): each row keeps its largest score and its sum of
// exponentials so far, and what it has added up is corrected when a larger score comes.
//
//   attention          all query rows of a call, kMaxQueryRows at a time
//     attend_rows      one set of query rows, KV block by KV block
//       attend_block   one KV block, kTileRows query rows at a time
//         attend_tile  qk_scores -> online_softmax_step -> accumulate_pv
#pragma once
#include <stdint.h>
#include <string.h>

#include "f32x16.hpp"
#include "float_kernels.hpp"
#include "vector_math.hpp"

namespace {

using namespace edgerazor;

// Blocks of KV slots --------------------------------------------------------------------------------------------------

constexpr int kBlockSlots = kTablePageSlots; // KV slots of a block
constexpr int kMaxQueryRows = 96; // query rows whose results stay in the CPU's cache

// Consecutive KV slots of one page, at most up to the next multiple of kBlockSlots.
struct KvBlock {
    int range;            // 0: the prefix, 1: the sequence's own slots
    int64_t begin;        // in the range
    int64_t slots_before; // in the order in which tokens see them
    int count;            // 0: there is no such block
    int slot;             // in the page
    const KvPage* page;
};

KvBlock block_at(const AttentionArgs& args, int range, int64_t begin) {
    for (; range < 2 && begin >= args.ranges[range].count; range++) begin = 0;
    if (range == 2) return {};
    const int64_t slot = slot_at(args.ranges[range].slot, args.ranges[range].pages, begin);
    const int64_t count = smaller(kBlockSlots - slot % kBlockSlots, args.ranges[range].count - begin);
    const int64_t slots_before = begin + (range == 0 ? 0 : args.ranges[0].count);
    return {range, begin, slots_before, (int)count, (int)(slot % kPageSlots), args.pages + slot / kPageSlots};
}

// Features of a head in the order of computation. With 4 bits, the even ones come first and then the odd ones, as
// nibbles are unpacked; an odd head_dim has one more feature, which is 0.
int feature_count(const AttentionArgs& args) { return args.bits == 4 ? (args.head_dim + 1) / 2 * 2 : args.head_dim; }

int feature_index(const AttentionArgs& args, int feature) {
    return args.bits == 4 ? feature / 2 + feature % 2 * (feature_count(args) / 2) : feature;
}

// The codes of a block in the KV cache. While one block is in use, the next one is prefetched.
struct KvCodes {
    const uint8_t *keys, *values;
};

KvCodes codes_at(const AttentionArgs& args, const KvBlock& block) {
    const int64_t before = block.slot * kv_vector_bytes(args.bits, args.head_dim);
    return {(const uint8_t*)block.page->keys + before, (const uint8_t*)block.page->values + before};
}

// What to prefetch during the last block of a call: the first one of the next call, or nothing new.
KvCodes after(const AttentionArgs& args, const KvCodes& codes) {
    return args.next_keys == nullptr ? codes
                                     : KvCodes{(const uint8_t*)args.next_keys, (const uint8_t*)args.next_values};
}

// A block as the products read it. T is float, or int8_t for codes.
template <class T>
struct KvOperands {
    const T* keys;                             // [columns, features, 16]
    const T* values;                           // [slots, value_stride]
    int64_t features, value_stride;
    KvCodes next;                              // to prefetch: the next block, or this one if it is in the scratch
    int columns;                               // columns of 16 keys that may be read
    float soft_cap;                            // of scores; 0: none
    alignas(64) float key_scales[kBlockSlots]; // times the scale of q * k; 0 after the last slot
    alignas(64) float value_scales[kBlockSlots];
};

template <class T>
KvOperands<T> operands_in_scratch(const T* keys, const T* values, int64_t features, int64_t value_stride) {
    return {keys, values, features, value_stride, {(const uint8_t*)keys, (const uint8_t*)values}};
}

// The buffers of a call.
struct AttentionScratch {
    float* queries;                  // [tiles, features, rows of the tile]
    float* results;                  // [rows, width]: sums of probabilities * values so far
    float* totals;                   // [rows, 16]: sums of exponentials so far, in 16 lanes
    float* maxima;                   // [rows]: the largest score so far
    float *keys, *values;            // of a block: [columns, features, 16] and [kBlockSlots, width]
    int8_t *key_codes, *value_codes; // of 4 bits: [columns, features, 16] and [kBlockSlots, features]
    int64_t bytes;
};

constexpr int64_t padded_width(int64_t features) { return (features + 15) / 16 * 16; }

AttentionScratch scratch_at(void* memory, int head_dim, int64_t rows) {
    uintptr_t end = (uintptr_t)memory;
    const auto take = [&end](int64_t bytes) {
        const uintptr_t begin = end;
        end += (bytes + 63) / 64 * 64;
        return begin;
    };
    const int64_t width = padded_width(head_dim), number = sizeof(float);
    AttentionScratch scratch;
    scratch.queries = (float*)take(number * rows * width);
    scratch.results = (float*)take(number * rows * width);
    scratch.totals = (float*)take(number * rows * 16);
    scratch.maxima = (float*)take(number * rows);
    scratch.keys = (float*)take(number * kBlockSlots * width);
    scratch.values = (float*)take(number * kBlockSlots * width);
    scratch.key_codes = (int8_t*)take(kBlockSlots * width);
    scratch.value_codes = (int8_t*)take(kBlockSlots * width);
    scratch.bytes = (int64_t)(end - (uintptr_t)memory);
    return scratch;
}

int64_t attention_scratch_bytes(int head_dim, int heads, int tokens) {
    return scratch_at(nullptr, head_dim, smaller(kMaxQueryRows, (int64_t)heads * tokens)).bytes;
}

// KV blocks as operands -----------------------------------------------------------------------------------------------

typedef uint8_t ByteLanes __attribute__((vector_size(4 * kLanes)));
typedef uint8_t EightBytes __attribute__((vector_size(8)));

// Bytes of two 4-bit codes each: the codes of the low nibbles as int8, and those of the high ones.
template <class Bytes>
EDGERAZOR_INLINE void unpack_nibbles(const uint8_t* pairs, int8_t* low, int8_t* high) {
    Bytes both;
    memcpy(&both, pairs, sizeof both);
    const Bytes first = (both & 15) - 8, second = (both >> 4) - 8;
    memcpy(low, &first, sizeof first);
    memcpy(high, &second, sizeof second);
}

// Rows of `count` bytes of two codes each, to rows of the codes of the low nibbles followed by those of the high ones.
void unpack_nibble_rows(const uint8_t* pairs, int rows, int64_t count, const uint8_t* next, int8_t* codes) {
    for (int row = 0; row < rows; row++, pairs += count, next += count, codes += 2 * count) {
        int64_t i = 0;
        for (; i + (int)sizeof(ByteLanes) <= count; i += sizeof(ByteLanes)) {
            __builtin_prefetch(next + i);
            unpack_nibbles<ByteLanes>(pairs + i, codes + i, codes + count + i);
        }
        for (; i + 8 <= count; i += 8) unpack_nibbles<EightBytes>(pairs + i, codes + i, codes + count + i);
        for (; i < count; i++) unpack_nibbles<uint8_t>(pairs + i, codes + i, codes + count + i);
    }
}

// A block as codes of a byte each: where they are or, with 4 bits, in the scratch.
KvOperands<int8_t> int8_operands(const AttentionArgs& args, const KvCodes& block, const KvCodes& next, int columns,
                                 int count, const AttentionScratch& scratch) {
    const int64_t features = feature_count(args);
    if (args.bits == 8) return {(const int8_t*)block.keys, (const int8_t*)block.values, features, features, next};
    unpack_nibble_rows(block.keys, columns, features / 2 * kKeyLanes, next.keys, scratch.key_codes);
    unpack_nibble_rows(block.values, count, features / 2, next.values, scratch.value_codes);
    return operands_in_scratch(scratch.key_codes, scratch.value_codes, features, features);
}

// Rows [rows, features] to floats [rows, width], with 0 after the features.
template <class T>
void convert_rows(const T* x, int rows, int64_t features, float* out) {
    const int64_t width = padded_width(features);
    for (int row = 0; row < rows; row++, x += features, out += width) {
        int64_t i = 0;
        for (; i + 16 <= features; i += 16) store(out + i, load(x + i));
        for (; i < width; i++) out[i] = i < features ? (float)x[i] : 0.0f;
    }
}

// A block as floats in the scratch; an unquantized one stays where it is if the width allows it.
KvOperands<float> f32_operands(const AttentionArgs& args, const KvCodes& block, const KvCodes& next, int columns,
                               int count, const AttentionScratch& scratch) {
    const int64_t features = feature_count(args), width = padded_width(features);
    if (args.bits == 16 && width == features)
        return {(const float*)block.keys, (const float*)block.values, features, width, next};
    if (args.bits == 16) {
        convert_rows((const float*)block.values, count, features, scratch.values);
        return {(const float*)block.keys, scratch.values, features, width,
                {next.keys, (const uint8_t*)scratch.values}};
    }
    const KvOperands<int8_t> codes = int8_operands(args, block, next, columns, count, scratch);
    convert_rows(codes.keys, columns, features * kKeyLanes, scratch.keys);
    convert_rows(codes.values, count, features, scratch.values);
    return operands_in_scratch(scratch.keys, scratch.values, features, width);
}

template <class T>
void set_scales(const AttentionArgs& args, const KvBlock& block, int columns, KvOperands<T>& kv) {
    kv.columns = columns;
    kv.soft_cap = args.soft_cap;
    memset(kv.key_scales, 0, sizeof kv.key_scales);
    memset(kv.value_scales, 0, sizeof kv.value_scales);
    if (args.bits == 16) {
        for (int i = 0; i < block.count; i++) kv.key_scales[i] = args.scale;
        for (int i = 0; i < block.count; i++) kv.value_scales[i] = 1.0f;
    } else {
        const float* const of_keys = block.page->key_scales + block.slot;
        for (int i = 0; i < block.count; i++) kv.key_scales[i] = of_keys[i] * args.scale;
        memcpy(kv.value_scales, block.page->value_scales + block.slot, sizeof(float) * block.count);
    }
}

// Tiles of query rows -------------------------------------------------------------------------------------------------

// Query rows whose sums stay in registers.
struct QueryTile {
    const float* queries; // [features, rows]
    float* results;       // [rows, width]
    float* totals;        // [rows, 16]
    float* maxima;        // [rows]
    int from[kTileRows], to[kTileRows]; // the slots of the block that each row sees; neither decreases from row to row
};

template <int rows, int columns, class T>
EDGERAZOR_INLINE void qk_scores(const KvOperands<T>& kv, int column, const float* queries, float* scores) {
    f32x16 sums[rows][columns];
    clear_tile(sums);
    const int64_t size = kv.features * kKeyLanes;
    multiply_tile(queries, 1, rows, kv.keys + column * size, size, kKeyLanes, kv.features,
                  kv.next.keys + column * size * sizeof(T), sums);
    unroll<0, rows>(UNROLL(r) {
        unroll<0, columns>(UNROLL(c) {
            store(scores + r.value * kBlockSlots + (column + c.value) * 16, sums[r.value][c.value]);
        });
    });
}

alignas(64) constexpr int32_t kLaneNumbers[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

// x in the lanes from <= lane < to, -infinity in the others: the causal mask and the sliding window.
EDGERAZOR_INLINE f32x16 mask_scores(f32x16 x, int from, int to) {
    if (from <= 0 && to >= 16) return x;
    const i32x16 lanes = load_i32(kLaneNumbers);
    return map_registers(UNROLL(i) {
        const IntLanes visible = (lanes.reg[i.value] >= from) & (lanes.reg[i.value] < to);
        return visible ? x.reg[i.value] : splat_lanes(-kInfinity);
    });
}

// One step of the online softmax: scores become probabilities, but for a factor of each row that is known after the
// last block, times the scales of the values. corrections: the factors by which the results of earlier blocks are off.
template <int rows, class T>
EDGERAZOR_INLINE void online_softmax_step(const KvOperands<T>& kv, const QueryTile& tile, int columns, float* scores,
                                          float* corrections) {
    alignas(64) float decrease[16] = {};
    for (int r = 0; r < rows; r++) {
        f32x16 most = splat(-kInfinity);
        for (int c = 0; c < columns; c++) {
            float* at = scores + r * kBlockSlots + c * 16;
            f32x16 score = load(at) * load(kv.key_scales + c * 16);
            if (kv.soft_cap > 0) score = splat(kv.soft_cap) * tanh(score / splat(kv.soft_cap));
            const f32x16 masked = mask_scores(score, tile.from[r] - c * 16, tile.to[r] - c * 16);
            most = max(masked, most);
            store(at, masked);
        }
        if (tile.from[r] >= tile.to[r]) continue;
        const float largest = reduce_max(most), before = tile.maxima[r];
        tile.maxima[r] = largest > before ? largest : before;
        decrease[r] = before - tile.maxima[r];
    }
    store(corrections, exp(load(decrease)));
    for (int r = 0; r < rows; r++) {
        f32x16 total = load(tile.totals + r * 16) * splat(corrections[r]);
        const f32x16 most = splat(tile.from[r] < tile.to[r] ? tile.maxima[r] : 0);
        for (int c = 0; c < columns; c++) {
            float* at = scores + r * kBlockSlots + c * 16;
            const f32x16 probability = exp(load(at) - most);
            total = total + probability;
            store(at, probability * load(kv.value_scales + c * 16));
        }
        store(tile.totals + r * 16, total);
    }
}

// results = results * corrections + probabilities * values, for 16 * columns features.
template <int rows, int columns, class T>
EDGERAZOR_INLINE void accumulate_pv(const KvOperands<T>& kv, const float* probabilities, const float* corrections,
                                    int from, int to, int64_t feature, int64_t width, float* results) {
    f32x16 sums[rows][columns];
    unroll<0, rows>(UNROLL(r) {
        const f32x16 correction = splat(corrections[r.value]);
        unroll<0, columns>(UNROLL(c) {
            sums[r.value][c.value] = load(results + r.value * width + feature + c.value * 16) * correction;
        });
    });
    multiply_tile(probabilities + from, kBlockSlots, 1, kv.values + from * kv.value_stride + feature, 16,
                  kv.value_stride, to - from, kv.next.values + feature * (to - from) * sizeof(T), sums);
    unroll<0, rows>(UNROLL(r) {
        unroll<0, columns>(UNROLL(c) {
            store(results + r.value * width + feature + c.value * 16, sums[r.value][c.value]);
        });
    });
}

template <int rows, class T>
__attribute__((noinline)) void attend_tile(const KvOperands<T>& kv, const QueryTile& tile) {
    constexpr int wide = tile_columns(rows);
    const int from = tile.from[0], to = tile.to[rows - 1], columns = (to + 15) / 16;
    if (from >= to) return;
    alignas(64) float scores[rows * kBlockSlots], corrections[16];
    int column = 0;
    for (; column + 1 < columns && column + wide <= kv.columns; column += wide)
        qk_scores<rows, wide>(kv, column, tile.queries, scores);
    for (; column < columns; column++) qk_scores<rows, 1>(kv, column, tile.queries, scores);
    online_softmax_step<rows>(kv, tile, columns, scores, corrections);
    const int64_t width = padded_width(kv.features);
    int64_t feature = 0;
    for (; feature + 16 * wide <= width; feature += 16 * wide)
        accumulate_pv<rows, wide>(kv, scores, corrections, from, to, feature, width, tile.results);
    for (; feature < width; feature += 16)
        accumulate_pv<rows, 1>(kv, scores, corrections, from, to, feature, width, tile.results);
}

// Query rows and blocks -----------------------------------------------------------------------------------------------

// Some query rows of a call: row `t * heads + h` is query head h of token t.
struct QueryRows {
    const AttentionArgs& args;
    const AttentionScratch& scratch;
    int64_t first;
    int count;

    int64_t token(int64_t row) const { return (first + row) / args.heads; }

    // The row sees the slots [low, high), counted in the order in which tokens see them.
    int64_t high(int64_t row) const {
        return args.ranges[0].count + args.ranges[1].count - (args.tokens - 1 - token(row));
    }

    int64_t low(int64_t row) const {
        return args.sliding_window > 0 ? larger(0, high(row) - args.sliding_window) : 0;
    }

    const float* query(int row) const {
        return args.queries + token(row) * args.query_stride + (first + row) % args.heads * args.head_dim;
    }

    float* out(int row) const {
        return args.out + token(row) * args.out_stride + (first + row) % args.heads * args.head_dim;
    }

    QueryTile tile(int row) const {
        QueryTile tile;
        tile.queries = scratch.queries + (int64_t)row * feature_count(args);
        tile.results = scratch.results + row * padded_width(feature_count(args));
        tile.totals = scratch.totals + (int64_t)row * 16;
        tile.maxima = scratch.maxima + row;
        return tile;
    }
};

// Packs the queries tile by tile, and clears the state of the online softmax.
void begin_rows(const QueryRows& rows) {
    const int64_t features = feature_count(rows.args);
    memset(rows.scratch.queries, 0, sizeof(float) * features * rows.count);
    for (int row = 0; row < rows.count; row++) {
        const int r = row % kTileRows, count = (int)smaller(kTileRows, rows.count - (row - r));
        float* packed = rows.scratch.queries + (row - r) * features + r;
        const float* query = rows.query(row);
        for (int i = 0; i < rows.args.head_dim; i++) packed[feature_index(rows.args, i) * count] = query[i];
        rows.scratch.maxima[row] = -kInfinity;
    }
    memset(rows.scratch.totals, 0, sizeof(float) * 16 * rows.count);
    memset(rows.scratch.results, 0, sizeof(float) * padded_width(features) * rows.count);
}

// Divides the results by the sums of exponentials.
void finish_rows(const QueryRows& rows) {
    for (int row = 0; row < rows.count; row++) {
        const float* results = rows.scratch.results + row * padded_width(feature_count(rows.args));
        const float factor = 1.0f / reduce_add(load(rows.scratch.totals + (int64_t)row * 16));
        float* out = rows.out(row);
        if (rows.args.bits == 4)
            for (int i = 0; i < rows.args.head_dim; i++) out[i] = results[feature_index(rows.args, i)] * factor;
        else
            for (int i = 0; i < rows.args.head_dim; i++) out[i] = results[i] * factor;
    }
}

template <class T>
void attend_block(const QueryRows& rows, const KvBlock& block, int columns, KvOperands<T>&& kv) {
    set_scales(rows.args, block, columns, kv);
    for (int row = 0; row < rows.count; row += kTileRows) {
        const int count = (int)smaller(kTileRows, rows.count - row);
        QueryTile tile = rows.tile(row);
        for (int r = 0; r < count; r++) {
            tile.from[r] = (int)larger(0, smaller(rows.low(row + r) - block.slots_before, block.count));
            tile.to[r] = (int)larger(0, smaller(rows.high(row + r) - block.slots_before, block.count));
        }
        unroll<1, kTileRows + 1>(UNROLL(n) {
            if (count == n.value) attend_tile<n.value>(kv, tile);
        });
    }
}

void attend_rows(const QueryRows& rows) {
    const AttentionArgs& args = rows.args;
    // A single tile reads each vector of codes but once, so that it is not worth converting them to floats first.
    const bool single_tile = rows.count <= kTileRows && feature_count(args) % 16 == 0;
    begin_rows(rows);
    for (KvBlock block = block_at(args, 0, 0); block.count > 0;) {
        const KvBlock next = block_at(args, block.range, block.begin + block.count);
        if (block.slots_before + block.count > rows.low(0) && block.slots_before < rows.high(rows.count - 1)) {
            // A block that begins at a multiple of kBlockSlots can be read as a whole, however many slots are in use.
            const int columns =
                block.slot % kBlockSlots == 0 ? kBlockSlots / kKeyLanes : (block.count + kKeyLanes - 1) / kKeyLanes;
            const KvCodes codes = codes_at(args, block);
            const KvCodes next_codes = next.count > 0 ? codes_at(args, next) : after(args, codes);
            if (args.bits != 16 && single_tile)
                attend_block(rows, block, columns,
                             int8_operands(args, codes, next_codes, columns, block.count, rows.scratch));
            else
                attend_block(rows, block, columns,
                             f32_operands(args, codes, next_codes, columns, block.count, rows.scratch));
        }
        block = next;
    }
    finish_rows(rows);
}

void attention(const AttentionArgs& args) {
    const int64_t rows = (int64_t)args.heads * args.tokens;
    const AttentionScratch scratch = scratch_at(args.scratch, args.head_dim, smaller(kMaxQueryRows, rows));
    for (int64_t first = 0; first < rows; first += kMaxQueryRows)
        attend_rows({args, scratch, first, (int)smaller(kMaxQueryRows, rows - first)});
}

} // namespace
