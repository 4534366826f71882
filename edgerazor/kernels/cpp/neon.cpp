#include "neon.hpp"

const Kernels edgerazor::neon_kernels = {"neon", quantize, linear, linear_float, expand_ternary, read};
