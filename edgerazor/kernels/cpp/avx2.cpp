#include "avx2.hpp"

const edgerazor::MatmulKernels edgerazor::avx2_matmul = {
    "avx2", quantize, rotate, rotate_back, linear, linear_float, expand_ternary, read,
};
