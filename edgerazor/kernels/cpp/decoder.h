/* The C interface of the decoder: a whole transformer on packed matrices, with its KV cache and its thread pool.

   A decoder keeps pointers to the weights, which must outlive it; it copies everything else. Arguments are not checked
   here, but in `kernels/decoder.py`. A decoder may be called by one thread at a time, and only in the process that
   created it: its threads do not survive a fork, so a child process that calls it, or frees it, would wait for them
   forever. */
#ifndef EDGERAZOR_DECODER_H
#define EDGERAZOR_DECODER_H
#include "library.h"

#ifdef __cplusplus
extern "C" {
#endif

/* y = W x + bias. */
typedef struct {
    const edgerazor_row_layout* layout; /* of the columns; where `scale` is given, all columns are one group of activations */
    const edgerazor_format_rows* parts; /* [part_count], one for each format of rows */
    int32_t part_count;
    int32_t rows;
    const float* bias; /* [rows], or null */
    float scale;       /* static scale of all activations; 0: computed for each group of each token */
    int32_t block;     /* of the rotation of its columns, which its input gets, too; 0: none */
    const uint8_t* signs; /* of the rotation, bits as they are stored; matrices with a common input have the same one */
} edgerazor_matrix;

enum { EDGERAZOR_NO_NORM = 0, EDGERAZOR_RMS_NORM = 1, EDGERAZOR_LAYER_NORM = 2 };

typedef struct {
    int32_t kind;
    float epsilon;
    const float* weight; /* [features]; null: ones */
    const float* bias;   /* [features]; null: zeros */
} edgerazor_norm;

enum { EDGERAZOR_SILU = 0, EDGERAZOR_GELU_TANH = 1, EDGERAZOR_RELU_SQUARED = 2 };

/* What mixes tokens in a layer, mixer(x): its inputs are products with x, its result is the input of `o`.
     attention          inputs: q, k, v and perhaps a gate. Or q, k and v are the rows of one matrix, the first one. The
                        gate has a row for each head, or one for each feature of q; sigmoid(gate) is a factor of what
                        attention gives. With `gated_queries` the first matrix has, head by head, the rows of the query
                        and those of such a gate. Without v, the products of k are the values, too. A layer that attends
                        to the keys and values of an earlier one has neither k nor v.
     short convolution  inputs: one matrix [3 features, hidden_size], of b, c and y:  c * convolution(b * y)
     gated delta rule   inputs: q, k and v as one matrix, z, beta, alpha. A convolution with SiLU over q, k and v; then
                        for each value head with a state S [key_dim, value_dim], q and k of length 1:
                          S = S * exp(decay * softplus(alpha + decay_bias)),  S += k (sigmoid(beta) * (v - k S)),
                          state_norm(q S / sqrt(key_dim)) * silu(z)
   A convolution is causal, and has a filter for each feature: the sum of weight[i] * x of the token kernel - 1 - i
   before. */
enum { EDGERAZOR_ATTENTION = 0, EDGERAZOR_SHORT_CONVOLUTION = 1, EDGERAZOR_GATED_DELTA_RULE = 2 };

typedef struct {
    int32_t kernel;
    const float* weight; /* [kernel, features] */
    const float* bias;   /* [features], or null */
} edgerazor_convolution;

typedef struct {
    int32_t key_heads, value_heads, key_dim, value_dim; /* a key head is that of value_heads / key_heads value heads */
    const float *decay, *decay_bias;                    /* [value_heads] */
    edgerazor_norm state_norm;                          /* [value_dim] */
} edgerazor_delta_rule;

typedef struct {
    edgerazor_matrix gate, up, down;
} edgerazor_expert;

/* A mixture of experts in the place of an MLP: the sum of weight * down(activation(gate(x)) * up(x)) over the `chosen`
   experts whose score, plus their choice bias, is largest. The scores of experts are the softmax of router(x), or its
   sigmoid. A weight is a score; where `normalized`, divided by (the scores of the chosen experts together + epsilon);
   then times `scale` and the expert's own factor. All experts have matrices of the same sizes and groups, and without
   biases. x is before_mlp(residual). Or `before` is there instead; and `router_norm`, of which the router gets the result.
   In a layer with an MLP, too, what goes into after_mlp is after_mlp_alone(MLP) + after(experts). */
typedef struct {
    int32_t count, chosen;   /* of the experts; count 0: there is an MLP */
    int32_t sigmoid, normalized;
    float epsilon, scale;
    const float* router;      /* [count / 16 rounded up, hidden_size, 16]: a row for each expert, and rows of zeros */
    const float* choice_bias; /* [count], or null */
    const float* factors;     /* [count], or null */
    edgerazor_norm router_norm, before, after, after_mlp_alone;
    const edgerazor_expert* experts; /* [count] */
} edgerazor_experts;

/* residual += residual_scale * after_attention(o(mixer(before_attention(residual))))
   residual += residual_scale * after_mlp(down(activation(gate(x)) * up(x))),  x = before_mlp(residual)
   residual += residual_scale * after_input(input_o(activation(input_gate(residual)) * the layer's input))
   residual *= output_scale
   A matrix without parts is not there: no `up`, then `gate` has the rows of both; no `gate`, then down(activation(up(x))).
   With experts, none of the three need be there. Without `input_gate`, the layer has no input of its own. */
typedef struct {
    int32_t mixer;
    edgerazor_matrix inputs[4]; /* of the mixer */
    edgerazor_matrix o, gate, up, down, input_gate, input_o;
    edgerazor_norm before_attention, after_attention, before_mlp, after_mlp, after_input;
    edgerazor_norm q_norm, k_norm; /* of each head, or of all heads as one vector */
    edgerazor_norm v_norm;         /* of each head */
    int32_t num_heads, num_kv_heads, head_dim; /* of attention */
    int32_t kv_source;             /* number of the layer whose keys and values it attends to: its own, or that of an
                                      earlier one that has its own, with as many heads of the same width */
    int32_t rope_dim;              /* leading features of a head that RoPE rotates; 0: none */
    int32_t rope_table;            /* number of its table of cosines and sines */
    int32_t sliding_window;        /* latest positions that a token attends to, its own among them; 0: all */
    int32_t gated_queries;
    int32_t activation;
    float output_scale;
    edgerazor_convolution convolution;
    edgerazor_delta_rule delta_rule;
    edgerazor_experts experts;
} edgerazor_layer;

/* Inputs of single layers, of a token whose embedding is e: [layer_count, features] =
     scale * (norm(projection_scale * projection e) + table_scale * the token's row of the table)
   where the norm is one of each layer's features. */
typedef struct {
    int32_t features;       /* of the input of a layer; 0: there are none */
    edgerazor_matrix table; /* [vocab_size, layer_count * features]; its bias and scale are not used */
    const void* projection; /* [layer_count * features / 16 rounded up, hidden_size, 16]: its rows, and rows of zeros */
    int32_t half;           /* the projection is bfloat16, not float32 */
    edgerazor_norm norm;    /* [features] */
    float table_scale, projection_scale, scale;
} edgerazor_layer_inputs;

typedef struct {
    int32_t hidden_size, vocab_size;
    int32_t norm_all_heads;  /* q_norm and k_norm are of all heads as one vector */
    int32_t norm_after_rope; /* q_norm and k_norm come after RoPE instead of before */
    int32_t activation_bits; /* 2 to 8; 16: float32 activations, not quantized */
    int32_t kv_bits;         /* 4 or 8; 16: float32 keys and values, not quantized */
    float attention_scale;   /* of q * k */
    float embedding_scale;   /* of rows of the embedding */
    float logit_scale;
    float residual_scale;     /* of what a mixer or an MLP adds to the residual stream */
    float attention_soft_cap; /* scores become cap * tanh(score / cap); 0: as they are */
    float logit_soft_cap;     /* logits likewise, after logit_scale */
    int32_t rope_dim;         /* rows of a table of cosines and sines have half as many entries */
    int32_t rope_tables;      /* tables of cosines and sines */
    edgerazor_matrix embedding, head; /* the embedding's bias and scale are not used */
    edgerazor_norm final_norm;
    edgerazor_layer_inputs layer_inputs;
    const edgerazor_layer* layers; /* [layer_count] */
    int32_t layer_count;
} edgerazor_model;

/* Consecutive new tokens of a sequence. The KV cache is a row of slots, each of which holds one token's keys and
   values; the slots of a sequence are consecutive, and the first one's number is a multiple of 16. The new tokens
   attend to the slots of a prefix (which belong to another sequence; there may be none), to those of their own sequence
   from `slot` on, and to one another; their keys and values are stored from slot + past_length on. New token i has the
   position prefix_length + past_length + i. A span may attend to slots that an earlier span of the same call fills.

   Or the slots of a sequence are those of a page table, of EDGERAZOR_PAGE_SLOTS each: token i has slot i % 64 of page
   pages[i / 64], and page p has the slots from 64 p on. Several sequences may have a page in common, which they then
   only read. The results are those of a sequence whose consecutive slots begin at a multiple of 64, to the bit. */
typedef struct {
    int64_t prefix_slot, prefix_length; /* the prefix: first slot, number of tokens */
    int64_t slot, past_length;          /* the sequence: first slot, number of its tokens in the cache */
    int64_t count;                      /* new tokens, at least 1 */
    const int32_t* pages;               /* of past_length + count tokens; `slot` and a prefix are not used. Or null */
    int64_t state_in, state_out;        /* where mixers that are no attention keep what they know of earlier tokens: the
                                           state slot that is read first (-1: there are no earlier tokens), and the one
                                           that is written; they may be equal. Unused if there are no such mixers */
} edgerazor_sequence_span;

enum { EDGERAZOR_PAGE_SLOTS = 64 };

typedef struct edgerazor_decoder edgerazor_decoder;

enum { EDGERAZOR_OK = 0, EDGERAZOR_NO_MEMORY = 1, EDGERAZOR_NOT_FINITE = 2 };

/* Null where there is no memory, or a thread cannot be created. `threads` counts the caller's own. */
EDGERAZOR_API edgerazor_decoder* edgerazor_decoder_new(const edgerazor_model* model, int isa, int threads);
EDGERAZOR_API void edgerazor_decoder_free(edgerazor_decoder* decoder);

/* The cosines and sines [positions, rope_tables, rope_dim / 2] for the next calls, and factors of queries [positions], or
   null; the caller keeps them in memory. */
EDGERAZOR_API void edgerazor_decoder_set_rope(edgerazor_decoder* decoder, const float* cosines, const float* sines,
                                              const float* query_scales);

/* Makes the KV cache at least so many slots large; what is in it stays. */
EDGERAZOR_API int edgerazor_decoder_reserve_kv(edgerazor_decoder* decoder, int64_t slots);
EDGERAZOR_API int64_t edgerazor_decoder_kv_bytes(const edgerazor_decoder* decoder);

/* Makes room for so many state slots, of so many bytes each; what is in them stays. */
EDGERAZOR_API int edgerazor_decoder_reserve_states(edgerazor_decoder* decoder, int64_t count);
EDGERAZOR_API int64_t edgerazor_decoder_state_bytes(const edgerazor_decoder* decoder);
/* Copies a state to another slot. */
EDGERAZOR_API void edgerazor_decoder_copy_state(edgerazor_decoder* decoder, int64_t from, int64_t to);

/* Copies the keys and values of a page to another one. */
EDGERAZOR_API void edgerazor_decoder_copy_page(edgerazor_decoder* decoder, int32_t from, int32_t to);

/* tokens: of all spans, one span after the other. output_positions [count]: indices of tokens, in any order, repeated
   or not. logits [count, vocab_size]: after these tokens. */
EDGERAZOR_API int edgerazor_decoder_logits(edgerazor_decoder* decoder, const edgerazor_sequence_span* spans,
                                           int64_t span_count, const int32_t* tokens, const int64_t* output_positions,
                                           int64_t count, float* logits);

/* log_probabilities [count]: of the token targets[i] after the token at output_positions[i]; best [count]: the most
   probable tokens there, the first of equal ones. */
EDGERAZOR_API int edgerazor_decoder_scores(edgerazor_decoder* decoder, const edgerazor_sequence_span* spans,
                                           int64_t span_count, const int32_t* tokens, const int64_t* output_positions,
                                           const int32_t* targets, int64_t count, float* log_probabilities,
                                           int32_t* best);

/* A step of a batch. output_positions [count] ascend. logits [count, vocab_size]: after these tokens. best [count]: the
   most probable tokens there, the first of equal ones; -1 where its logit is not finite. log_totals [count]: the
   logarithms of the sums of exponentials of the logits, where wanted [count] is not 0; a logit less this is a
   log-probability. */
EDGERAZOR_API int edgerazor_decoder_step(edgerazor_decoder* decoder, const edgerazor_sequence_span* spans,
                                         int64_t span_count, const int32_t* tokens, const int64_t* output_positions,
                                         int64_t count, const uint8_t* wanted, float* logits, int32_t* best,
                                         float* log_totals);

/* Greedy decoding of sequences side by side, after tokens [span_count], the one new token of each of the spans: up to
   `count` steps, each of which writes the most probable tokens to out [count, span_count]. The last step is one in which
   a sequence wrote one of stops [stop_count], or during which *interrupt became other than 0, if there is one. written:
   how many steps. The slots of all steps must be reserved. interrupt: of another thread; or NULL. */
EDGERAZOR_API int edgerazor_decoder_greedy(edgerazor_decoder* decoder, const edgerazor_sequence_span* spans,
                                           int64_t span_count, const int32_t* tokens, const int32_t* stops,
                                           int64_t stop_count, int64_t count, const int32_t* interrupt, int32_t* out,
                                           int64_t* written);

/* One layer alone, in place: hidden_states [tokens, hidden_size]. For tests. */
EDGERAZOR_API int edgerazor_decoder_layer(edgerazor_decoder* decoder, int32_t layer,
                                          const edgerazor_sequence_span* spans, int64_t span_count,
                                          float* hidden_states);

#ifdef __cplusplus
}
#endif
#endif
