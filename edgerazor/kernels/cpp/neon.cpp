#include "neon.hpp"

const Kernels edgerazor::neon_kernels = {"neon", quantize, linear, expand_ternary, read};
