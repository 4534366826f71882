// The matrix products of the library, as a table of functions that each instruction set fills in.
//
// A translation unit of one instruction set is compiled with options that allow instructions which other machines do
// not have. So that the linker never takes one of its functions for another unit, everything that it instantiates is in
// an anonymous namespace, and it uses no templates of the standard library.
#pragma once
#include "packed_layout.hpp"

namespace edgerazor {

// Quantized activations of some tokens.
struct QuantizedActivations {
    int64_t tokens;
    const int8_t* codes; // [tokens, 4 * x_quads]
    const float* scales; // [tokens, segments]
    const int32_t* sums; // [tokens, segments], of the codes
};

struct MatmulOutput {
    float* y;          // [tokens, stride]
    int64_t stride;
    const float* bias; // [rows of the matrix], or null
};

struct MatmulKernels {
    const char* name;
    // Quantizes one token; returns false where a number is not finite.
    bool (*quantize)(const RowLayout&, const float* x, int bits, float scale, int8_t* codes, float* scales,
                     int32_t* sums);
    // x R and x Rᵀ of one row, by blocks of a power of two from 2 to 512; `out` may be x. signs: bits, 1 for -1.
    void (*rotate)(const float* x, int columns, int block, const uint8_t* signs, float* out);
    void (*rotate_back)(const float* x, int columns, int block, const uint8_t* signs, float* out);
    // y = W x + bias for row blocks [first_block, last_block), by exact integer sums: a GEMV of one token, a GEMM of
    // more.
    void (*linear)(const RowLayout&, const FormatRows&, const QuantizedActivations&, const MatmulOutput&,
                   int64_t first_block, int64_t last_block);
    // The same product of float32 activations x [tokens, columns]; each instruction set has its own order of summation.
    void (*linear_float)(const RowLayout&, const FormatRows&, int64_t tokens, const float* x, const MatmulOutput&,
                         int64_t first_block, int64_t last_block);
    // Writes row blocks of base-3 codes as row blocks of 2-bit codes.
    void (*expand_ternary)(const RowLayout&, const uint8_t* codes, int64_t blocks, uint8_t* out);
    // Reads every word and returns their exclusive or: measures the bandwidth of memory.
    uint64_t (*read)(const uint64_t* words, int64_t count);
};

extern const MatmulKernels portable_matmul, avx2_matmul, avx2vnni_matmul, avx512_matmul, neon_matmul, i8mm_matmul;

// Of an instruction set that this machine can run, by its number.
const MatmulKernels& matmul_kernels(int isa);

} // namespace edgerazor
