#include "avx2.hpp"

const edgerazor::MatmulKernels edgerazor::avx2vnni_matmul = {
    "avx2vnni", quantize, linear, linear_float, expand_ternary, read,
};
