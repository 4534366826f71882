// Mixers that keep a state of earlier tokens: convolutions, the gated delta rule, and Mamba-2. Included by `float_kernels.cpp`,
// once for each instruction set.
#pragma once
#include <stdint.h>
#include <string.h>

#include "f32x16.hpp"
#include "float_kernels.hpp"
#include "vector_math.hpp"

namespace {

using namespace edgerazor;

void convolve(const ConvolutionArgs& args) {
    const int64_t past = args.kernel - 1, features = args.features;
    for (int64_t t = 0; args.before != nullptr && t < args.tokens; t++) {
        float* x = args.x + t * args.x_stride;
        const float* factors = args.before + t * args.x_stride;
        for (int64_t i = 0; i < features; i++) x[i] *= factors[i];
    }
    // x of a token, counted from the first one in the state; null where it is before the sequence.
    const auto row = [&](int64_t index) -> const float* {
        if (index >= past) return args.x + (index - past) * args.x_stride;
        return args.state_in == nullptr ? nullptr : args.state_in + index * args.state_stride;
    };
    for (int64_t t = 0; t < args.tokens; t++) {
        float* out = args.out + t * args.out_stride;
        for (int64_t i = 0; i < features; i += 16) {
            const int64_t count = features - i;
            f32x16 sum = args.bias == nullptr ? splat(0) : load_partial(args.bias + i, count, 0);
            for (int tap = 0; tap < args.kernel; tap++) {
                const float* x = row(t + tap);
                if (x == nullptr) continue;
                const f32x16 weight = load_partial(args.weight + tap * args.weight_stride + i, count, 0);
                sum = fmadd(load_partial(x + i, count, 0), weight, sum);
            }
            if (args.silu) sum = silu(sum);
            if (args.after != nullptr) sum = sum * load_partial(args.after + t * args.x_stride + i, count, 0);
            store_partial(out + i, count, sum);
        }
    }
    // From the first row on, because in place each one becomes a later one.
    for (int64_t i = 0; i < past; i++) {
        const float* x = row(args.tokens + i);
        float* kept = args.state_out + i * args.state_stride;
        if (x == nullptr)
            memset(kept, 0, sizeof(float) * features);
        else if (x != kept)
            memcpy(kept, x, sizeof(float) * features);
    }
}

// 1 / sqrt(the sum of squares + epsilon)
float inverse_length(const float* x, int count, float epsilon) {
    return 1.0f / __builtin_sqrtf(sum_over(x, count, 0, square) + epsilon);
}

// Sixteen columns of a state go through all tokens before the next ones, so that they stay in the first cache. Factors
// of whole vectors are applied to sums, instead of to the vectors.
void delta_rule(const DeltaRuleArgs& args) {
    constexpr int kSums = 4; // that are added up side by side
    const int key_dim = args.key_dim;
    float *const q_factors = args.lengths, *const k_factors = args.lengths + args.tokens;
    const float scale = 1.0f / __builtin_sqrtf((float)key_dim);
    for (int64_t t = 0; t < args.tokens; t++) {
        q_factors[t] = scale * inverse_length(args.q + t * args.stride, key_dim, 1e-6f);
        k_factors[t] = inverse_length(args.k + t * args.stride, key_dim, 1e-6f);
    }
    const auto add_up = [](const f32x16(&sums)[kSums]) { return (sums[0] + sums[1]) + (sums[2] + sums[3]); };
    for (int first = 0; first < args.value_dim; first += 16) {
        const int64_t at = (int64_t)first * key_dim, size = sizeof(float) * 16 * key_dim;
        float* state = args.state_out + at;
        if (args.state_in == nullptr)
            memset(state, 0, size);
        else if (args.state_in != args.state_out)
            memcpy(state, args.state_in + at, size);
        for (int64_t t = 0; t < args.tokens; t++) {
            const float *q = args.q + t * args.stride, *k = args.k + t * args.stride;
            const float decay = args.decay[t * args.factor_stride], beta = args.beta[t * args.factor_stride];
            f32x16 sums[kSums] = {splat(0), splat(0), splat(0), splat(0)};
            int i = 0;
            for (; i + kSums <= key_dim; i += kSums)
                unroll<0, kSums>(UNROLL(n) {
                    sums[n.value] = fmadd(load(state + (i + n.value) * 16), splat(k[i + n.value]), sums[n.value]);
                });
            for (; i < key_dim; i++) sums[0] = fmadd(load(state + i * 16), splat(k[i]), sums[0]);
            const f32x16 known = add_up(sums) * splat(decay * k_factors[t]);
            const f32x16 value = load_partial(args.v + t * args.stride + first, args.value_dim - first, 0);
            const f32x16 change = (value - known) * splat(beta * k_factors[t]), factor = splat(decay);
            unroll<0, kSums>(UNROLL(n) { sums[n.value] = splat(0); });
            const auto step = [&](int row, f32x16& sum) {
                const f32x16 next = fmadd(change, splat(k[row]), load(state + row * 16) * factor);
                store(state + row * 16, next);
                sum = fmadd(next, splat(q[row]), sum);
            };
            for (i = 0; i + kSums <= key_dim; i += kSums)
                unroll<0, kSums>(UNROLL(n) { step(i + n.value, sums[n.value]); });
            for (; i < key_dim; i++) step(i, sums[0]);
            store_partial(args.out + t * args.out_stride + first, args.value_dim - first,
                          add_up(sums) * splat(q_factors[t]));
        }
    }
}

// Rows of sixteen columns of a state that stay in registers while all tokens go by.
constexpr int kStateRows = kLanes == 16 ? 16 : kLanes == 8 ? 4 : 2;

// Rows [row, row + rows) of the sixteen columns from `first` on. What they give is added to that of the rows before.
template <int rows>
EDGERAZOR_INLINE void state_space_rows(const StateSpaceArgs& args, int first, int row) {
    constexpr int kSums = rows < 4 ? 1 : 4; // that are added up side by side
    const int64_t at = ((int64_t)first * args.state_size) + (int64_t)row * 16;
    f32x16 state[rows];
    unroll<0, rows>(UNROLL(r) {
        state[r.value] = args.state_in == nullptr ? splat(0) : load(args.state_in + at + r.value * 16);
    });
    const int columns = args.head_dim - first;
    for (int64_t t = 0; t < args.tokens; t++) {
        const float *b = args.b + t * args.stride + row, *c = args.c + t * args.stride + row;
        float* out = args.out + t * args.out_stride + first;
        const f32x16 x = load_partial(args.x + t * args.stride + first, columns, 0);
        const f32x16 change = x * splat(args.step[t * args.factor_stride]);
        const f32x16 decay = splat(args.decay[t * args.factor_stride]);
        f32x16 sums[kSums];
        unroll<0, kSums>(UNROLL(n) { sums[n.value] = splat(0); });
        unroll<0, rows>(UNROLL(r) {
            f32x16 &own = state[r.value], &sum = sums[r.value % kSums];
            own = fmadd(change, splat(b[r.value]), own * decay);
            sum = fmadd(own, splat(c[r.value]), sum);
        });
        unroll<1, kSums>(UNROLL(n) { sums[0] = sums[0] + sums[n.value]; });
        const f32x16 before = row == 0 ? x * splat(args.skip) : load_partial(out, columns, 0);
        store_partial(out, columns, before + sums[0]);
    }
    unroll<0, rows>(UNROLL(r) { store(args.state_out + at + r.value * 16, state[r.value]); });
}

// A state goes through all tokens a few rows of sixteen columns at a time: nothing in it depends on anything else.
void state_space(const StateSpaceArgs& args) {
    for (int first = 0; first < args.head_dim; first += 16) {
        int row = 0;
        for (; row + kStateRows <= args.state_size; row += kStateRows) state_space_rows<kStateRows>(args, first, row);
        for (; row < args.state_size; row++) state_space_rows<1>(args, first, row);
    }
}

} // namespace
