#include "avx2.hpp"

const Kernels edgerazor::avx2_kernels = {"avx2", quantize, linear, expand_ternary, read};
