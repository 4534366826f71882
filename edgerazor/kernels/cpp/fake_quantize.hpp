// Rounding of weights whose scales are trained, and its gradients, as `formats/core/lsq.py` computes them in PyTorch. One
// source, `fake_quantize.cpp`, compiled once for each instruction set, with the same results on all of them.
#pragma once
#include <stdint.h>

#include "library.h"

namespace edgerazor {

struct FakeQuantizeKernels {
    // Writes decode(encode(w)) of the rows to rows of `out`, float32 or bfloat16. Returns -1, or the first row with a
    // weight that is not finite.
    int64_t (*round)(const edgerazor_code_range&, const edgerazor_weight_rows&, void* out, bool to_bfloat16);
    // Writes the gradients of the rows' weights and scales, from that of the rounded weights.
    void (*gradients)(const edgerazor_code_range&, const edgerazor_weight_rows&, const float* gradient,
                      float* to_weights, float* to_scales);
};

extern const FakeQuantizeKernels portable_fake_quantize, avx2_fake_quantize, avx2vnni_fake_quantize,
    avx512_fake_quantize, neon_fake_quantize, i8mm_fake_quantize;

} // namespace edgerazor
