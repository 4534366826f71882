/* The plain C interface of the decoder: a whole transformer on packed matrices, with its cache and its threads.

   A decoder keeps pointers to weights, which must stay; it copies everything else. Arguments are not checked here;
   `kernels/decoder.py` does that. One thread at a time may call a decoder, of the process that made it alone: its threads
   do not survive a fork, and a child that calls it, or frees it, waits for them forever. */
#ifndef EDGERAZOR_DECODER_H
#define EDGERAZOR_DECODER_H
#include "library.h"

#ifdef __cplusplus
extern "C" {
#endif

/* y = W x + bias. */
typedef struct {
    const edgerazor_geometry* geometry; /* of its columns; the group of activations is its own, or all columns where
                                           `scale` is given */
    const edgerazor_part* parts;        /* [part_count], the formats of its rows */
    int32_t part_count;
    int32_t rows;
    const float* bias; /* [rows], or null */
    float scale;       /* of all activations, where it is stored; 0: found for each group of each token */
} edgerazor_matrix;

enum { EDGERAZOR_NO_NORM = 0, EDGERAZOR_RMS_NORM = 1, EDGERAZOR_LAYER_NORM = 2 };

typedef struct {
    int32_t kind;
    float epsilon;
    const float* weight; /* [features], null: ones */
    const float* bias;   /* [features], null: zeros */
} edgerazor_norm;

/* states += after_attention(o(attention(q, k, v)(before_attention(states))))
   states += after_mlp(down(silu(gate(x)) * up(x))),  x = before_mlp(states) */
typedef struct {
    edgerazor_matrix q, k, v, o, gate, up, down;
    edgerazor_norm before_attention, after_attention, before_mlp, after_mlp;
    edgerazor_norm q_norm, k_norm; /* before the rotary embedding: of each head, or of all heads as one vector */
    int32_t rotary;                /* leading features of a head that the rotary embedding turns; 0: none */
    int32_t window;                /* latest positions that a token sees, its own among them; 0: all */
} edgerazor_layer;

typedef struct {
    int32_t hidden, heads, kv_heads, head_dim, intermediate, vocabulary;
    int32_t norm_all_heads;  /* q_norm and k_norm are of all heads as one vector */
    int32_t activation_bits; /* 2 to 8; 16: as they are */
    int32_t kv_bits;         /* 4 or 8; 16: as they are, in float32 */
    float attention_scale;   /* of q * k */
    float embedding_scale;   /* of rows of the embedding */
    float logit_scale;
    int32_t rotary_features; /* in a row of the tables of cosines and sines are half as many */
    edgerazor_matrix embedding, head; /* the embedding's bias and scale are not used */
    edgerazor_norm final_norm;
    const edgerazor_layer* layers; /* [layer_count] */
    int32_t layer_count;
} edgerazor_model;

/* Consecutive new tokens of a sequence. The cache is a row of cells, one for each token; ranges of them begin at
   multiples of 16. The tokens see the cells of a prefix (those of another sequence, or none), those of their own
   sequence from `cell` on, and one another; their keys and values go to cells from `cell + own` on. Token i has the
   position prefix + own + i. A run may see cells that an earlier run of the same call writes. */
typedef struct {
    int64_t prefix_cell, prefix; /* first cell, count */
    int64_t cell, own;           /* first cell, count so far */
    int64_t count;               /* new tokens, at least 1 */
} edgerazor_run;

typedef struct edgerazor_decoder edgerazor_decoder;

enum { EDGERAZOR_OK = 0, EDGERAZOR_NO_MEMORY = 1, EDGERAZOR_NOT_FINITE = 2 };

/* Null where there is no memory, or a thread cannot be created. `threads` counts the caller's own. */
EDGERAZOR_API edgerazor_decoder* edgerazor_decoder_new(const edgerazor_model* model, int isa, int threads);
EDGERAZOR_API void edgerazor_decoder_free(edgerazor_decoder* decoder);

/* Cosines and sines [positions, rotary_features / 2] of the next calls; they stay the caller's. */
EDGERAZOR_API void edgerazor_decoder_rotary(edgerazor_decoder* decoder, const float* cosines, const float* sines);

/* Memory for that many cells, if there is less; what is in the cache stays. */
EDGERAZOR_API int edgerazor_decoder_reserve(edgerazor_decoder* decoder, int64_t cells);
EDGERAZOR_API int64_t edgerazor_decoder_cache_bytes(const edgerazor_decoder* decoder);

/* tokens: of all runs, one run after the other. wanted: indices of tokens [count], in any order, repeated or not.
   logits: [count, vocabulary]. */
EDGERAZOR_API int edgerazor_decoder_logits(edgerazor_decoder* decoder, const edgerazor_run* runs, int64_t run_count,
                                           const int32_t* tokens, const int64_t* wanted, int64_t count, float* logits);

/* log_probabilities [count]: of the token targets[i] after the token wanted[i]; best [count]: the most probable ones,
   the first of equal ones. */
EDGERAZOR_API int edgerazor_decoder_scores(edgerazor_decoder* decoder, const edgerazor_run* runs, int64_t run_count,
                                           const int32_t* tokens, const int64_t* wanted, const int32_t* targets,
                                           int64_t count, float* log_probabilities, int32_t* best);

/* Greedy: after the token `token` at `run` (whose count is 1), writes up to `count` most probable tokens to `out`, stops
   behind one of stops [stop_count]; written: how many. The cells that they take must be reserved. */
EDGERAZOR_API int edgerazor_decoder_greedy(edgerazor_decoder* decoder, const edgerazor_run* run, int32_t token,
                                           const int32_t* stops, int64_t stop_count, int64_t count, int32_t* out,
                                           int64_t* written);

/* One layer alone, in place: states [tokens, hidden]. For tests. */
EDGERAZOR_API int edgerazor_decoder_layer(edgerazor_decoder* decoder, int32_t layer, const edgerazor_run* runs,
                                          int64_t run_count, float* states);

#ifdef __cplusplus
}
#endif
#endif
