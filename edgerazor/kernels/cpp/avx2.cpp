#include "avx2.hpp"

const edgerazor::MatmulKernels edgerazor::avx2_matmul = {
    "avx2", quantize, linear, linear_float, expand_ternary, read,
};
