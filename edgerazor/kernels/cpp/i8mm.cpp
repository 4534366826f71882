#include "neon.hpp"

const edgerazor::MatmulKernels edgerazor::i8mm_matmul = {
    "i8mm", quantize, rotate, rotate_back, linear, linear_float, expand_ternary, read,
};
