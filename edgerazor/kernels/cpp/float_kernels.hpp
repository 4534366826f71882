// What a decoder computes beside matrix products, as a table of functions that each instruction set fills in: norms,
// RoPE, SwiGLU (vector_math.hpp), storing into the KV cache (kv_store.hpp), attention (attention.hpp), mixers that keep a
// state (recurrent.hpp), and matrices that are not packed (unpacked_product.hpp).
#pragma once
#include <stddef.h>
#include <stdint.h>

#include "kv_page.hpp"

namespace edgerazor {

// The attention of the query heads that share a KV head, for consecutive tokens of a sequence.
struct AttentionArgs {
    int bits, head_dim;
    float scale;            // of q * k
    float soft_cap;         // of scores; 0: none
    const KvPage* pages;    // of this KV head, by the number of the page
    const float* queries;   // token t, query head h: queries + t * query_stride + h * head_dim
    int64_t query_stride;
    int heads, tokens;
    SlotRange ranges[2];    // the prefix, and the sequence's own KV slots up to and including that of the last token,
                            // which attends to all of them; the token before it attends to all but the last slot, ...
    int64_t sliding_window; // a token attends to this many of its latest slots, prefix and own together; 0: to all
    float* out;             // like the queries
    int64_t out_stride;
    void* scratch;          // attention_scratch_bytes(...) bytes, aligned to 64
    const void *next_keys, *next_values; // of the block that the next call reads first, to prefetch; or null
};

// A causal convolution of some features, for consecutive tokens of a sequence: [tokens, features] with row strides.
struct ConvolutionArgs {
    int64_t tokens, features;
    int kernel;
    float* x;
    int64_t x_stride;
    const float *before, *after; // like x, or null: factors of x, which is overwritten, and of the result
    const float* weight;         // [kernel, features]
    const float* bias;           // or null
    int64_t weight_stride;
    bool silu;                   // of the result
    const float* state_in;       // [kernel - 1, features]: x of the tokens before; null: there are none
    float* state_out;            // the same after the last token; it may be state_in
    int64_t state_stride;
    float* out;
    int64_t out_stride;
};

// The gated delta rule of a value head, for consecutive tokens of a sequence.
struct DeltaRuleArgs {
    int64_t tokens;
    int key_dim, value_dim;
    const float *q, *k, *v;      // token t: + t * stride
    int64_t stride;
    const float *decay, *beta;   // factors of token t: + t * factor_stride
    int64_t factor_stride;
    const float* state_in;       // [value_dim / 16 rounded up, key_dim, 16]; null: zeros
    float* state_out;            // it may be state_in
    float* lengths;              // [2, tokens]: scratch
    float* out;
    int64_t out_stride;
};

// The recurrence of a head of Mamba-2, for consecutive tokens of a sequence: S = S * decay + b (step * x), and then
// out = c S + skip * x.
struct StateSpaceArgs {
    int64_t tokens;
    int state_size, head_dim;
    float skip;
    const float *x, *b, *c;      // token t: + t * stride
    int64_t stride;
    const float *decay, *step;   // factors of token t: + t * factor_stride
    int64_t factor_stride;
    const float* state_in;       // [head_dim / 16 rounded up, state_size, 16]; null: zeros
    float* state_out;            // it may be state_in
    float* out;
    int64_t out_stride;
};

// The products of some tokens with a matrix that is not packed: out [tokens, 16 * blocks] = x [tokens, columns] times
// rows. The result of a token does not depend on the others.
struct UnpackedArgs {
    int64_t tokens, columns, blocks;
    const float* x;   // token t: + t * columns
    const void* rows; // [blocks, columns, 16]
    bool half;        // of bfloat16, not of float
    float* out;
    int64_t out_stride;
};

struct FloatKernels {
    void (*rms_norm)(const float* x, int count, float epsilon, const float* weight, float* out); // weight may be null
    void (*layer_norm)(const float* x, int count, float epsilon, const float* weight, const float* bias, float* out);
    // RoPE of the first `rope_dim` features of a head, in pairs (i, i + rope_dim / 2) like transformers' rotate_half.
    void (*rope)(float* head, int rope_dim, const float* cosines, const float* sines);
    // activation(gate) * up; where `up` is null, activation(gate). `up` may be `out`.
    void (*swiglu)(const float* gate, const float* up, int count, float* out); // SiLU
    void (*add)(float* x, const float* y, int count);                          // x += y
    // Quantizes a key and a value [head_dim] into a KV slot; returns false where a number is not finite.
    bool (*store_kv)(const KvPage& page, int slot_in_page, int bits, int head_dim, const float* key,
                     const float* value);
    void (*attention)(const AttentionArgs& args);
    int64_t (*attention_scratch_bytes)(int head_dim, int heads, int tokens); // for up to so many tokens of a call
    int32_t (*argmax)(const float* x, int64_t count);                        // the first one of equal elements
    float (*log_sum_exp)(const float* x, int64_t count);
    void (*geglu)(const float* gate, const float* up, int count, float* out); // GELU in its form with tanh; as swiglu
    void (*reglu_squared)(const float* gate, const float* up, int count, float* out); // the square of ReLU; as swiglu
    void (*sigmoid_gate)(const float* gate, int count, float* x); // x *= sigmoid(gate)
    void (*soft_cap)(float* x, int64_t count, float cap);         // x = cap * tanh(x / cap)
    void (*convolve)(const ConvolutionArgs& args);
    void (*delta_rule)(const DeltaRuleArgs& args);
    void (*state_space)(const StateSpaceArgs& args);
    void (*multiply_unpacked)(const UnpackedArgs& args);
    void (*add_scaled)(float* x, const float* y, float factor, int64_t count); // x += factor * y
};

extern const FloatKernels portable_float_kernels, avx2_float_kernels, avx2vnni_float_kernels, avx512_float_kernels,
    neon_float_kernels, i8mm_float_kernels;

// Of an instruction set that this machine can run, by its number.
const FloatKernels& float_kernels(int isa);

} // namespace edgerazor
