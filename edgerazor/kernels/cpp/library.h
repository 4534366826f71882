/* The C interface of the kernel library: packed matrices, row block by row block.

   Pointers go to memory in the layout of a packed model; nothing is repacked. No function keeps a pointer, takes a lock
   or starts a thread: callers share out row blocks (of 16 rows) among threads of their own. `isa` is the number of an
   instruction set that this machine can run; the last one is the best. Arguments are not checked here, but in
   `kernels/native.py`. */
#ifndef EDGERAZOR_LIBRARY_H
#define EDGERAZOR_LIBRARY_H
#include <stdint.h>

#define EDGERAZOR_API __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

/* How the rows of matrices with so many columns are cut into segments, for groups of weights and of activations. */
typedef struct edgerazor_row_layout edgerazor_row_layout;

/* The rows of a matrix that have one format. */
typedef struct {
    const uint8_t* codes;   /* [row blocks, bytes of a block] */
    const uint16_t* scales; /* fp16 [row blocks, groups, 16] */
    const int32_t* rows;    /* [count] the row of the matrix that each of these rows is; null: rows 0 to count - 1 */
    int64_t count;          /* rows */
    int32_t bits;           /* 0 for ternary, 1 to 8 */
    int32_t min_level_x2;   /* twice the level of the lowest code: -2 for ternary, -3 for int2, -16 for int4 */
} edgerazor_format_rows;

/* How a format searches for the scales of least squared error. Candidates are ratios of a base, which is a multiple of
   the group's root mean square. */
typedef struct {
    const float* ratios;      /* [count] candidate scales, divided by the base */
    int32_t count;
    int32_t refinements;      /* steps from the best candidate's codes to the best scale for them */
    float rms_factor;         /* the base is this many root mean squares of the group, */
    float absmax_units;       /* but at most this scale, in units of the search, at which the highest level is the largest
                                 weight; it is a candidate, too. 0: no limit and no such candidate */
    float min_code, max_code; /* from -128 to 127 */
    int32_t mid_rise;         /* 0: the level of a code is the code, and the nearest level is taken; 1: the level is the
                                 middle of the interval from the code to the next one, in which the weight lies */
} edgerazor_scale_search;

/* The codes of a format, and what they stand for. */
typedef struct {
    float min_code, max_code; /* from -128 to 127 */
    int32_t mid_rise;         /* as above */
} edgerazor_code_range;

/* Rows of a matrix of weights [all rows, columns], of which each group has a scale. */
typedef struct {
    const float* weights;
    const float* scales; /* [all rows, groups] */
    const int64_t* rows; /* [count] numbers of the rows */
    int64_t count, columns, group;
} edgerazor_weight_rows;

/* SHA-256 of the sources that the library was built from, like `build.fingerprint`. */
EDGERAZOR_API const char* edgerazor_sources(void);

EDGERAZOR_API int edgerazor_isa_count(void);
EDGERAZOR_API const char* edgerazor_isa_name(int isa);

/* Null where an argument is below 1, or there is no memory. */
EDGERAZOR_API edgerazor_row_layout* edgerazor_row_layout_new(int32_t columns, int32_t group_size,
                                                             int32_t activation_group_size);
EDGERAZOR_API void edgerazor_row_layout_free(edgerazor_row_layout* layout);

/* Sizes of what `edgerazor_quantize` writes for a token, and of the codes of a row block. */
EDGERAZOR_API int64_t edgerazor_activation_bytes(const edgerazor_row_layout* layout);
EDGERAZOR_API int64_t edgerazor_segments(const edgerazor_row_layout* layout);
EDGERAZOR_API int64_t edgerazor_block_bytes(const edgerazor_row_layout* layout, int32_t bits);

/* Quantizes x [tokens, columns] to codes [tokens, activation bytes], scales and sums of codes [tokens, segments]. bits:
   2 to 8. scale: of all activations, or 0 to compute one for each group of each token. Returns -1, or the first token
   with a number that is not finite. */
