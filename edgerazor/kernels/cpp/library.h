/* The plain C interface of the library of kernels.

   Pointers go to memory as a packed model stores it; nothing is repacked. No function keeps a pointer, locks or starts
   a thread: callers share out row blocks (16 rows) among their threads. `isa` counts the instruction sets that this
   machine can run, the best one last. Arguments are not checked here; `kernels/native.py` does that. */
#ifndef EDGERAZOR_LIBRARY_H
#define EDGERAZOR_LIBRARY_H
#include <stdint.h>

#define EDGERAZOR_API __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

/* How the rows of matrices of `columns` columns are cut, for groups of weights and of activations. */
typedef struct edgerazor_geometry edgerazor_geometry;

/* The rows of a matrix that have one format. */
typedef struct {
    const uint8_t* codes;   /* [row blocks, bytes of a block] */
    const uint16_t* scales; /* fp16 [row blocks, groups, 16] */
    const int32_t* rows;    /* [count] where each row's result goes; null: in order */
    int64_t count;          /* rows */
    int32_t bits;           /* 0 for ternary, 1 to 8 */
    int32_t lowest;         /* twice the level of the lowest code: -2 for ternary, -3 for int2, -16 for int4 */
} edgerazor_part;

/* How a format searches for the scales of least squared error: `Ladder` of formats/_least_error.py. */
typedef struct {
    const float* shares;   /* [count] of the base */
    int32_t count;
    int32_t refinements;   /* of the best */
    float spread;          /* the base is at most this many root mean squares of the group */
    float reaching;        /* units of the scale whose highest level is the largest weight, which the base does not
                              exceed and which is tried; 0: as large as it comes */
    float lowest, highest; /* codes, from -128 to 127 */
    int32_t middle;        /* 0: the level of a code is the code, the nearest one is taken; 1: it is the middle of the
                              interval from the code to the next, in which the weight lies */
} edgerazor_ladder;

/* SHA-256 of the sources it was built from, as `build.fingerprint` finds it. */
EDGERAZOR_API const char* edgerazor_sources(void);

EDGERAZOR_API int edgerazor_isa_count(void);
EDGERAZOR_API const char* edgerazor_isa_name(int isa);

/* Null where an argument is below 1. */
EDGERAZOR_API edgerazor_geometry* edgerazor_geometry_new(int32_t columns, int32_t group, int32_t activation_group);
EDGERAZOR_API void edgerazor_geometry_free(edgerazor_geometry* geometry);

/* Sizes of what `edgerazor_quantize` writes for a token, and of a row block of codes. */
EDGERAZOR_API int64_t edgerazor_activation_bytes(const edgerazor_geometry* geometry);
EDGERAZOR_API int64_t edgerazor_segments(const edgerazor_geometry* geometry);
EDGERAZOR_API int64_t edgerazor_block_bytes(const edgerazor_geometry* geometry, int32_t bits);

/* x [tokens, columns] to codes [tokens, activation bytes], scales and sums of codes [tokens, segments]. bits: 2 to 8;
   scale: of everything, or 0 for one of each group of each token. Returns -1, or the first token with a number that is
   not finite. */
EDGERAZOR_API int64_t edgerazor_quantize(const edgerazor_geometry* geometry, int isa, const float* x, int64_t tokens,
                                         int32_t bits, float scale, int8_t* codes, float* scales, int32_t* sums);

/* y [tokens, stride]: the results of row blocks [first_block, last_block) of the part, bias [rows of the matrix] (or
   null) added; other elements are left alone. */
EDGERAZOR_API void edgerazor_linear(const edgerazor_geometry* geometry, int isa, const edgerazor_part* part,
                                    int64_t tokens, const int8_t* codes, const float* scales, const int32_t* sums,
                                    const float* bias, float* y, int64_t stride, int64_t first_block,
                                    int64_t last_block);

/* The same for x [tokens, columns] as it is, in float32 with sums in any order: not to the bit the same on all machines. */
EDGERAZOR_API void edgerazor_linear_float(const edgerazor_geometry* geometry, int isa, const edgerazor_part* part,
                                          int64_t tokens, const float* x, const float* bias, float* y, int64_t stride,
                                          int64_t first_block, int64_t last_block);

/* weights [columns] of the row-th row of the part (an embedding). */
EDGERAZOR_API void edgerazor_row(const edgerazor_geometry* geometry, const edgerazor_part* part, int64_t row,
                                 float* weights);

/* Row blocks of ternary codes as those of 2-bit codes (bits = 2, lowest = -2): a fourth more bytes, fewer steps to
   decode them. */
EDGERAZOR_API void edgerazor_expand_ternary(const edgerazor_geometry* geometry, int isa, const uint8_t* codes,
                                            int64_t blocks, uint8_t* out);

/* The fp16 scales [groups] of groups [groups, size] of weights, as `formats._least_error.reference` finds them, and the
   codes [groups, size] that they choose, unless that is null. Returns -1, the first group with a weight that is not
   finite, or -2 where there is no memory for `size` floats. */
EDGERAZOR_API int64_t edgerazor_least_error(int isa, const edgerazor_ladder* ladder, const float* weights,
                                            int64_t groups, int64_t size, uint16_t* scales, int8_t* codes);

/* The table of functions of an instruction set, a `Floats` of floats.hpp. For tests. */
EDGERAZOR_API const void* edgerazor_floats(int isa);

/* Reads memory once, as fast as it comes, and returns something that depends on every byte: to measure bandwidth. */
EDGERAZOR_API uint64_t edgerazor_read(int isa, const uint64_t* words, int64_t count);

#ifdef __cplusplus
}
#endif
#endif
