// How a packed matrix lies in memory, and how its rows are cut into segments.
//
// The layout is specified by the package `packed` and written by `formats.pack_matrix`; here is what a kernel needs of
// it. The rows of one matrix that have the same format (`FormatRows`) are stored in blocks of 16 rows. Four consecutive
// positions of a row are a *quad*. A *vector* is 64 bytes: byte `4 * lane + j` belongs to row `lane` of the block and
// to position `j` of a quad, so that the instructions that multiply four bytes and add up the products (`vpdpbusd`,
// `sdot`) give one 32-bit sum per row. A code is stored as the unsigned number u = code - lowest code. The quads of a
// row are cut into *chunks*: of 64 quads for ternary codes (12 vectors of bytes that hold five base-3 digits each, and
// one vector of four 2-bit fields), of 8 quads for other formats (one or more bit planes, the low bits first).
//
// A *segment* is a range of columns in which neither the group of the weights nor that of the activations changes. It
// contributes (x_scale * w_scale) * sum(x * level) to its row, and that sum is an exact integer. A level, which is what
// a code stands for in units of the scale, is a multiple of one half (int2 has the levels -3/2 to 3/2), so kernels
// compute the sum of doubled levels: 2 * sum(u * x) + min_level_x2 * sum(x).
#pragma once
#include <stddef.h>
#include <stdint.h>

#include "library.h"

namespace edgerazor {

constexpr int kBlockRows = 16; // rows of a row block
constexpr int kVectorBytes = 64; // bytes of a vector
constexpr int kTernary = 0; // the "bits" that stand for ternary codes in base 3
constexpr int kTernaryChunkQuads = 64; // quads of a whole chunk of ternary codes
constexpr int kBitsChunkQuads = 8; // quads of a whole chunk of other codes
constexpr int kSlabQuads = 64; // quads that are unpacked at a time: whole chunks of every format
constexpr int kMaxSegmentColumns = 32768; // so that the sums of products of bytes fit into 32 bits

struct Segment {
    int32_t first_quad;       // among the quads of the row of weights
    int32_t quads;
    int32_t x_quad;           // its first quad of activations: first_quad, unless a group ends within a quad
    int32_t lead_bytes;       // bytes of the first quad that precede the first column
    int32_t column;           // first column
    int32_t width;            // columns
    int32_t group;            // group of the weights, whose scale holds
    int32_t activation_group; // group of the activations, whose scale holds
};

struct RowLayout {
    int32_t columns, group_size, activation_group_size;
    int32_t groups;        // of a row of weights
    int32_t quads;         // of a row of weights
    int32_t x_quads;       // of a row of activations
    int32_t uniform_quads; // quads of every segment (the last may have fewer); 0 where segments differ or share quads
    int32_t segment_count;
    Segment* segments;
};

// The rows of a matrix that have one format.
struct FormatRows {
    const uint8_t* codes;   // [row blocks, bytes of a block]
    const uint16_t* scales; // fp16 [row blocks, groups, 16]
    const int32_t* rows;    // [count] the row of the matrix that each of these rows is; null: rows 0 to count - 1
    int64_t count;          // rows
    int32_t bits;           // 0 for ternary, 1 to 8
    int32_t min_level_x2;   // twice the level that u = 0 stands for
};

// Vectors that a chunk of `quads` quads takes.
constexpr int chunk_vectors(int bits, int quads) {
    if (bits == kTernary) return quads / 5 + (quads % 5 != 0);
    int vectors = 0;
    for (int width = 8; width > 0; width /= 2)
        if (bits & width) vectors += (quads * width + 7) / 8;
    return vectors;
}

constexpr int chunk_quads(int bits) { return bits == kTernary ? kTernaryChunkQuads : kBitsChunkQuads; }

// Bytes of the first `quads` quads of a row block. All chunks are whole but the last.
constexpr int64_t codes_bytes(int bits, int quads) {
    const int chunk = chunk_quads(bits);
    return kVectorBytes * ((int64_t)(quads / chunk) * chunk_vectors(bits, chunk) + chunk_vectors(bits, quads % chunk));
}

constexpr int64_t row_blocks(int64_t rows) { return (rows + kBlockRows - 1) / kBlockRows; }

const RowLayout& layout_of(const edgerazor_row_layout* handle);
FormatRows format_rows_of(const edgerazor_format_rows& rows);

// Writes the float32 weights [columns] of one row.
void dequantize_row(const RowLayout& layout, const FormatRows& rows, int64_t row, float* weights);

} // namespace edgerazor