EDGERAZOR_API int64_t edgerazor_quantize(const edgerazor_row_layout* layout, int isa, const float* x, int64_t tokens,
                                         int32_t bits, float scale, int8_t* codes, float* scales, int32_t* sums);

/* x R, or x R^T where `back`, for the rows of x [rows, columns], into out [rows, columns], which may be x: section
   "Rotation" of packed/FORMAT.md, to the bit. block: a power of two from 2 to 512 that divides `columns`. signs:
   bits, as they are stored. */
EDGERAZOR_API void edgerazor_rotate(int isa, const float* x, int64_t rows, int32_t columns, int32_t block,
                                    const uint8_t* signs, int32_t back, float* out);

/* y = W x + bias for the row blocks [first_block, last_block) of these rows, into y [tokens, stride]; other elements of
   y are not written. bias [rows of the matrix], or null. */
EDGERAZOR_API void edgerazor_linear(const edgerazor_row_layout* layout, int isa, const edgerazor_format_rows* rows,
                                    int64_t tokens, const int8_t* codes, const float* scales, const int32_t* sums,
                                    const float* bias, float* y, int64_t stride, int64_t first_block,
                                    int64_t last_block);

/* y = W x + bias for float32 activations x [tokens, columns]. The order of the sums, and so the last bits of the
   results, depend on the instruction set. */
EDGERAZOR_API void edgerazor_linear_float(const edgerazor_row_layout* layout, int isa,
                                          const edgerazor_format_rows* rows, int64_t tokens, const float* x,
                                          const float* bias, float* y, int64_t stride, int64_t first_block,
                                          int64_t last_block);

/* Writes the float32 weights [columns] of one of the rows: of an embedding, for example. */
EDGERAZOR_API void edgerazor_dequantize_row(const edgerazor_row_layout* layout, const edgerazor_format_rows* rows,
                                            int64_t row, float* weights);

/* Row blocks of ternary codes as row blocks of 2-bit codes (bits = 2, min_level_x2 = -2): a fourth more bytes, which
   take fewer steps to unpack. */
EDGERAZOR_API void edgerazor_expand_ternary(const edgerazor_row_layout* layout, int isa, const uint8_t* codes,
                                            int64_t blocks, uint8_t* out);

/* The fp16 scales [groups] of least squared error of groups [groups, size] of weights, as `formats` finds them, and the
   codes [groups, size] that these scales choose, unless `codes` is null. Returns -1, or the first group with a weight
   that is not finite, or -2 where there is no memory for `size` floats. */
EDGERAZOR_API int64_t edgerazor_least_error(int isa, const edgerazor_scale_search* settings, const float* weights,
                                            int64_t groups, int64_t size, uint16_t* scales, int8_t* codes);

/* What these weights are worth once they are rounded, into the same rows of `out` [all rows, columns], float32 or
   bfloat16: the level of each code times its scale, 0 where the scale is 0. Returns -1, or the first row with a weight
   that is not finite. */
EDGERAZOR_API int64_t edgerazor_round_weights(int isa, const edgerazor_code_range* range,
                                              const edgerazor_weight_rows* rows, int32_t to_bfloat16, void* out);

/* The gradients of the weights [all rows, columns] and of their scales [all rows, groups], which are positive, by LSQ
   (`formats/core/lsq.py`), from that of the rounded weights [all rows, columns]; only these rows are written. */
EDGERAZOR_API void edgerazor_learned_gradients(int isa, const edgerazor_code_range* range,
                                               const edgerazor_weight_rows* rows, const float* gradient,
                                               float* to_weights, float* to_scales);

/* The `FloatKernels` of an instruction set (float_kernels.hpp), for tests. */
EDGERAZOR_API const void* edgerazor_float_kernels(int isa);

/* Reads memory once, as fast as possible, and returns the exclusive or of all words: measures the bandwidth. */
EDGERAZOR_API uint64_t edgerazor_read(int isa, const uint64_t* words, int64_t count);

#ifdef __cplusplus
}
#endif
#endif
