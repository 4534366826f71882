// Rounding that does not depend on the instruction set: to fp16, and of ratios to integer codes.
#pragma once
#include <stdint.h>
#include <string.h>

#include "compiler.hpp"

namespace {

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

// The nearest fp16 number of x, which is 0 to 65504, as a float; ties to even.
inline float round_to_f16(float x) {
    constexpr float kMinNormal = 6.103515625e-5f; // 2^-14: below it, fp16 has steps of 2^-24, as float has at 0.5
    if (x < kMinNormal) return (x + 0.5f) - 0.5f;
    const uint32_t bits = bits_of(x);
    return float_of((bits + 0xfff + (bits >> 13 & 1)) & ~0x1fffu);
}

constexpr uint32_t kMagnitudeBits = 0x7fffffffu, kInfinityBits = 0x7f800000u;

// The bits of the largest magnitude. As integers, the bits are in the order of the numbers, with infinity and NaN on
// top.
inline uint32_t largest_magnitude(const float* x, int count) {
    int32_t largest = 0;
    for (int i = 0; i < count; i++) {
        const int32_t magnitude = (int32_t)(bits_of(x[i]) & kMagnitudeBits);
        largest = magnitude > largest ? magnitude : largest;
    }
    return (uint32_t)largest;
}

// 1.5 * 2^23: added to a small number, it leaves the nearest integer (ties to even) in the low bits of the sum.
constexpr float kRoundShift = 12582912.0f;

// The nearest integers to x / scale, ties to even, at most `max_code` in magnitude.
inline void round_ratios(const float* x, int count, float scale, int max_code, int8_t* codes) {
    const float bound = (float)max_code;
    for (int i = 0; i < count; i++) {
        float ratio = x[i] / scale;
        ratio = ratio > bound ? bound : ratio;
        ratio = ratio < -bound ? -bound : ratio;
        codes[i] = (int8_t)(int32_t)(bits_of(ratio + kRoundShift) - bits_of(kRoundShift));
    }
}

} // namespace
