// What the translation units of the library share: how a packed matrix lies in memory, how its rows are cut into
// segments, and the table of functions that each instruction set fills in.
//
// The layout is specified at the top of `packed.py`; here is what a kernel needs of it. A *part* is the rows of one
// matrix that have the same format, in blocks of 16 rows. Four consecutive positions of a row are a *quad*. A *vector*
// is 64 bytes: byte `4 * lane + j` belongs to row `lane` of the block and to position `j` of a quad, so that the
// instructions that multiply four bytes and add them up (`vpdpbusd`, `sdot`) give one 32-bit sum per row. Codes are
// stored as unsigned u = code - lowest. The quads of a row are cut into *chunks*, 64 of ternary (12 vectors of five
// base-3 digits and one of four 2-bit fields), 8 of others (one or more planes of bits, the low bits first).
//
// Within a *segment* neither the group of the weights nor that of the activations changes, so that it contributes
// (x_scale * w_scale) * sum(x * level) to its row, with an exact integer sum. A level is a multiple of one half
// (int2 has levels -3/2 to 3/2), so the sums are those of doubled levels: 2 * sum(u * x) + lowest * sum(x).
//
// Units of one instruction set are compiled with flags that others must not run: all that they instantiate is in an
// anonymous namespace, and they use no templates of the standard library.
#pragma once
#include <stddef.h>
#include <stdint.h>

#include "library.h"

#define EDGERAZOR_INLINE inline __attribute__((always_inline))

namespace edgerazor {

constexpr int kRows = 16;         // rows of a block
constexpr int kVector = 64;       // bytes of a vector
constexpr int kTernary = 0;       // "bits" of ternary
constexpr int kTernaryQuads = 64; // quads of a whole chunk
constexpr int kBitsQuads = 8;
constexpr int kSlab = 64; // quads unpacked at a time: whole chunks of every format
constexpr int kLongest = 32768; // columns of the longest segment: the sums of bytes fit into 32 bits

struct Segment {
    int32_t first_quad; // of the row of weights
    int32_t quads;
    int32_t x_quad; // where its activations begin; the same as first_quad unless a group ends within a quad
    int32_t lead;   // bytes of the first quad before its first column
    int32_t column; // first column
    int32_t width;  // columns
    int32_t group;  // of the weights
    int32_t activation_group;
};

struct Geometry {
    int32_t columns, group, activation_group;
    int32_t groups;  // of a row of weights
    int32_t quads;   // of a row of weights
    int32_t x_quads; // of a row of activations
    int32_t uniform; // quads of every segment but a shorter last one, or 0: segments differ or share quads
    int32_t count;
    Segment* segments;
};

// Rows of one format. `lowest`: twice the level that u = 0 stands for.
struct Part {
    const uint8_t* codes;   // [row blocks, bytes of a block]
    const uint16_t* scales; // fp16 [row blocks, groups, 16]
    const int32_t* rows;    // where each row's result goes; null: in order
    int64_t count;          // rows
    int32_t bits;           // 0 for ternary, 1 to 8
    int32_t lowest;
};

// Quantized activations of some tokens.
struct Activations {
    int64_t tokens;
    const int8_t* codes;  // [tokens, 4 * x_quads]
    const float* scales;  // [tokens, segments]
    const int32_t* sums;  // [tokens, segments], of the codes
};

struct Output {
    float* y;          // [tokens, stride]
    int64_t stride;
    const float* bias; // one for each row of the matrix, or null
};

struct Kernels {
    const char* name;
    bool (*quantize)(const Geometry&, const float* x, int bits, float scale, int8_t* codes, float* scales, int32_t* sums);
    void (*linear)(const Geometry&, const Part&, const Activations&, const Output&, int64_t first_block, int64_t last_block);
    // y = W x + bias for x [tokens, columns] as it is; the order of sums is free.
    void (*linear_float)(const Geometry&, const Part&, int64_t tokens, const float* x, const Output&,
                         int64_t first_block, int64_t last_block);
    void (*expand_ternary)(const Geometry&, const uint8_t* codes, int64_t blocks, uint8_t* out);
    uint64_t (*read)(const uint64_t* words, int64_t count);
};

// Vectors that a chunk of `quads` takes.
constexpr int chunk_vectors(int bits, int quads) {
    if (bits == kTernary) return quads / 5 + (quads % 5 != 0);
    int vectors = 0;
    for (int width = 8; width > 0; width /= 2)
        if (bits & width) vectors += (quads * width + 7) / 8;
    return vectors;
}

constexpr int chunk_quads(int bits) { return bits == kTernary ? kTernaryQuads : kBitsQuads; }

// Bytes of the first `quads` quads of a row block; whole chunks but for the last.
constexpr int64_t codes_bytes(int bits, int quads) {
    const int chunk = chunk_quads(bits);
    return kVector * ((int64_t)(quads / chunk) * chunk_vectors(bits, chunk) + chunk_vectors(bits, quads % chunk));
}

constexpr int64_t row_blocks(int64_t rows) { return (rows + kRows - 1) / kRows; }

extern const Kernels portable_kernels, avx2_kernels, avx2vnni_kernels, avx512_kernels, neon_kernels, i8mm_kernels;

// What other files need of `library.cpp`.
const Kernels& kernels_at(int isa); // of an instruction set that this machine can run, by its number
const Geometry& known(const edgerazor_geometry* geometry);
Part part_of(const edgerazor_part& part);
void decode_row(const Geometry& geometry, const Part& part, int64_t row, float* weights);

} // namespace edgerazor
