#include "avx2.hpp"

const Kernels edgerazor::avx2vnni_kernels = {"avx2vnni", quantize, linear, expand_ternary, read};
