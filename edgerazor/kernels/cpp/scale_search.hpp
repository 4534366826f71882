// The search for the scales of least squared error, to the bit as `formats` finds them in PyTorch. One source,
// `scale_search.cpp`, compiled once for each instruction set.
#pragma once
#include <stdint.h>

#include "library.h"

namespace edgerazor {

// Writes the scales of groups [groups, size] of weights as fp16 [groups], and their codes [groups, size] unless `codes`
// is null. The workspace has search_workspace_floats(size) floats, aligned to 64 bytes. Returns -1, or the first group
// with a weight that is not finite.
using ScaleSearchFunction = int64_t(const edgerazor_scale_search& settings, const float* weights, int64_t groups,
                                    int64_t size, float* workspace, uint16_t* scales, int8_t* codes);
using ScaleSearch = ScaleSearchFunction*;

constexpr int64_t search_workspace_floats(int64_t size) { return (size + 15) / 16 * 16; }

ScaleSearchFunction portable_scale_search, avx2_scale_search, avx2vnni_scale_search, avx512_scale_search,
    neon_scale_search, i8mm_scale_search;

} // namespace edgerazor
