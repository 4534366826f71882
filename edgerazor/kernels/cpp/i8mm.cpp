#include "neon.hpp"

const Kernels edgerazor::i8mm_kernels = {"i8mm", quantize, linear, linear_float, expand_ternary, read};
