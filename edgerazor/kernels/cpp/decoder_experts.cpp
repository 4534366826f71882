// A mixture of experts in the place of a layer's MLP, or beside it.
//
// The router scores all experts for a token in float32, and the best of them compute it. Their matrices are read for all
// tokens of the micro-batch that they compute, one expert after the other; those of the others are not touched. As in
// other products, each thread computes some row blocks of every matrix. So a token's numbers do not depend on what else
// is in the call, and a single token's cost is that of its own experts.
#include <string.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "decoder.hpp"

using namespace edgerazor;

namespace {

constexpr int64_t kScoreBlock = 16; // experts that are scored side by side

int64_t score_blocks(int64_t experts) { return (experts + kScoreBlock - 1) / kScoreBlock; }

} // namespace

void edgerazor_decoder::allocate_routing(int64_t tokens) {
    const int64_t assignments = tokens * max_chosen, scores = tokens * score_blocks(max_experts) * kScoreBlock;
    routing.scores.reserve(scores);
    routing.choice.reserve(scores);
    routing.first.resize(max_experts + 1);
    if ((int64_t)routing.experts.size() < assignments) {
        routing.experts.resize(assignments);
        routing.weights.resize(assignments);
        routing.assignments.resize(assignments);
        routing.expert_of.resize(assignments);
    }
    expert_outputs.reserve(assignments * model.hidden_size);
    of_mlp.reserve(tokens * model.hidden_size);
    if (tokens == 1) return; // all experts get the token's own input
    if (model.activation_bits == 16) routed.reserve(assignments * model.hidden_size);
    routed_inputs.resize(2); // gate and up of an expert may quantize it differently
    for (const Layer& layer : layers)
        for (const Expert& expert : layer.expert_list)
            for (size_t i = 0; i < expert.gate_up.inputs.size(); i++)
                routed_inputs[i].reserve(*expert.gate_up.inputs[i]->layout, assignments);
}

// From scores to the token's experts and their weights.
void edgerazor_decoder::choose_experts(const Layer& layer, int64_t token) {
    const edgerazor_experts& experts = layer.experts;
    const int64_t at = token * score_blocks(experts.count) * kScoreBlock;
    float *const scores = routing.scores.get() + at, *const choice = routing.choice.get() + at;
    const float largest = *std::max_element(scores, scores + experts.count);
    float total = 0;
    for (int e = 0; e < experts.count; e++) {
        scores[e] = experts.sigmoid ? 1.0f / (1.0f + std::exp(-scores[e])) : std::exp(scores[e] - largest);
        total += scores[e];
    }
    for (int e = 0; e < experts.count; e++) {
        if (!experts.sigmoid) scores[e] /= total;
        choice[e] = experts.choice_bias == nullptr ? scores[e] : scores[e] + experts.choice_bias[e];
    }
    int32_t* const chosen = routing.experts.data() + token * experts.chosen;
    float* const weights = routing.weights.data() + token * experts.chosen;
    float sum = experts.epsilon;
    for (int i = 0; i < experts.chosen; i++) {
        int best = 0;
        for (int e = 1; e < experts.count; e++)
            if (choice[e] > choice[best]) best = e;
        choice[best] = -std::numeric_limits<float>::infinity();
        chosen[i] = best;
        weights[i] = scores[best];
        sum += scores[best];
    }
    for (int i = 0; i < experts.chosen; i++) {
        weights[i] *= experts.normalized ? experts.scale / sum : experts.scale;
        if (experts.factors != nullptr) weights[i] *= experts.factors[chosen[i]];
    }
}

// Numbers the assignments of all tokens.
void edgerazor_decoder::order_assignments(const Layer& layer, int64_t tokens) {
    const int64_t count = tokens * layer.experts.chosen;
    std::vector<int64_t>& first = routing.first;
    std::fill(first.begin(), first.end(), 0);
    for (int64_t i = 0; i < count; i++) first[routing.experts[i] + 1]++;
    for (int e = 0; e < layer.experts.count; e++) first[e + 1] += first[e];
    for (int64_t i = 0; i < count; i++) { // moves the beginning of an expert to its end
        const int64_t assignment = first[routing.experts[i]]++;
        routing.assignments[i] = assignment;
        routing.expert_of[assignment] = routing.experts[i];
    }
    for (int e = layer.experts.count; e > 0; e--) first[e] = first[e - 1];
    first[0] = 0;
}

// The norm of the residual stream goes to the router as it is, and is rotated and quantized for experts, or the router
// gets a norm of its own.
void edgerazor_decoder::route(const ThreadContext& context, const Layer& layer) {
    const int64_t features = model.hidden_size, blocks = score_blocks(layer.experts.count);
    float* const input = context.buffers->input.get();
    const auto fill = [&](const edgerazor_norm& norm) {
        for (int64_t t = context.first; t < context.last; t++)
            apply_norm(norm, context.buffers->residual.get() + t * features, features, input + t * features);
    };
    const bool apart = layer.experts.router_norm.kind != EDGERAZOR_NO_NORM;
    const edgerazor_norm& before =
        layer.experts.before.kind != EDGERAZOR_NO_NORM ? layer.experts.before : layer.before_mlp;
    fill(apart ? layer.experts.router_norm : before);
    // In decode every thread has the token, and scores some of the experts.
    const WorkRange range(blocks, context.shared ? 0 : context.thread, context.shared ? 1 : threads.count());
    math.multiply_unpacked({context.last - context.first, features, range.last - range.first,
                            input + context.first * features,
                            layer.experts.router + range.first * features * kScoreBlock, false,
                            routing.scores.get() + (context.first * blocks + range.first) * kScoreBlock,
                            blocks * kScoreBlock});
    if (apart) fill(before);
    for (int64_t t = context.first; t < context.last; t++) {
        quantize_token(context, layer.expert_inputs, t);
        if (context.shared) choose_experts(layer, t);
    }
    threads.barrier();
    if (context.thread == 0) {
        if (!context.shared) choose_experts(layer, 0);
        order_assignments(layer, context.tokens);
    }
    threads.barrier();
}

