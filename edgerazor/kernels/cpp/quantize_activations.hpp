// Activations to int8 codes, exactly as `formats.quantize_activations` and `formats.quantize_static` do it, in plain
// loops that compilers turn into vector code of the unit's instruction set.
#pragma once
#include <string.h>

#include "packed_layout.hpp"
#include "rounding.hpp"

namespace {

// Writes the codes of one token to their places, and the scale and the sum of codes of each segment. `scale` <= 0: each
// group of activations gets the scale of its largest magnitude. Returns false where a number is not finite.
inline bool quantize(const edgerazor::RowLayout& layout, const float* x, int bits, float scale, int8_t* codes,
                     float* scales, int32_t* sums) {
    const int max_code = (1 << (bits - 1)) - 1;
    int group = -1;
    float group_scale = scale;
    memset(codes, 0, (size_t)layout.x_quads * 4);
    if (scale > 0 && largest_magnitude(x, layout.columns) >= kInfinityBits) return false;
    for (int i = 0; i < layout.segment_count; i++) {
        const edgerazor::Segment& segment = layout.segments[i];
        if (scale <= 0 && segment.activation_group != group) {
            group = segment.activation_group;
            const int begin = group * layout.activation_group_size, rest = layout.columns - begin;
            const uint32_t magnitude = largest_magnitude(
                x + begin, rest < layout.activation_group_size ? rest : layout.activation_group_size);
            if (magnitude >= kInfinityBits) return false;
            group_scale = float_of(magnitude) / (float)max_code;
            if (group_scale < 1.17549435e-38f) group_scale = 0; // below the smallest normal number it counts as zero
        }
        int8_t* out = codes + (size_t)segment.x_quad * 4 + segment.lead_bytes;
        if (group_scale > 0) round_ratios(x + segment.column, segment.width, group_scale, max_code, out);
        int32_t sum = 0;
        for (int k = 0; k < segment.width; k++) sum += out[k];
        scales[i] = group_scale;
        sums[i] = sum;
    }
    return true;
}

} // namespace
