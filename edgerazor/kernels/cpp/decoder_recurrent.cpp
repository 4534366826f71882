// Mixers that keep a state instead of keys and values: short convolutions, the gated delta rule, and Mamba-2. Their cost
// does not depend on the number of earlier tokens.
//
// Every thread has some features or heads of all tokens and goes through the sequence spans in their order, so that a
// span may begin with the state that an earlier one of the same call leaves.
#include <algorithm>
#include <cmath>

#include "decoder.hpp"

using namespace edgerazor;

namespace {

constexpr int64_t kVectorFeatures = 16;

// log(1 + exp(x))
float softplus(float x) { return x > 20 ? x : std::log1p(std::exp(x)); }

} // namespace

// The convolution of a mixer: of its features of `mixed`. Of the gated delta rule those are all, of Mamba-2 those behind
// z, and the result is in `convolved`. Of a short convolution they are the last third, the other two are factors, and it
// is in `attended`.
void edgerazor_decoder::convolve(const ThreadContext& context, const Layer& layer) {
    const int64_t features = layer.convolved();
    const WorkRange range((features + kVectorFeatures - 1) / kVectorFeatures, context.thread, threads.count());
    const int64_t first = range.first * kVectorFeatures, last = std::min(range.last * kVectorFeatures, features);
    if (first >= last) return;
    const bool is_short = layer.mixer == EDGERAZOR_SHORT_CONVOLUTION;
    ConvolutionArgs args = {};
    args.features = last - first;
    args.kernel = layer.convolution.kernel;
    args.x_stride = layer.rows(0);
    args.weight = layer.convolution.weight + first;
    args.bias = layer.convolution.bias == nullptr ? nullptr : layer.convolution.bias + first;
    args.weight_stride = args.state_stride = args.out_stride = features;
    args.silu = !is_short;
    for (const SpanChunk& chunk : chunks) {
        float* row = mixed.get() + chunk.token * args.x_stride + first;
        args.tokens = chunk.count;
        args.x = is_short ? row + 2 * features : layer.mixer == EDGERAZOR_MAMBA2 ? row + layer.width : row;
        args.before = is_short ? row : nullptr;
        args.after = is_short ? row + features : nullptr;
        const float* state = states.at(chunk.state_in, layer.state);
        args.state_in = state == nullptr ? nullptr : state + first;
        args.state_out = states.at(chunk.state_out, layer.state) + first;
        args.out = (is_short ? attended : convolved).get() + chunk.token * features + first;
        math.convolve(args);
    }
}

void edgerazor_decoder::short_convolution(const ThreadContext& context, const Layer& layer) {
    convolve(context, layer);
    threads.barrier();
}

void edgerazor_decoder::gated_delta_rule(const ThreadContext& context, const Layer& layer) {
    const edgerazor_delta_rule& rule = layer.delta_rule;
    const int64_t keys_width = (int64_t)rule.key_heads * rule.key_dim, features = layer.convolved();
    const WorkRange heads(rule.value_heads, context.thread, threads.count());
    for (int64_t t = 0; t < context.tokens; t++) // each thread for its heads, in place
        for (int64_t h = heads.first; h < heads.last; h++) {
            float &alpha = alphas.get()[t * rule.value_heads + h], &beta = betas.get()[t * rule.value_heads + h];
            alpha = std::exp(rule.decay[h] * softplus(alpha + rule.decay_bias[h]));
            beta = 1.0f / (1.0f + std::exp(-beta));
        }
    convolve(context, layer);
    threads.barrier(); // a head has features of other threads
    DeltaRuleArgs args = {};
    args.key_dim = rule.key_dim;
    args.value_dim = rule.value_dim;
    args.stride = features;
    args.factor_stride = rule.value_heads;
    args.lengths = (float*)scratch[context.thread].get();
    args.out_stride = layer.width;
    for (int64_t h = heads.first; h < heads.last; h++)
        for (const SpanChunk& chunk : chunks) {
            const float* row = convolved.get() + chunk.token * features;
            const int64_t key_head = h / (rule.value_heads / rule.key_heads);
            const int64_t begin = layer.head_states + h * layer.head_state_floats();
            args.tokens = chunk.count;
            args.q = row + key_head * rule.key_dim;
            args.k = row + keys_width + key_head * rule.key_dim;
            args.v = row + 2 * keys_width + h * rule.value_dim;
            args.decay = alphas.get() + chunk.token * rule.value_heads + h;
            args.beta = betas.get() + chunk.token * rule.value_heads + h;
            args.state_in = states.at(chunk.state_in, begin);
            args.state_out = states.at(chunk.state_out, begin);
            args.out = attended.get() + chunk.token * layer.width + h * rule.value_dim;
            math.delta_rule(args);
            for (int64_t t = 0; t < chunk.count; t++) {
                float* out = args.out + t * layer.width;
                apply_norm(rule.state_norm, out, rule.value_dim, out);
                math.swiglu(gates.get() + (chunk.token + t) * layer.rows(1) + h * rule.value_dim, out, rule.value_dim,
                            out);
            }
        }
    threads.barrier();
}

