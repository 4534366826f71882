// Activations to int8 codes, exactly as `formats.quantize_activations` and `formats.quantize_static` do it. Plain loops
// that compilers turn into vector code of the unit's instruction set.
#pragma once
#include <string.h>

#include "kernels.hpp"

namespace {

using namespace edgerazor;

EDGERAZOR_INLINE uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

EDGERAZOR_INLINE float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

// The nearest fp16 number of x, 0 to 65504; ties to even.
inline float round_to_half(float x) {
    constexpr float kNormal = 6.103515625e-5f; // 2^-14: below it, fp16 counts in steps of 2^-24, as float does at 0.5
    if (x < kNormal) return (x + 0.5f) - 0.5f;
    const uint32_t bits = bits_of(x);
    return float_of((bits + 0xfff + (bits >> 13 & 1)) & ~0x1fffu);
}

constexpr uint32_t kMagnitude = 0x7fffffffu, kInfinity = 0x7f800000u;

// The bits of the largest magnitude: as integers they are in the order of the numbers, infinities and NaN at the top.
inline uint32_t largest_magnitude(const float* x, int count) {
    int32_t largest = 0;
    for (int i = 0; i < count; i++) {
        const int32_t magnitude = (int32_t)(bits_of(x[i]) & kMagnitude);
        largest = magnitude > largest ? magnitude : largest;
    }
    return (uint32_t)largest;
}

// Nearest integers to x / scale, ties to even, at most `maximum` in magnitude.
inline void round_ratios(const float* x, int count, float scale, int maximum, int8_t* codes) {
    constexpr float kShift = 12582912.0f; // 1.5 * 2^23: added to a small number, it leaves the integer in the low bits
    const float bound = (float)maximum;
    for (int i = 0; i < count; i++) {
        float ratio = x[i] / scale;
        ratio = ratio > bound ? bound : ratio;
        ratio = ratio < -bound ? -bound : ratio;
        codes[i] = (int8_t)(int32_t)(bits_of(ratio + kShift) - bits_of(kShift));
    }
}

// Codes of one token in their places, and the scale and sum of each segment. `scale` <= 0: one for each group of
// activations. False where a number is not finite.
inline bool quantize(const Geometry& geometry, const float* x, int bits, float scale, int8_t* codes, float* scales,
                     int32_t* sums) {
    const int maximum = (1 << (bits - 1)) - 1;
    int group = -1;
    float current = scale;
    memset(codes, 0, (size_t)geometry.x_quads * 4);
    if (scale > 0 && largest_magnitude(x, geometry.columns) >= kInfinity) return false;
    for (int i = 0; i < geometry.count; i++) {
        const Segment& segment = geometry.segments[i];
        if (scale <= 0 && segment.activation_group != group) {
            group = segment.activation_group;
            const int begin = group * geometry.activation_group, rest = geometry.columns - begin;
            const uint32_t largest =
                largest_magnitude(x + begin, rest < geometry.activation_group ? rest : geometry.activation_group);
            if (largest >= kInfinity) return false;
            current = float_of(largest) / (float)maximum;
            if (current < 1.17549435e-38f) current = 0; // below the smallest normal number it counts as zero
        }
        int8_t* out = codes + (size_t)segment.x_quad * 4 + segment.lead;
        if (current > 0) round_ratios(x + segment.column, segment.width, current, maximum, out);
        int32_t sum = 0;
        for (int k = 0; k < segment.width; k++) sum += out[k];
        scales[i] = current;
        sums[i] = sum;
    }
    return true;
}

} // namespace
