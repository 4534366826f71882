// What a decoder computes beside products with matrices: norms, rotary embedding, the cache, attention, SwiGLU. One
// source, `floats.cpp`, compiled once for each instruction set.
#pragma once
#include <stddef.h>
#include <stdint.h>

namespace edgerazor {

constexpr int kPage = 256; // cells of a page of the cache
constexpr int kKeys = 16;  // keys side by side

// The keys and values of one head in a page of the cache, by bits:
//   8:  keys int8 [kPage / 16, head_dim, 16], values int8 [kPage, head_dim]; codes -127 to 127
//   4:  keys uint8 [kPage / 16, head_dim / 2, 16], features 2 i in the low and 2 i + 1 in the high half; values uint8
//       [kPage, head_dim / 2], feature 2 i in the low and 2 i + 1 in the high half; code + 8, 1 to 15 (an odd head_dim
//       is rounded up, the last half 8)
//   16: keys float [kPage / 16, head_dim, 16], values float [kPage, head_dim]; no scales
// Scales are those of `formats.fake_quantize_kv`, rounded to fp16, kept as float.
struct HeadPage {
    void* keys;
    void* values;
    float* key_scales;   // [kPage]
    float* value_scales; // [kPage]
};

constexpr int64_t key_bytes(int bits, int head_dim) { // of one cell; those of its value are as many
    return bits == 16 ? 4 * (int64_t)head_dim : bits == 8 ? head_dim : (head_dim + 1) / 2;
}

// Some cells in a row, from a multiple of 16 on.
struct Range {
    int64_t cell, count;
};

// Queries of the heads that share a key head, of consecutive tokens of a run.
struct Attention {
    int bits, head_dim;
    float scale;              // of q * k
    const HeadPage* pages;    // of this head, by number of the page
    const float* queries;     // token t, query head h: queries + t * query_stride + h * head_dim
    int64_t query_stride;
    int heads, tokens;
    Range ranges[2];          // the prefix, and the run's own cells up to and including those of the last token; the
                              // last token sees all of them, the one before all but the last cell, and so on
    int64_t window;           // token with `n` cells to see (prefix and own together) sees the latest `window`; 0: all
    float* out;               // as queries
    int64_t out_stride;
    void* scratch;            // attention_scratch(...) bytes, aligned to 64
};

struct Floats {
    void (*rms_norm)(const float* x, int count, float epsilon, const float* weight, float* out);   // weight or null
    void (*layer_norm)(const float* x, int count, float epsilon, const float* weight, const float* bias, float* out);
    // The first `rotary` features of a head: pairs (i, i + rotary / 2), as transformers' rotate_half.
    void (*rotate)(float* head, int rotary, const float* cosines, const float* sines);
    void (*swiglu)(const float* gate, const float* up, int count, float* out); // silu(gate) * up
    void (*add)(float* x, const float* y, int count);                          // x += y
    // Rounds a key and a value [head_dim] into a cell; false where a number is not finite.
    bool (*store)(const HeadPage& page, int cell_in_page, int bits, int head_dim, const float* key, const float* value);
    void (*attend)(const Attention& attention);
    int64_t (*attention_scratch)(int head_dim, int heads, int tokens); // bytes for as many tokens of a call
    // The largest element's index (the first of equal ones), and log(sum(exp(x))).
    int32_t (*largest)(const float* x, int64_t count);
    float (*log_sum_exp)(const float* x, int64_t count);
};

extern const Floats portable_floats, avx2_floats, avx2vnni_floats, avx512_floats, neon_floats, i8mm_floats;

// Of an instruction set that this machine can run, by its number.
const Floats& floats_at(int isa);

} // namespace edgerazor
