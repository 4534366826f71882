// Functions of vectors: exp, sums, norms, RoPE, activations, argmax. Included by `float_kernels.cpp`, once for each
// instruction set.
#pragma once
#include <stdint.h>
#include <string.h>

#include "f32x16.hpp"
#include "rounding.hpp"

namespace {

constexpr float kInfinity = __builtin_huge_valf();

EDGERAZOR_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
EDGERAZOR_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// exp(x) to about 1e-7: x = n ln 2 + r with an integer n, and the Taylor series of exp(r). 2^n is multiplied as two
// factors, since it may be smaller or larger than any normal number.
EDGERAZOR_INLINE Lanes exp_lanes(Lanes x) {
    const Lanes shifted = fmadd(x, splat_lanes(1.44269504089f), splat_lanes(kRoundShift));
    const Lanes n = shifted - kRoundShift;
    // ln 2 is the sum of two numbers, of which the first is so short that n times it is exact.
    const Lanes close = fmadd(n, splat_lanes(-0.693359375f), x);
    const Lanes r = fmadd(n, splat_lanes(2.12194440e-4f), close);
    Lanes sum = splat_lanes(1.0f / 5040);
    sum = fmadd(sum, r, splat_lanes(1.0f / 720));
    sum = fmadd(sum, r, splat_lanes(1.0f / 120));
    sum = fmadd(sum, r, splat_lanes(1.0f / 24));
    sum = fmadd(sum, r, splat_lanes(1.0f / 6));
    sum = fmadd(sum, r, splat_lanes(0.5f));
    sum = fmadd(sum, r, splat_lanes(1.0f));
    sum = fmadd(sum, r, splat_lanes(1.0f));
    const UintLanes exponent = (UintLanes)shifted - bits_of(kRoundShift);
    const UintLanes half = (UintLanes)((IntLanes)exponent >> 1);
    return sum * (Lanes)((half + 127) << 23) * (Lanes)((exponent - half + 127) << 23);
}

// Beyond the bounds of the clamp the result is 0 or infinity.
EDGERAZOR_INLINE f32x16 exp(f32x16 x) {
    const f32x16 bounded = clamp(x, -104.0f, 89.0f);
    return map_registers(UNROLL(i) { return exp_lanes(bounded.reg[i.value]); });
}

// The first `count` of 16 numbers, and `rest` in the lanes of the others.
EDGERAZOR_INLINE f32x16 load_partial(const float* p, int64_t count, float rest) {
    if (count >= 16) return load(p);
    float x[16];
    for (int i = 0; i < 16; i++) x[i] = i < count ? p[i] : rest;
    return load(x);
}

EDGERAZOR_INLINE void store_partial(float* p, int64_t count, f32x16 x) {
    if (count >= 16) return store(p, x);
    float lanes[16];
    store(lanes, x);
    memcpy(p, lanes, sizeof(float) * count);
}

// The sum of function(x) over all x. function(rest) must be 0: it fills the last vector.
template <class Function>
EDGERAZOR_INLINE float sum_over(const float* x, int64_t count, float rest, Function&& function) {
    f32x16 sum = splat(0);
    for (int64_t i = 0; i < count; i += 16) sum = sum + function(load_partial(x + i, count - i, rest));
    return reduce_add(sum);
}

EDGERAZOR_INLINE f32x16 square(f32x16 x) { return x * x; }

void rms_norm(const float* x, int count, float epsilon, const float* weight, float* out) {
    const float squares = sum_over(x, count, 0, square);
    const float scale = 1.0f / __builtin_sqrtf(squares / (float)count + epsilon);
    for (int i = 0; i < count; i++) out[i] = weight ? x[i] * scale * weight[i] : x[i] * scale;
}

void layer_norm(const float* x, int count, float epsilon, const float* weight, const float* bias, float* out) {
    const float mean = sum_over(x, count, 0, [](f32x16 lanes) { return lanes; }) / (float)count;
    const float squares = sum_over(x, count, mean, [mean](f32x16 lanes) { return square(lanes - splat(mean)); });
    const float scale = 1.0f / __builtin_sqrtf(squares / (float)count + epsilon);
    for (int i = 0; i < count; i++) {
        const float normal = (x[i] - mean) * scale;
        out[i] = normal * (weight ? weight[i] : 1.0f) + (bias ? bias[i] : 0.0f);
    }
}

void rope(float* head, int rope_dim, const float* cosines, const float* sines) {
    const int half = rope_dim / 2;
    for (int i = 0; i < half; i++) {
        const float first = head[i], second = head[half + i];
        head[i] = first * cosines[i] - second * sines[i];
        head[half + i] = second * cosines[i] + first * sines[i];
    }
}

EDGERAZOR_INLINE f32x16 silu(f32x16 x) { return x / (splat(1) + exp(splat(0) - x)); }

// x * (1 + tanh(u)) / 2 with u = sqrt(2 / pi) * (x + 0.044715 x^3), as x / (1 + exp(-2 u)).
EDGERAZOR_INLINE f32x16 gelu_tanh(f32x16 x) {
    const f32x16 minus_twice = x * fmadd(x * x, splat(-0.0713548162726f), splat(-1.59576912161f));
    return x / (splat(1) + exp(minus_twice));
}

EDGERAZOR_INLINE f32x16 tanh(f32x16 x) { return splat(1) - splat(2) / (splat(1) + exp(x + x)); }

// activation(gate) * up, or activation(gate) where there is no `up`.
template <class Activation>
EDGERAZOR_INLINE void activate(const float* gate, const float* up, int count, float* out, Activation&& activation) {
    for (int i = 0; i < count; i += 16) {
        const f32x16 x = activation(load_partial(gate + i, count - i, 0));
        store_partial(out + i, count - i, up == nullptr ? x : x * load_partial(up + i, count - i, 0));
    }
}

void swiglu(const float* gate, const float* up, int count, float* out) {
    activate(gate, up, count, out, [](f32x16 x) { return silu(x); });
}

void geglu(const float* gate, const float* up, int count, float* out) {
    activate(gate, up, count, out, [](f32x16 x) { return gelu_tanh(x); });
}

void reglu_squared(const float* gate, const float* up, int count, float* out) {
    activate(gate, up, count, out, [](f32x16 x) { return square(max(x, splat(0))); });
}

void sigmoid_gate(const float* gate, int count, float* x) {
    for (int i = 0; i < count; i += 16) {
        const f32x16 opened = splat(1) + exp(splat(0) - load_partial(gate + i, count - i, 0));
        store_partial(x + i, count - i, load_partial(x + i, count - i, 0) / opened);
    }
}

void soft_cap(float* x, int64_t count, float cap) {
    for (int64_t i = 0; i < count; i += 16)
        store_partial(x + i, count - i, splat(cap) * tanh(load_partial(x + i, count - i, 0) / splat(cap)));
}

void add(float* x, const float* y, int count) {
    for (int i = 0; i < count; i++) x[i] += y[i];
}

float max_value(const float* x, int64_t count) {
    f32x16 most = splat(-kInfinity);
    for (int64_t i = 0; i < count; i += 16) most = max(load_partial(x + i, count - i, -kInfinity), most);
    return reduce_max(most);
}

// The largest element is looked for one by one in the first block that has it, not in a whole vocabulary.
int32_t argmax(const float* x, int64_t count) {
    constexpr int64_t kBlock = 1024;
    float most = -kInfinity;
    int64_t first = 0;
    for (int64_t i = 0; i < count; i += kBlock) {
        const float of_block = max_value(x + i, smaller(kBlock, count - i));
        if (of_block > most) most = of_block, first = i;
    }
    for (int64_t i = first; i < smaller(first + kBlock, count); i++)
        if (x[i] == most) return (int32_t)i;
    return 0; // all are NaN
}

float log_sum_exp(const float* x, int64_t count) {
    constexpr int64_t kFloatSum = 4096; // float32 sums of more numbers would lose digits
    const float most = max_value(x, count);
    if (most == kInfinity || most == -kInfinity) return most;
    double total = 0;
    for (int64_t i = 0; i < count; i += kFloatSum)
        total += (double)sum_over(x + i, smaller(kFloatSum, count - i), -kInfinity,
                                  [most](f32x16 lanes) { return exp(lanes - splat(most)); });
    return most + (float)__builtin_log(total);
}

} // namespace
