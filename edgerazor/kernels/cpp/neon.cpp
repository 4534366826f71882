#include "neon.hpp"

const edgerazor::MatmulKernels edgerazor::neon_matmul = {
    "neon", quantize, linear, linear_float, expand_ternary, read,
};
