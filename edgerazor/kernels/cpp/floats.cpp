// The functions of `floats.hpp`, for the instruction set that the options of this compilation allow; EDGERAZOR_UNIT
// names it. Attention is one algorithm for one token and for many: blocks of 64 cells, tiles of query rows whose sums
// stay in registers, and a softmax that goes along with the blocks (Milakov and Gimelshein, arXiv 1805.02867).
#include "floats.hpp"

#include "quantize.hpp"
#include "sixteen.hpp"

namespace {

constexpr float kMost = __builtin_huge_valf();

EDGERAZOR_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
EDGERAZOR_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// Elementary functions ---------------------------------------------------------------------------------------------

// exp(x) to about 1e-7: x = n ln 2 + r with a whole n, and the Taylor series of exp(r). 2^n goes as two factors, since
// it may be smaller or larger than a normal number.
EDGERAZOR_INLINE Lanes exponential(Lanes x) {
    constexpr float kShift = 12582912.0f; // 1.5 * 2^23: added to a small number, it leaves the integer in the low bits
    const Lanes shifted = multiply_add(x, fill_lanes(1.44269504089f), fill_lanes(kShift));
    const Lanes n = shifted - kShift;
    // ln 2 in two numbers, the first short, so that n times it is exact.
    const Lanes close = multiply_add(n, fill_lanes(-0.693359375f), x);
    const Lanes r = multiply_add(n, fill_lanes(2.12194440e-4f), close);
    Lanes sum = fill_lanes(1.0f / 5040);
    sum = multiply_add(sum, r, fill_lanes(1.0f / 720));
    sum = multiply_add(sum, r, fill_lanes(1.0f / 120));
    sum = multiply_add(sum, r, fill_lanes(1.0f / 24));
    sum = multiply_add(sum, r, fill_lanes(1.0f / 6));
    sum = multiply_add(sum, r, fill_lanes(0.5f));
    sum = multiply_add(sum, r, fill_lanes(1.0f));
    sum = multiply_add(sum, r, fill_lanes(1.0f));
    const UnsignedLanes whole = (UnsignedLanes)shifted - bits_of(kShift);
    const UnsignedLanes half = (UnsignedLanes)((IntLanes)whole >> 1);
    return sum * (Lanes)((half + 127) << 23) * (Lanes)((whole - half + 127) << 23);
}

// Beyond the bounds the result is 0 or infinity.
EDGERAZOR_INLINE Sixteen exponential(Sixteen x) {
    const Sixteen bounded = clamp(x, -104.0f, 89.0f);
    return in_parts(UNROLL(i) { return exponential(bounded.part[i.value]); });
}

// The first `count` of 16 numbers, `rest` for others.
EDGERAZOR_INLINE Sixteen load_some(const float* p, int64_t count, float rest) {
    if (count >= 16) return load(p);
    float x[16];
    for (int i = 0; i < 16; i++) x[i] = i < count ? p[i] : rest;
    return load(x);
}

EDGERAZOR_INLINE void store_some(float* p, int64_t count, Sixteen x) {
    if (count >= 16) return store(p, x);
    float all[16];
    store(all, x);
    memcpy(p, all, sizeof(float) * count);
}

// The sum of function(sixteen of x) over x; of numbers that are `rest` it must be 0.
template <class Function>
EDGERAZOR_INLINE float sum_over(const float* x, int64_t count, float rest, Function&& function) {
    Sixteen sum = fill(0);
    for (int64_t i = 0; i < count; i += 16) sum = sum + function(load_some(x + i, count - i, rest));
    return sum_of(sum);
}

// Norms and other functions of vectors ----------------------------------------------------------------------------

EDGERAZOR_INLINE Sixteen square(Sixteen x) { return x * x; }

void rms_norm(const float* x, int count, float epsilon, const float* weight, float* out) {
    const float squares = sum_over(x, count, 0, square);
    const float scale = 1.0f / __builtin_sqrtf(squares / (float)count + epsilon);
    for (int i = 0; i < count; i++) out[i] = weight ? x[i] * scale * weight[i] : x[i] * scale;
}

void layer_norm(const float* x, int count, float epsilon, const float* weight, const float* bias, float* out) {
    const float mean = sum_over(x, count, 0, [](Sixteen each) { return each; }) / (float)count;
    const float squares = sum_over(x, count, mean, [mean](Sixteen each) { return square(each - fill(mean)); });
    const float scale = 1.0f / __builtin_sqrtf(squares / (float)count + epsilon);
    for (int i = 0; i < count; i++) {
        const float normal = (x[i] - mean) * scale;
        out[i] = normal * (weight ? weight[i] : 1.0f) + (bias ? bias[i] : 0.0f);
    }
}

void rotate(float* head, int rotary, const float* cosines, const float* sines) {
    const int half = rotary / 2;
    for (int i = 0; i < half; i++) {
        const float first = head[i], second = head[half + i];
        head[i] = first * cosines[i] - second * sines[i];
        head[half + i] = second * cosines[i] + first * sines[i];
    }
}

void swiglu(const float* gate, const float* up, int count, float* out) {
    for (int i = 0; i < count; i += 16) {
        const Sixteen x = load_some(gate + i, count - i, 0);
        const Sixteen silu = x / (fill(1) + exponential(fill(0) - x));
        store_some(out + i, count - i, silu * load_some(up + i, count - i, 0));
    }
}

void add(float* x, const float* y, int count) {
    for (int i = 0; i < count; i++) x[i] += y[i];
}

float largest_value(const float* x, int64_t count) {
    Sixteen most = fill(-kMost);
    for (int64_t i = 0; i < count; i += 16) most = larger(load_some(x + i, count - i, -kMost), most);
    return largest_of(most);
}

int32_t largest(const float* x, int64_t count) {
    const float most = largest_value(x, count);
    for (int64_t i = 0; i < count; i++)
        if (x[i] == most) return (int32_t)i;
    return 0;
}

float log_sum_exp(const float* x, int64_t count) {
    constexpr int64_t kPiece = 4096; // float sums of more would lose digits
    const float most = largest_value(x, count);
    if (most == kMost || most == -kMost) return most;
    double total = 0;
    for (int64_t i = 0; i < count; i += kPiece)
        total += (double)sum_over(x + i, smaller(kPiece, count - i), -kMost,
                                  [most](Sixteen each) { return exponential(each - fill(most)); });
    return most + (float)__builtin_log(total);
}

// Into the cache ---------------------------------------------------------------------------------------------------

// Hands the codes of a key or value to keep(first feature, count, codes), some at a time; false where a number is not
// finite. The rules are those of `formats.fake_quantize_kv`.
template <class Keep>
EDGERAZOR_INLINE bool quantize_head(const float* x, int head_dim, int bits, float& scale, Keep&& keep) {
    constexpr int kSome = 256;
    const int maximum = (1 << (bits - 1)) - 1;
    const uint32_t magnitude = largest_magnitude(x, head_dim);
    if (magnitude >= kInfinity) return false;
    const float exact = float_of(magnitude) / (float)maximum;
    scale = round_to_half(exact < 65504.0f ? exact : 65504.0f);
    int8_t codes[kSome + 1] = {};
    for (int first = 0; first < head_dim; first += kSome) {
        const int count = (int)smaller(kSome, head_dim - first);
        if (scale > 0) round_ratios(x + first, count, scale, maximum, codes);
        codes[count] = 0; // beside the last feature of an odd head_dim
        keep(first, count, codes);
    }
    return true;
}

uint8_t two_codes(const int8_t* codes) { return (uint8_t)((codes[0] + 8) | (codes[1] + 8) << 4); }

bool store_numbers(const HeadPage& page, int cell, int head_dim, const float* key, const float* value) {
    if (largest_magnitude(key, head_dim) >= kInfinity || largest_magnitude(value, head_dim) >= kInfinity) return false;
    float* keys = (float*)page.keys + (int64_t)(cell / kKeys) * head_dim * kKeys + cell % kKeys;
    for (int i = 0; i < head_dim; i++) keys[i * kKeys] = key[i];
    memcpy((float*)page.values + (int64_t)cell * head_dim, value, sizeof(float) * head_dim);
    return true;
}

bool store_cell(const HeadPage& page, int cell, int bits, int head_dim, const float* key, const float* value) {
    if (bits == 16) return store_numbers(page, cell, head_dim, key, value);
    const int64_t bytes = key_bytes(bits, head_dim);
    uint8_t* keys = (uint8_t*)page.keys + cell / kKeys * bytes * kKeys + cell % kKeys;
    uint8_t* values = (uint8_t*)page.values + cell * bytes;
    const auto keep = [bits](uint8_t* at, int step) {
        return [=](int first, int count, const int8_t* codes) {
            if (bits == 8)
                for (int i = 0; i < count; i++) at[(first + i) * step] = (uint8_t)codes[i];
            else
                for (int i = 0; i < count; i += 2) at[(first + i) / 2 * step] = two_codes(codes + i);
        };
    };
    return quantize_head(key, head_dim, bits, page.key_scales[cell], keep(keys, kKeys)) &&
           quantize_head(value, head_dim, bits, page.value_scales[cell], keep(values, 1));
}

// Attention: blocks of cells ---------------------------------------------------------------------------------------

constexpr int kCells = 64;     // of a block
constexpr int kBlockRows = 96; // query rows whose results stay in the cache

// Cells of one page that lie in a row, at most to the next multiple of kCells.
struct Block {
    int range;
    int64_t begin; // in the range
    int64_t seen;  // cells in sight before it
    int count;     // 0: there is no such block
    int cell;      // in the page
    const HeadPage* page;
};

Block block_at(const Attention& work, int range, int64_t begin) {
    for (; range < 2 && begin >= work.ranges[range].count; range++) begin = 0;
    if (range == 2) return {};
    const int64_t cell = work.ranges[range].cell + begin;
    const int64_t count = smaller(kCells - cell % kCells, work.ranges[range].count - begin);
    const int64_t seen = begin + (range == 0 ? 0 : work.ranges[0].count);
    return {range, begin, seen, (int)count, (int)(cell % kPage), work.pages + cell / kPage};
}

// Features as they are computed with. Of 4 bits first the even ones, then the odd ones, as halves of bytes give them;
// of an odd number one more, which is 0.
int features_of(const Attention& work) { return work.bits == 4 ? (work.head_dim + 1) / 2 * 2 : work.head_dim; }

int place_of(const Attention& work, int feature) {
    return work.bits == 4 ? feature / 2 + feature % 2 * (features_of(work) / 2) : feature;
}

// What a block has in the cache. While one is in use the next is prefetched.
struct Stored {
    const uint8_t *keys, *values;
};

Stored stored_at(const Attention& work, const Block& block) {
    const int64_t before = block.cell * key_bytes(work.bits, work.head_dim);
    return {(const uint8_t*)block.page->keys + before, (const uint8_t*)block.page->values + before};
}

// A block as products take it: T is float, or int8_t for codes.
template <class T>
struct Cells {
    const T* keys;                        // [columns, features, 16]
    const T* values;                      // [cells, value_step]
    int64_t features, value_step;
    Stored next;                          // to prefetch: the next block, or these if they are in the scratch
    int columns;                          // of 16 keys that can be read
    alignas(64) float key_scales[kCells]; // times the scale of q * k; 0 behind the last cell
    alignas(64) float value_scales[kCells];
};

template <class T>
Cells<T> in_scratch(const T* keys, const T* values, int64_t features, int64_t value_step) {
    return {keys, values, features, value_step, {(const uint8_t*)keys, (const uint8_t*)values}};
}

// Buffers of a call.
struct Scratch {
    float* queries;                  // [tiles, features, rows of the tile]
    float* results;                  // [rows, width]
    float* totals;                   // [rows, 16]
    float* maxima;                   // [rows]
    float *keys, *values;            // of a block: [columns, features, 16] and [kCells, width]
    int8_t *key_codes, *value_codes; // of 4 bits: [columns, features, 16] and [kCells, features]
    int64_t bytes;
};

constexpr int64_t width_of(int64_t features) { return (features + 15) / 16 * 16; }

Scratch scratch_at(void* memory, int head_dim, int64_t rows) {
    uintptr_t end = (uintptr_t)memory;
    const auto take = [&end](int64_t bytes) {
        const uintptr_t begin = end;
        end += (bytes + 63) / 64 * 64;
        return begin;
    };
    const int64_t width = width_of(head_dim), number = sizeof(float);
    Scratch scratch;
    scratch.queries = (float*)take(number * rows * width);
    scratch.results = (float*)take(number * rows * width);
    scratch.totals = (float*)take(number * rows * 16);
    scratch.maxima = (float*)take(number * rows);
    scratch.keys = (float*)take(number * kCells * width);
    scratch.values = (float*)take(number * kCells * width);
    scratch.key_codes = (int8_t*)take(kCells * width);
    scratch.value_codes = (int8_t*)take(kCells * width);
    scratch.bytes = (int64_t)(end - (uintptr_t)memory);
    return scratch;
}

int64_t attention_scratch(int head_dim, int heads, int tokens) {
    return scratch_at(nullptr, head_dim, smaller(kBlockRows, (int64_t)heads * tokens)).bytes;
}

typedef uint8_t ByteLanes __attribute__((vector_size(4 * kLanes)));
typedef uint8_t EightBytes __attribute__((vector_size(8)));

// Bytes with two codes of 4 bits each: those of the low halves as int8, and those of the high ones.
template <class Bytes>
EDGERAZOR_INLINE void split_some(const uint8_t* pairs, int8_t* low, int8_t* high) {
    Bytes both;
    memcpy(&both, pairs, sizeof both);
    const Bytes first = (both & 15) - 8, second = (both >> 4) - 8;
    memcpy(low, &first, sizeof first);
    memcpy(high, &second, sizeof second);
}

// Rows of `count` bytes with two codes each: those of the low halves, then those of the high ones.
void split(const uint8_t* pairs, int rows, int64_t count, const uint8_t* next, int8_t* codes) {
    for (int row = 0; row < rows; row++, pairs += count, next += count, codes += 2 * count) {
        int64_t i = 0;
        for (; i + (int)sizeof(ByteLanes) <= count; i += sizeof(ByteLanes)) {
            __builtin_prefetch(next + i);
            split_some<ByteLanes>(pairs + i, codes + i, codes + count + i);
        }
        for (; i + 8 <= count; i += 8) split_some<EightBytes>(pairs + i, codes + i, codes + count + i);
        for (; i < count; i++) split_some<uint8_t>(pairs + i, codes + i, codes + count + i);
    }
}

// The codes of a block: where they are, or, of 4 bits, a byte each in the scratch.
Cells<int8_t> codes_of(const Attention& work, const Stored& now, const Stored& next, int columns, int count,
                       const Scratch& scratch) {
    const int64_t features = features_of(work);
    if (work.bits == 8) return {(const int8_t*)now.keys, (const int8_t*)now.values, features, features, next};
    split(now.keys, columns, features / 2 * kKeys, next.keys, scratch.key_codes);
    split(now.values, count, features / 2, next.values, scratch.value_codes);
    return in_scratch(scratch.key_codes, scratch.value_codes, features, features);
}

// Rows [rows, features] as [rows, width] floats; the numbers behind the features are 0.
template <class T>
void widen(const T* x, int rows, int64_t features, float* out) {
    const int64_t width = width_of(features);
    for (int row = 0; row < rows; row++, x += features, out += width) {
        int64_t i = 0;
        for (; i + 16 <= features; i += 16) store(out + i, load(x + i));
        for (; i < width; i++) out[i] = i < features ? (float)x[i] : 0.0f;
    }
}

// A block as floats in the scratch; those of 16 bits stay where they are if they can.
Cells<float> floats_of(const Attention& work, const Stored& now, const Stored& next, int columns, int count,
                       const Scratch& scratch) {
    const int64_t features = features_of(work), width = width_of(features);
    if (work.bits == 16 && width == features)
        return {(const float*)now.keys, (const float*)now.values, features, width, next};
    if (work.bits == 16) {
        widen((const float*)now.values, count, features, scratch.values);
        return {(const float*)now.keys, scratch.values, features, width, {next.keys, (const uint8_t*)scratch.values}};
    }
    const Cells<int8_t> codes = codes_of(work, now, next, columns, count, scratch);
    widen(codes.keys, columns, features * kKeys, scratch.keys);
    widen(codes.values, count, features, scratch.values);
    return in_scratch(scratch.keys, scratch.values, features, width);
}

template <class T>
void describe(const Attention& work, const Block& block, int columns, Cells<T>& cells) {
    cells.columns = columns;
    for (int i = 0; i < kCells; i++) {
        const bool there = i < block.count, coded = there && work.bits != 16;
        cells.key_scales[i] = coded ? block.page->key_scales[block.cell + i] * work.scale : there ? work.scale : 0;
        cells.value_scales[i] = coded ? block.page->value_scales[block.cell + i] : there ? 1.0f : 0;
    }
}

// Attention: tiles of query rows -----------------------------------------------------------------------------------

// Query rows whose sums stay in registers.
struct Tile {
    const float* queries; // [features, rows]
    float* results;       // [rows, width]
    float* totals;        // [rows, 16]
    float* maxima;        // [rows]
    int from[kTileRows], to[kTileRows]; // what they see of the block; neither ever decreases from row to row
};

template <int rows, int columns, class T>
EDGERAZOR_INLINE void score_columns(const Cells<T>& cells, int column, const float* queries, float* scores) {
    Sixteen sums[rows][columns];
    clear(sums);
    const int64_t size = cells.features * kKeys;
    multiply(queries, 1, rows, cells.keys + column * size, size, kKeys, cells.features,
                      cells.next.keys + column * size * sizeof(T), sums);
    unroll<0, rows>(UNROLL(r) {
        unroll<0, columns>(UNROLL(c) {
            store(scores + r.value * kCells + (column + c.value) * 16, sums[r.value][c.value]);
        });
    });
}

alignas(64) constexpr int32_t kNumbers[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

// x where from <= number of the lane < to, elsewhere -infinity.
EDGERAZOR_INLINE Sixteen visible(Sixteen x, int from, int to) {
    if (from <= 0 && to >= 16) return x;
    const SixteenInts numbers = load_ints(kNumbers);
    return in_parts(UNROLL(i) {
        const IntLanes in_sight = (numbers.part[i.value] >= from) & (numbers.part[i.value] < to);
        return in_sight ? x.part[i.value] : fill_lanes(-kMost);
    });
}

// Sums of q * k to probabilities, but for a factor of each row that is known behind the last block, times the scales of
// the values. corrections: what the results of earlier blocks have to be multiplied by.
template <int rows, class T>
EDGERAZOR_INLINE void soften(const Cells<T>& cells, const Tile& tile, int columns, float* scores, float* corrections) {
    alignas(64) float before[16] = {};
    for (int r = 0; r < rows; r++) {
        Sixteen most = fill(-kMost);
        for (int c = 0; c < columns; c++) {
            float* at = scores + r * kCells + c * 16;
            const Sixteen score = load(at) * load(cells.key_scales + c * 16);
            const Sixteen seen = visible(score, tile.from[r] - c * 16, tile.to[r] - c * 16);
            most = larger(seen, most);
            store(at, seen);
        }
        if (tile.from[r] >= tile.to[r]) continue;
        const float largest = largest_of(most), old = tile.maxima[r];
        tile.maxima[r] = largest > old ? largest : old;
        before[r] = old - tile.maxima[r];
    }
    store(corrections, exponential(load(before)));
    for (int r = 0; r < rows; r++) {
        Sixteen total = load(tile.totals + r * 16) * fill(corrections[r]);
        const Sixteen most = fill(tile.from[r] < tile.to[r] ? tile.maxima[r] : 0);
        for (int c = 0; c < columns; c++) {
            float* at = scores + r * kCells + c * 16;
            const Sixteen probability = exponential(load(at) - most);
            total = total + probability;
            store(at, probability * load(cells.value_scales + c * 16));
        }
        store(tile.totals + r * 16, total);
    }
}

// results = results * corrections + probabilities * values, 16 * columns features of them.
template <int rows, int columns, class T>
EDGERAZOR_INLINE void add_values(const Cells<T>& cells, const float* probabilities, const float* corrections, int from,
                                 int to, int64_t feature, int64_t width, float* results) {
    Sixteen sums[rows][columns];
    unroll<0, rows>(UNROLL(r) {
        const Sixteen correction = fill(corrections[r.value]);
        unroll<0, columns>(UNROLL(c) {
            sums[r.value][c.value] = load(results + r.value * width + feature + c.value * 16) * correction;
        });
    });
    multiply(probabilities + from, kCells, 1, cells.values + from * cells.value_step + feature, 16, cells.value_step,
                        to - from, cells.next.values + feature * (to - from) * sizeof(T), sums);
    unroll<0, rows>(UNROLL(r) {
        unroll<0, columns>(UNROLL(c) {
            store(results + r.value * width + feature + c.value * 16, sums[r.value][c.value]);
        });
    });
}

template <int rows, class T>
__attribute__((noinline)) void see(const Cells<T>& cells, const Tile& tile) {
    constexpr int wide = tile_columns(rows);
    const int from = tile.from[0], to = tile.to[rows - 1], columns = (to + 15) / 16;
    if (from >= to) return;
    alignas(64) float scores[rows * kCells], corrections[16];
    int column = 0;
    for (; column < columns && column + wide <= cells.columns; column += wide)
        score_columns<rows, wide>(cells, column, tile.queries, scores);
    for (; column < columns; column++) score_columns<rows, 1>(cells, column, tile.queries, scores);
    soften<rows>(cells, tile, columns, scores, corrections);
    const int64_t width = width_of(cells.features);
    int64_t feature = 0;
    for (; feature + 16 * wide <= width; feature += 16 * wide)
        add_values<rows, wide>(cells, scores, corrections, from, to, feature, width, tile.results);
    for (; feature < width; feature += 16)
        add_values<rows, 1>(cells, scores, corrections, from, to, feature, width, tile.results);
}

// Attention: rows and blocks ---------------------------------------------------------------------------------------

// Some query rows of a call: row `t * heads + h` is head h of token t.
struct Rows {
    const Attention& work;
    const Scratch& scratch;
    int64_t first;
    int count;

    int64_t token(int64_t row) const { return (first + row) / work.heads; }

    // Cells that the row sees, [low, high) of all.
    int64_t high(int64_t row) const {
        return work.ranges[0].count + work.ranges[1].count - (work.tokens - 1 - token(row));
    }

    int64_t low(int64_t row) const { return work.window > 0 ? larger(0, high(row) - work.window) : 0; }

    const float* query(int row) const {
        return work.queries + token(row) * work.query_stride + (first + row) % work.heads * work.head_dim;
    }

    float* out(int row) const {
        return work.out + token(row) * work.out_stride + (first + row) % work.heads * work.head_dim;
    }

    Tile tile(int row) const {
        Tile tile;
        tile.queries = scratch.queries + (int64_t)row * features_of(work);
        tile.results = scratch.results + row * width_of(features_of(work));
        tile.totals = scratch.totals + (int64_t)row * 16;
        tile.maxima = scratch.maxima + row;
        return tile;
    }
};

void begin(const Rows& rows) {
    const int64_t features = features_of(rows.work);
    memset(rows.scratch.queries, 0, sizeof(float) * features * rows.count);
    for (int row = 0; row < rows.count; row++) {
        const int r = row % kTileRows, count = (int)smaller(kTileRows, rows.count - (row - r));
        float* packed = rows.scratch.queries + (row - r) * features + r;
        const float* query = rows.query(row);
        for (int i = 0; i < rows.work.head_dim; i++) packed[place_of(rows.work, i) * count] = query[i];
        rows.scratch.maxima[row] = -kMost;
    }
    memset(rows.scratch.totals, 0, sizeof(float) * 16 * rows.count);
    memset(rows.scratch.results, 0, sizeof(float) * width_of(features) * rows.count);
}

void finish(const Rows& rows) {
    for (int row = 0; row < rows.count; row++) {
        const float* results = rows.scratch.results + row * width_of(features_of(rows.work));
        const float factor = 1.0f / sum_of(load(rows.scratch.totals + (int64_t)row * 16));
        float* out = rows.out(row);
        for (int i = 0; i < rows.work.head_dim; i++) out[i] = results[place_of(rows.work, i)] * factor;
    }
}

// All rows see a block.
template <class T>
void see_block(const Rows& rows, const Block& block, int columns, Cells<T>&& cells) {
    describe(rows.work, block, columns, cells);
    for (int row = 0; row < rows.count; row += kTileRows) {
        const int count = (int)smaller(kTileRows, rows.count - row);
        Tile tile = rows.tile(row);
        for (int r = 0; r < count; r++) {
            tile.from[r] = (int)larger(0, smaller(rows.low(row + r) - block.seen, block.count));
            tile.to[r] = (int)larger(0, smaller(rows.high(row + r) - block.seen, block.count));
        }
        unroll<1, kTileRows + 1>(UNROLL(n) {
            if (count == n.value) see<n.value>(cells, tile);
        });
    }
}

void attend_rows(const Rows& rows) {
    const Attention& work = rows.work;
    const bool few = rows.count <= kTileRows && features_of(work) % 16 == 0; // a vector of codes is read but once
    begin(rows);
    for (Block block = block_at(work, 0, 0); block.count > 0;) {
        const Block next = block_at(work, block.range, block.begin + block.count);
        if (block.seen + block.count > rows.low(0) && block.seen < rows.high(rows.count - 1)) {
            // A whole block of keys can be read from its beginning, whatever the number of cells in use.
            const int columns = block.cell % kCells == 0 ? kCells / kKeys : (block.count + kKeys - 1) / kKeys;
            const Stored now = stored_at(work, block), then = next.count > 0 ? stored_at(work, next) : now;
            if (work.bits != 16 && few)
                see_block(rows, block, columns, codes_of(work, now, then, columns, block.count, rows.scratch));
            else
                see_block(rows, block, columns, floats_of(work, now, then, columns, block.count, rows.scratch));
        }
        block = next;
    }
    finish(rows);
}

void attend(const Attention& work) {
    const int64_t rows = (int64_t)work.heads * work.tokens;
    const Scratch scratch = scratch_at(work.scratch, work.head_dim, smaller(kBlockRows, rows));
    for (int64_t first = 0; first < rows; first += kBlockRows)
        attend_rows({work, scratch, first, (int)smaller(kBlockRows, rows - first)});
}

} // namespace

#define EDGERAZOR_JOIN(a, b) a##b
#define EDGERAZOR_TABLE(unit) EDGERAZOR_JOIN(unit, _floats)

const Floats edgerazor::EDGERAZOR_TABLE(EDGERAZOR_UNIT) = {
    rms_norm, layer_norm, rotate, swiglu, add, store_cell, attend, attention_scratch, largest, log_sum_exp,
};
