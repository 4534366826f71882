// The search for the scales of least squared error: `formats/_least_error.py`, to the bit. One source, `scales.cpp`,
// compiled once for each instruction set.
#pragma once
#include <stdint.h>

#include "library.h"

namespace edgerazor {

// The scales of groups [groups, size] of weights as fp16 [groups], and their codes [groups, size] unless that is null,
// with room for `workspace_floats(size)` floats, aligned to 64 bytes. Returns -1, or the first group with a weight that
// is not finite.
using LeastError = int64_t (*)(const edgerazor_ladder& ladder, const float* weights, int64_t groups, int64_t size,
                               float* workspace, uint16_t* scales, int8_t* codes);

constexpr int64_t workspace_floats(int64_t size) { return (size + 15) / 16 * 16; }

int64_t portable_scales(const edgerazor_ladder&, const float*, int64_t, int64_t, float*, uint16_t*, int8_t*);
int64_t avx2_scales(const edgerazor_ladder&, const float*, int64_t, int64_t, float*, uint16_t*, int8_t*);
int64_t avx2vnni_scales(const edgerazor_ladder&, const float*, int64_t, int64_t, float*, uint16_t*, int8_t*);
int64_t avx512_scales(const edgerazor_ladder&, const float*, int64_t, int64_t, float*, uint16_t*, int8_t*);
int64_t neon_scales(const edgerazor_ladder&, const float*, int64_t, int64_t, float*, uint16_t*, int8_t*);
int64_t i8mm_scales(const edgerazor_ladder&, const float*, int64_t, int64_t, float*, uint16_t*, int8_t*);

} // namespace edgerazor
