#include "avx2.hpp"

const edgerazor::MatmulKernels edgerazor::avx2vnni_matmul = {
    "avx2vnni", quantize, rotate, rotate_back, linear, linear_float, expand_ternary, read,
};