void edgerazor_decoder::mamba2(const ThreadContext& context, const Layer& layer) {
    const edgerazor_mamba2& mixer = layer.mamba2;
    const int64_t width = layer.width, features = layer.convolved(), rows = layer.rows(0);
    const WorkRange heads(mixer.heads, context.thread, threads.count());
    for (int64_t t = 0; t < context.tokens; t++) { // each thread for its heads
        const float* steps = mixed.get() + t * rows + width + features;
        for (int64_t h = heads.first; h < heads.last; h++) {
            const float step = softplus(steps[h] + mixer.step_bias[h]);
            const float bounded = std::min(std::max(step, mixer.least_step), mixer.most_step);
            betas.get()[t * mixer.heads + h] = bounded;
            alphas.get()[t * mixer.heads + h] = std::exp(mixer.decay[h] * bounded);
        }
    }
    convolve(context, layer);
    threads.barrier(); // a head has features of other threads
    StateSpaceArgs args = {};
    args.state_size = mixer.state_size;
    args.head_dim = mixer.head_dim;
    args.stride = features;
    args.factor_stride = mixer.heads;
    args.out_stride = width;
    for (int64_t h = heads.first; h < heads.last; h++)
        for (const SpanChunk& chunk : chunks) {
            const float* row = convolved.get() + chunk.token * features;
            const int64_t group = h / (mixer.heads / mixer.groups);
            const int64_t begin = layer.head_states + h * layer.head_state_floats();
            args.tokens = chunk.count;
            args.skip = mixer.skip[h];
            args.x = row + h * mixer.head_dim;
            args.b = row + width + group * mixer.state_size;
            args.c = row + width + (mixer.groups + group) * mixer.state_size;
            args.decay = alphas.get() + chunk.token * mixer.heads + h;
            args.step = betas.get() + chunk.token * mixer.heads + h;
            args.state_in = states.at(chunk.state_in, begin);
            args.state_out = states.at(chunk.state_out, begin);
            args.out = attended.get() + chunk.token * width + h * mixer.head_dim;
            math.state_space(args);
            for (int64_t t = 0; t < chunk.count; t++) {
                float* out = args.out + t * width;
                math.swiglu(mixed.get() + (chunk.token + t) * rows + h * mixer.head_dim, out, mixer.head_dim, out);
            }
        }
    threads.barrier();
}

// Norms of the heads of each group together, in place.
void edgerazor_decoder::norm_groups(const edgerazor_mamba2& mixer, float* x) const {
    const int64_t features = (int64_t)mixer.heads / mixer.groups * mixer.head_dim;
    edgerazor_norm norm = mixer.norm;
    for (int group = 0; group < mixer.groups; group++) {
        apply_norm(norm, x, features, x);
        x += features;
        if (norm.weight != nullptr) norm.weight += features;
    }
}
