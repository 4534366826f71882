#include "avx2.hpp"

const Kernels edgerazor::avx2_kernels = {"avx2", quantize, linear, linear_float, expand_ternary, read};