// In prefill, the inputs of gate and up in the order of assignments.
void edgerazor_decoder::gather_inputs(const ThreadContext& context, const Layer& layer) {
    const int64_t features = model.hidden_size, chosen = layer.experts.chosen;
    for (int64_t i = context.first * chosen; i < context.last * chosen; i++) {
        const int64_t token = i / chosen, assignment = routing.assignments[i];
        if (model.activation_bits == 16) {
            memcpy(routed.get() + assignment * features, context.buffers->input.get() + token * features,
                   sizeof(float) * features);
            continue;
        }
        const Expert& expert = layer.expert_list[routing.experts[i]];
        for (size_t n = 0; n < expert.inputs.size(); n++) {
            const RowLayout& layout = *expert.gate_up.inputs[n]->layout;
            const QuantizedInput& from = context.buffers->quantized_inputs[expert.inputs[n]];
            const auto copy = [&](auto* to, const auto* whole, int64_t size) {
                memcpy(to + assignment * size, whole + token * size, sizeof *to * size);
            };
            copy(routed_inputs[n].codes.get(), from.codes.get(), (int64_t)layout.x_quads * 4);
            copy(routed_inputs[n].scales.get(), from.scales.get(), layout.segment_count);
            copy(routed_inputs[n].sums.get(), from.sums.get(), layout.segment_count);
        }
    }
    threads.barrier();
}

// Into `y`.
void edgerazor_decoder::mixture_of_experts(const ThreadContext& context, const Layer& layer) {
    route(context, layer);
    if (context.shared) gather_inputs(context, layer);
    const ThreadBuffers& buffers = *context.buffers;
    float* const gate_up[] = {gate.get(), up.get()};
    for (int e = 0; e < layer.experts.count; e++) {
        const int64_t first = routing.first[e], count = routing.first[e + 1] - first;
        if (count == 0) continue;
        const Expert& expert = layer.expert_list[e];
        if (context.shared) {
            matmul_slices(expert.gate_up, context.thread, first, count, routed.get(),
                     [&](int i) -> const QuantizedInput& { return routed_inputs[i]; }, gate_up);
        } else { // the input is the only token, the output that of the assignment
            float* const of_assignment[] = {gate.get() + first * layer.expert_width, up.get() + first * layer.expert_width};
            matmul_slices(expert.gate_up, context.thread, 0, 1, buffers.input.get(),
                     [&](int i) -> const QuantizedInput& { return buffers.quantized_inputs[expert.inputs[i]]; },
                     of_assignment);
        }
    }
    threads.barrier();
    const int64_t assignments = context.tokens * layer.experts.chosen, width = layer.expert_width;
    const WorkRange own(assignments, context.shared ? context.thread : 0, context.shared ? threads.count() : 1);
    for (int64_t a = own.first; a < own.last; a++) {
        layer.activate(gate.get() + a * width, up.get() + a * width, (int)width, buffers.input.get() + a * width);
        quantize_token(context, layer.expert_list[routing.expert_of[a]].down, a);
    }
    if (context.shared) threads.barrier();
    float* const outputs[] = {expert_outputs.get()};
    for (int e = 0; e < layer.experts.count; e++) {
        const int64_t first = routing.first[e], count = routing.first[e + 1] - first;
        if (count > 0)
            matmul_slices(layer.expert_list[e].down, context.thread, first, count, buffers.input.get(),
                     [&](int) -> const QuantizedInput& { return buffers.quantized_inputs[0]; }, outputs);
    }
    threads.barrier();
    // In decode, each thread adds up some of the features for all.
    const int64_t features = model.hidden_size;
    const WorkRange part(features, context.shared ? 0 : context.thread, context.shared ? 1 : threads.count());
    for (int64_t t = context.first; t < context.last; t++) {
        float* const row = y.get() + t * features;
        memset(row + part.first, 0, sizeof(float) * (part.last - part.first));
        for (int64_t i = t * layer.experts.chosen; i < (t + 1) * layer.experts.chosen; i++)
            math.add_scaled(row + part.first, expert_outputs.get() + routing.assignments[i] * features + part.first,
                            routing.weights[i], part.last - part.first);
    }
    if (!context.shared) threads.barrier();
}

// Keeps what the MLP beside the experts gives. In decode one thread does it for all, who meet before `y` is overwritten.
void edgerazor_decoder::keep_mlp(const ThreadContext& context, const Layer& layer) {
    if (!context.shared && context.thread > 0) return;
    for (int64_t t = context.first; t < context.last; t++) {
        const int64_t at = t * model.hidden_size;
        apply_norm(layer.experts.after_mlp_alone, y.get() + at, model.hidden_size, of_mlp.get() + at);
    }
}

// Adds it to what the experts give.
void edgerazor_decoder::add_mlp(const ThreadContext& context, const Layer& layer) {
    if (context.shared || context.thread == 0)
        for (int64_t t = context.first; t < context.last; t++) {
            float* const row = y.get() + t * model.hidden_size;
            apply_norm(layer.experts.after, row, model.hidden_size, row);
            math.add(row, of_mlp.get() + t * model.hidden_size, model.hidden_size);
        }
    if (!context.shared) threads.barrier();
}
