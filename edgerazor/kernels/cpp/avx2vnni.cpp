#include "avx2.hpp"

const Kernels edgerazor::avx2vnni_kernels = {"avx2vnni", quantize, linear, linear_float, expand_ternary, read};
