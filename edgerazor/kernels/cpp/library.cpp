// The C interface of the kernels that depend on the instruction set.
#include "library.h"

#include <stdlib.h>

#include "dispatch.hpp"

using namespace edgerazor;

extern "C" {

const char* edgerazor_sources(void) { return EDGERAZOR_SOURCES; }

int edgerazor_isa_count(void) { return (int)runnable_isas().size(); }

const char* edgerazor_isa_name(int isa) { return matmul_kernels(isa).name; }

int64_t edgerazor_quantize(const edgerazor_row_layout* handle, int isa, const float* x, int64_t tokens, int32_t bits,
                           float scale, int8_t* codes, float* scales, int32_t* sums) {
    const RowLayout& layout = layout_of(handle);
    for (int64_t token = 0; token < tokens; token++) {
        const int64_t segment = token * layout.segment_count;
        if (!matmul_kernels(isa).quantize(layout, x + token * layout.columns, bits, scale,
                                          codes + token * layout.x_quads * 4, scales + segment, sums + segment))
            return token;
    }
    return -1;
}

void edgerazor_rotate(int isa, const float* x, int64_t rows, int32_t columns, int32_t block, const uint8_t* signs,
                      int32_t back, float* out) {
    const MatmulKernels& kernels = matmul_kernels(isa);
    for (int64_t at = 0; at < rows * columns; at += columns)
        (back ? kernels.rotate_back : kernels.rotate)(x + at, columns, block, signs, out + at);
}

void edgerazor_linear(const edgerazor_row_layout* layout, int isa, const edgerazor_format_rows* rows, int64_t tokens,
                      const int8_t* codes, const float* scales, const int32_t* sums, const float* bias, float* y,
                      int64_t stride, int64_t first_block, int64_t last_block) {
    matmul_kernels(isa).linear(layout_of(layout), format_rows_of(*rows), {tokens, codes, scales, sums},
                               {y, stride, bias}, first_block, last_block);
}

void edgerazor_linear_float(const edgerazor_row_layout* layout, int isa, const edgerazor_format_rows* rows,
                            int64_t tokens, const float* x, const float* bias, float* y, int64_t stride,
                            int64_t first_block, int64_t last_block) {
    matmul_kernels(isa).linear_float(layout_of(layout), format_rows_of(*rows), tokens, x, {y, stride, bias},
                                     first_block, last_block);
}

void edgerazor_dequantize_row(const edgerazor_row_layout* layout, const edgerazor_format_rows* rows, int64_t row,
                              float* weights) {
    dequantize_row(layout_of(layout), format_rows_of(*rows), row, weights);
}

void edgerazor_expand_ternary(const edgerazor_row_layout* layout, int isa, const uint8_t* codes, int64_t blocks,
                              uint8_t* out) {
    matmul_kernels(isa).expand_ternary(layout_of(layout), codes, blocks, out);
}

int64_t edgerazor_least_error(int isa, const edgerazor_scale_search* settings, const float* weights, int64_t groups,
                              int64_t size, uint16_t* scales, int8_t* codes) {
    void* workspace = nullptr;
    if (posix_memalign(&workspace, kVectorBytes, sizeof(float) * search_workspace_floats(size)) != 0) return -2;
    const ScaleSearch search = runnable_isas()[isa].scale_search;
    const int64_t result = search(*settings, weights, groups, size, (float*)workspace, scales, codes);
    free(workspace);
    return result;
}

int64_t edgerazor_round_weights(int isa, const edgerazor_code_range* range, const edgerazor_weight_rows* rows,
                                int32_t to_bfloat16, void* out) {
    return runnable_isas()[isa].fake_quantize->round(*range, *rows, out, to_bfloat16 != 0);
}

void edgerazor_learned_gradients(int isa, const edgerazor_code_range* range, const edgerazor_weight_rows* rows,
                                 const float* gradient, float* to_weights, float* to_scales) {
    runnable_isas()[isa].fake_quantize->gradients(*range, *rows, gradient, to_weights, to_scales);
}

const void* edgerazor_float_kernels(int isa) { return &float_kernels(isa); }

uint64_t edgerazor_read(int isa, const uint64_t* words, int64_t count) {
    return matmul_kernels(isa).read(words, count);
}

} // extern "C"
