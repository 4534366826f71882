// Inputs that single layers get beside the residual stream: they are computed once for a token, of all layers together,
// from its embedding and from its row of a table, and each layer adds what it makes of its own.
#include <string.h>

#include <algorithm>

#include "decoder.hpp"

using namespace edgerazor;

namespace {

constexpr int64_t kRowBlock = 16;       // rows of the projection that lie side by side
constexpr int64_t kBlocksTogether = 4;  // row blocks that all tokens are multiplied by while they are in the cache

} // namespace

void edgerazor_decoder::make_layer_inputs(const ThreadContext& context, const int32_t* tokens) {
    const edgerazor_layer_inputs& of = model.layer_inputs;
    const int64_t hidden = model.hidden_size, blocks = (input_width + kRowBlock - 1) / kRowBlock;
    float* const inputs = layer_inputs.get();
    if (context.shared || context.thread == 0)
        for (int64_t t = context.first; t < context.last; t++)
            input_table.read(matmul_kernels, tokens[t], table_rows.get() + t * input_width);
    if (context.shared) threads.barrier(); // every token has its embedding
    const WorkRange own(blocks, context.thread, threads.count());
    for (int64_t block = own.first; block < own.last; block += kBlocksTogether) {
        const int64_t count = std::min(kBlocksTogether, own.last - block);
        const size_t row = (of.half ? sizeof(uint16_t) : sizeof(float)) * hidden;
        math.multiply_unpacked({context.tokens, hidden, count, context.buffers->residual.get(),
                                (const char*)of.projection + block * kRowBlock * row, of.half != 0,
                                inputs + block * kRowBlock, layer_input_stride()});
    }
    threads.barrier();
    const WorkRange parts(context.tokens * model.layer_count, context.thread, threads.count());
    for (int64_t i = parts.first; i < parts.last; i++) {
        float* const input = inputs + i / model.layer_count * layer_input_stride() + i % model.layer_count * of.features;
        const float* const row = table_rows.get() + i * of.features;
        for (int f = 0; f < of.features; f++) input[f] *= of.projection_scale;
        apply_norm(of.norm, input, of.features, input);
        for (int f = 0; f < of.features; f++) input[f] = (input[f] + row[f] * of.table_scale) * of.scale;
    }
    threads.barrier();
}

// residual += residual_scale * norm(o(activation(gate(residual)) * input))
void edgerazor_decoder::add_layer_input(const ThreadContext& context, const Layer& layer) {
    const int64_t features = model.layer_inputs.features;
    norm_and_quantize(context, layer.input_gate_group, {EDGERAZOR_NO_NORM, 0, nullptr, nullptr});
    float* const gates_of[] = {gate.get()};
    matmul(context, layer.input_gate_group, context.tokens, gates_of);
    const float* const inputs = layer_inputs.get() + layer.number * features;
    quantize_input(context, layer.input_o_group, [&](int64_t t, float* input) {
        layer.activate(gate.get() + t * features, inputs + t * layer_input_stride(), (int)features, input);
    });
    float* const result[] = {y.get()};
    matmul(context, layer.input_o_group, context.tokens, result);
    add_residual(context, layer.after_input);
}
