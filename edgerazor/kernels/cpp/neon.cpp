#include "neon.hpp"

const edgerazor::MatmulKernels edgerazor::neon_matmul = {
    "neon", quantize, rotate, rotate_back, linear, linear_float, expand_ternary, read,
};
