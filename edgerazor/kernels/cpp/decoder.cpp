// A transformer decoder on packed matrices. One token's way through it, with the functions that do each step:
//
//   token id
//      |        embed                  dequantize_row: one row of the embedding, float32; rotated back
//      v
//   residual [hidden_size] <-------------------------------------------------------------------------+
//      |        make_layer_inputs      where layers have inputs of their own: decoder_inputs.cpp     |
//      |                                                                                             |
//      |  every layer (forward_layer):                                                               |
//      |                                                                                             |
//      +-> norm_and_quantize           RMSNorm or LayerNorm; int8 codes and scales of the result     |
//      |        v                                                                                    |
//      |   matmul (qkv)                GEMV (one token) or GEMM over the packed codes        barrier |
//      |        v                                                                                    |
//      |   attention                   or another mixer: decoder_recurrent.cpp                       |
//      |     q_norm_rope,              norms of q and k, RoPE                                        |
//      |     k_norm_rope_store         k and v quantized into a KV slot             barrier, prefill |
//      |     attention_tile            q against blocks of KV slots, with an online softmax          |
//      |        v                                                                            barrier |
//      |   quantize_input                                                                            |
//      |        v                                                                                    |
//      |   matmul (o)                                                                        barrier |
//      |        v                                                                                    |
//      |   add_residual                residual += y, or += norm(y)  ------------------------------->+
//      |                                                                                             |
//      +-> norm_and_quantize                                                                         |
//      |        v                                                                                    |
//      |   matmul (gate_up)                                                                  barrier |
//      |        v                                                                                    |
//      |   quantize_input              SwiGLU: silu(gate) * up, or another activation                |
//      |        v                                                                                    |
//      |   matmul (down)               or a mixture of experts: decoder_experts.cpp          barrier |
//      |        v                                                                                    |
//      |   add_residual  --------------------------------------------------------------------------->+
//      |        v                                                                                    |
//      |   add_layer_input             where layers have inputs of their own: decoder_inputs.cpp --->+
//      |
//      |  after the last layer, for output positions only (LogitSink, compute_logits):
//      v
//   norm_and_quantize                  final norm
//      v
//   matmul (head)                                                                            barrier
//      v
//   logits [vocab_size]                -> copied out, or log-probabilities, or the argmax (logit_sinks.hpp)
//
// Where matrices are rotated, every step that quantizes the input of a matrix rotates it before.
//
// All threads go through the same steps. A step with a matrix is divided by row blocks, attention by KV heads and
// tokens, and a barrier stands where a step needs what other threads computed. In decode (one token), every thread
// keeps the residual stream for itself and does norms and quantization redundantly, which takes less time than a
// barrier. In prefill, each thread does them for some of the tokens, in buffers that all threads share, with a barrier
// after them.
#include "decoder.hpp"

#include <string.h>

#include <algorithm>

using namespace edgerazor;

RowTable::RowTable(const edgerazor_matrix& from) : group({&from}, 0) {
    if (group.empty() || group.matrices[0].parts.size() == 1) return;
    part.resize(from.rows);
    index.resize(from.rows);
    const std::vector<FormatRows>& parts = group.matrices[0].parts;
    for (size_t p = 0; p < parts.size(); p++)
        for (int64_t i = 0; i < parts[p].count; i++) {
            part[parts[p].rows[i]] = (int32_t)p;
            index[parts[p].rows[i]] = (int32_t)i;
        }
}

void RowTable::read(const MatmulKernels& kernels, int32_t row, float* out) const {
    const PackedMatrix& matrix = group.matrices[0];
    dequantize_row(*matrix.layout, matrix.parts[part.empty() ? 0 : part[row]], index.empty() ? row : index[row], out);
    if (matrix.block > 0) kernels.rotate_back(out, matrix.layout->columns, matrix.block, matrix.signs, out);
}

edgerazor_decoder::edgerazor_decoder(const edgerazor_model& from, int isa, int count)
    : model(from), matmul_kernels(edgerazor::matmul_kernels(isa)), math(float_kernels(isa)), threads(count),
      embedding(from.embedding), head({&from.head}, count), input_table(from.layer_inputs.table),
      kv_cache(from.kv_bits), decode_buffers(count), scratch(count) {
    layers.reserve(from.layer_count);
    for (int i = 0; i < from.layer_count; i++) layers.emplace_back(from.layers[i], i, math, count);
    std::vector<const LinearGroup*> groups = {&head};
    input_width = (int64_t)from.layer_count * from.layer_inputs.features;
    for (Layer& layer : layers) {
        for (const LinearGroup* group : layer.groups()) groups.push_back(group);
        if (layer.mixer == EDGERAZOR_ATTENTION)
            layer.kv_head = layer.owns_kv ? kv_cache.add(layer.num_kv_heads, layer.head_dim)
                                          : layers[layer.kv_source].kv_head;
        place_states(layer);
        measure(layer);
        if (layer.mixer != EDGERAZOR_ATTENTION || layer.owns_kv) keeping_layers = layer.number + 1;
    }
    for (const LinearGroup* group : groups) {
        max_columns = std::max(max_columns, group->columns());
        max_inputs = std::max(max_inputs, group->inputs.size());
    }
}

// Gives a layer its part of every state slot.
void edgerazor_decoder::place_states(Layer& layer) {
    if (layer.mixer == EDGERAZOR_ATTENTION) return;
    layer.state = states.add((layer.convolution.kernel - 1) * layer.convolved());
    if (layer.heads_with_state() > 0)
        layer.head_states = states.add(layer.heads_with_state() * layer.head_state_floats());
}

// Makes the buffers of products as wide as this layer needs them.
void edgerazor_decoder::measure(const Layer& layer) {
    const auto widen = [](int64_t& width, int64_t needed) { width = std::max(width, needed); };
    widen(attended_width, layer.width);
    widen(gate_width, layer.plain_mlp ? 0 : layer.gate.rows);
    widen(up_width, layer.fused_gate_up ? 0 : layer.up.rows);
    if (layer.experts.count > 0) {
        const int64_t width = layer.experts.chosen * layer.expert_width;
        for (int64_t* of : {&gate_width, &up_width, &max_columns}) widen(*of, width);
        widen(max_chosen, layer.experts.chosen);
        widen(max_experts, layer.experts.count);
    }
    if (!layer.input_gate_group.empty()) widen(gate_width, layer.input_gate.rows);
    if (layer.mixer != EDGERAZOR_ATTENTION || layer.fused_qkv || layer.gated_queries)
        widen(mixed_width, layer.rows(0));
    if (layer.mixer == EDGERAZOR_ATTENTION) widen(q_width, layer.q_width()), widen(kv_width, layer.kv_width());
    if (layer.has_gate) widen(gates_width, layer.rows(3));
    if (layer.heads_with_state() == 0) return;
    widen(gates_width, layer.rows(1));
    widen(heads_width, layer.heads_with_state());
    widen(convolved_width, layer.convolved());
}

// A call and its micro-batches ----------------------------------------------------------------------------------------

void edgerazor_decoder::forward(const edgerazor_sequence_span* spans, int64_t span_count, const int32_t* tokens,
                                LogitSink& sink) {
    int64_t total = 0;
    for (int64_t i = 0; i < span_count; i++) total += spans[i].count;
    // Micro-batches of equal length, because a short one takes nearly as long as a full one.
    const int64_t micro_batches = (total + kMicroBatchTokens - 1) / kMicroBatchTokens;
    for (int64_t i = 0; i < micro_batches; i++) {
        const WorkRange range(total, (int)i, (int)micro_batches);
        const int64_t first = range.first, count = range.last - first;
        // The last layers need not compute the tokens before the first output, if they keep nothing of them.
        const int64_t dropped =
            keeping_layers < model.layer_count ? std::min(sink.first_needed(first, count), count) : 0;
        const auto compute = [&](const ThreadContext& context, int64_t token, int layer, int end) {
            for (; layer < end; layer++) {
                forward_layer(context, layer);
                if (layer < deep_levels) add_deep_features(context, tokens + token, layer);
            }
        };
        const auto finish = [&](const ThreadContext& context, int64_t token, int layer) {
            compute(context, token, layer, model.layer_count);
            if (context.shared) threads.barrier(); // the sink divides the tokens in another way
            sink.consume(context);
        };
        plan_micro_batch(spans, span_count, first, count);
        allocate(count);
        if (dropped == 0) sink.begin(first, count);
        threads.run([&](int thread) {
            const ThreadContext context = context_of(thread, count);
            embed(context, tokens + first);
            if (input_width > 0) make_layer_inputs(context, tokens + first);
            if (dropped == 0) return finish(context, first, 0);
            compute(context, first, 0, keeping_layers);
        });
        if (dropped == 0 || dropped == count) continue;
        drop_first(dropped, count - dropped);
        plan_micro_batch(spans, span_count, first + dropped, count - dropped);
        sink.begin(first + dropped, count - dropped);
        threads.run([&](int thread) {
            finish(context_of(thread, count - dropped), first + dropped, keeping_layers);
        });
    }
}

// What layers get of the last tokens of a micro-batch takes the place of what they get of the first ones.
void edgerazor_decoder::drop_first(int64_t dropped, int64_t left) {
    allocate(left); // of a single token, every thread has buffers of its own
    const auto move = [&](float* rows, int64_t width) {
        memmove(rows, rows + dropped * width, sizeof(float) * left * width);
    };
    move(prefill_buffers.residual.get(), model.hidden_size);
    if (input_width > 0) move(layer_inputs.get(), layer_input_stride());
    if (left > 1) return;
    for (ThreadBuffers& buffers : decode_buffers)
        memcpy(buffers.residual.get(), prefill_buffers.residual.get(), sizeof(float) * model.hidden_size);
}

// Finds the chunks of spans that make up the tokens [first, first + count) of a call.
void edgerazor_decoder::plan_micro_batch(const edgerazor_sequence_span* spans, int64_t span_count, int64_t first,
                                         int64_t count) {
    chunks.clear();
    int64_t begin = 0; // of the span, among the tokens of the call
    for (const edgerazor_sequence_span* span = spans; span < spans + span_count; begin += span->count, span++) {
        const int64_t from = std::max(begin, first), to = std::min(begin + span->count, first + count);
        if (from < to)
            chunks.push_back({from - first, to - from, {span->prefix_slot, span->prefix_length, nullptr}, span->slot,
                              span->past_length + from - begin, span->pages,
                              from == begin ? span->state_in : span->state_out, span->state_out});
    }
    chunk_of_token.clear();
    for (const SpanChunk& chunk : chunks) chunk_of_token.insert(chunk_of_token.end(), chunk.count, &chunk);
    if (count > 1) plan_attention_tiles();
}

// Allocates the buffers for so many tokens, so that threads never have to.
void edgerazor_decoder::allocate(int64_t tokens) {
    int64_t& allocated = tokens > 1 ? prefill_tokens : decode_tokens;
    if (tokens <= allocated) return;
    const auto allocate_buffers = [&](ThreadBuffers& buffers, int64_t count) {
        buffers.residual.reserve(count * model.hidden_size);
        buffers.input.reserve(count * max_columns);
        buffers.quantized_inputs.resize(max_inputs);
        const auto allocate_inputs = [&](const LinearGroup& group) {
            for (size_t i = 0; i < group.inputs.size(); i++)
                buffers.quantized_inputs[i].reserve(*group.inputs[i]->layout, count);
        };
        for (const Layer& layer : layers) {
            for (const LinearGroup* group : layer.groups()) allocate_inputs(*group);
            if (layer.experts.count > 0)
                buffers.quantized_inputs[0].reserve(*layer.expert_list[0].down.inputs[0]->layout,
                                                    count * layer.experts.chosen);
        }
        allocate_inputs(head);
    };
    if (tokens > 1) {
        allocate_buffers(prefill_buffers, std::max(tokens, kLogitTokens));
    } else {
        for (ThreadBuffers& buffers : decode_buffers) allocate_buffers(buffers, 1);
    }
    q.reserve(tokens * q_width);
    k.reserve(tokens * kv_width);
    v.reserve(tokens * kv_width);
    layer_inputs.reserve(tokens * layer_input_stride());
    table_rows.reserve(tokens * input_width);
    attended.reserve(tokens * attended_width);
    gate.reserve(tokens * gate_width);
    up.reserve(tokens * up_width);
    mixed.reserve(tokens * mixed_width);
    gates.reserve(tokens * gates_width);
    betas.reserve(tokens * heads_width);
    alphas.reserve(tokens * heads_width);
    convolved.reserve(tokens * convolved_width);
    y.reserve(tokens * model.hidden_size);
    if (max_experts > 0) allocate_routing(tokens);
    const int tile_tokens = (int)std::min(tokens, kAttentionTileTokens);
    int64_t scratch_bytes = (int64_t)sizeof(float) * 2 * tokens;
    for (const Layer& layer : layers)
        if (layer.mixer == EDGERAZOR_ATTENTION)
            scratch_bytes = std::max(
                scratch_bytes, math.attention_scratch_bytes(layer.head_dim, layer.queries_per_kv(), tile_tokens));
    for (GrowBuffer<char>& buffer : scratch) buffer.reserve(scratch_bytes);
    allocated = tokens;
}

ThreadContext edgerazor_decoder::context_of(int thread, int64_t tokens) {
    if (tokens == 1) return {&decode_buffers[thread], thread, 1, 0, 1, false};
    const WorkRange range(tokens, thread, threads.count());
    return {&prefill_buffers, thread, tokens, range.first, range.last, true};
}

// Steps ---------------------------------------------------------------------------------------------------------------

void edgerazor_decoder::embed(const ThreadContext& context, const int32_t* tokens) {
    for (int64_t t = context.first; t < context.last; t++) {
        if (tokens[t] >= model.vocab_size) { // of a picture
            memcpy(context.buffers->residual.get() + t * model.hidden_size,
                   features + (int64_t)(tokens[t] - model.vocab_size) * model.hidden_size,
                   model.hidden_size * sizeof(float));
            continue;
        }
        float* residual = context.buffers->residual.get() + t * model.hidden_size;
        embedding.read(matmul_kernels, tokens[t], residual);
        if (model.embedding_scale != 1)
            for (int i = 0; i < model.hidden_size; i++) residual[i] *= model.embedding_scale;
    }
}

// residual += what is added behind a layer for tokens of pictures
void edgerazor_decoder::add_deep_features(const ThreadContext& context, const int32_t* tokens, int layer) {
    const float* level = deep_features + layer * feature_count * model.hidden_size;
    for (int64_t t = context.first; t < context.last; t++)
        if (tokens[t] >= model.vocab_size)
            math.add(context.buffers->residual.get() + t * model.hidden_size,
                     level + (int64_t)(tokens[t] - model.vocab_size) * model.hidden_size, model.hidden_size);
}

void edgerazor_decoder::apply_norm(const edgerazor_norm& norm, const float* x, int64_t count, float* out) const {
    if (norm.kind == EDGERAZOR_RMS_NORM) {
        math.rms_norm(x, (int)count, norm.epsilon, norm.weight, out);
    } else if (norm.kind == EDGERAZOR_LAYER_NORM) {
        math.layer_norm(x, (int)count, norm.epsilon, norm.weight, norm.bias, out);
    } else if (x != out) {
        memcpy(out, x, count * sizeof(float));
    }
}

// Rotates a token's input of a linear group once for all its matrices, and quantizes it in every way that they need.
void edgerazor_decoder::quantize_token(const ThreadContext& context, const LinearGroup& group, int64_t token) {
    float* x = context.buffers->input.get() + token * group.columns();
    if (group.block() > 0) matmul_kernels.rotate(x, (int)group.columns(), group.block(), group.signs(), x);
    if (model.activation_bits == 16) return;
    for (size_t i = 0; i < group.inputs.size(); i++) {
        const RowLayout& layout = *group.inputs[i]->layout;
        const QuantizedInput& input = context.buffers->quantized_inputs[i];
        const int64_t segment = token * layout.segment_count;
        if (!matmul_kernels.quantize(layout, x, model.activation_bits, group.inputs[i]->scale,
                                     input.codes.get() + token * layout.x_quads * 4, input.scales.get() + segment,
                                     input.sums.get() + segment))
            finite.store(false, std::memory_order_relaxed);
    }
}

// The input of a linear group is the norm of the residual stream.
void edgerazor_decoder::norm_and_quantize(const ThreadContext& context, const LinearGroup& group,
                                          const edgerazor_norm& norm) {
    const float* residual = context.buffers->residual.get();
    quantize_input(context, group, [&](int64_t t, float* input) {
        apply_norm(norm, residual + t * model.hidden_size, model.hidden_size, input);
    });
}

// The products of the thread's row blocks with the input of a linear group, into outputs[matrix] [tokens, rows]; then a
// barrier.
void edgerazor_decoder::matmul(const ThreadContext& context, const LinearGroup& group, int64_t tokens,
                               float* const* outputs) {
    const auto input_of = [&](int i) -> const QuantizedInput& { return context.buffers->quantized_inputs[i]; };
    matmul_slices(group, context.thread, 0, tokens, context.buffers->input.get(), input_of, outputs);
    threads.barrier();
}

// residual += residual_scale * norm(y)
void edgerazor_decoder::add_residual(const ThreadContext& context, const edgerazor_norm& norm) {
    for (int64_t t = context.first; t < context.last; t++) {
        float* row = y.get() + t * model.hidden_size;
        float* residual = context.buffers->residual.get() + t * model.hidden_size;
        float* added = row;
        if (norm.kind != EDGERAZOR_NO_NORM) {
            added = context.buffers->input.get() + t * max_columns;
            apply_norm(norm, row, model.hidden_size, added);
        }
        if (model.residual_scale == 1)
            math.add(residual, added, model.hidden_size);
        else // in decode, all threads read the same row
            for (int i = 0; i < model.hidden_size; i++) residual[i] += added[i] * model.residual_scale;
    }
    // The rows of `normalized` overlap those in which other threads will write the next linear group's input.
    if (context.shared && norm.kind != EDGERAZOR_NO_NORM) threads.barrier();
}

// The products with the inputs of a mixer.
void edgerazor_decoder::mixer_inputs(const ThreadContext& context, const Layer& layer) {
    norm_and_quantize(context, layer.in, layer.before_attention);
    if (layer.mixer == EDGERAZOR_GATED_DELTA_RULE) {
        float* const outputs[] = {mixed.get(), gates.get(), betas.get(), alphas.get()};
        return matmul(context, layer.in, context.tokens, outputs);
    }
    const bool plain_q = layer.mixer == EDGERAZOR_ATTENTION && !layer.gated_queries && !layer.fused_qkv;
    float* const all[] = {plain_q ? q.get() : mixed.get(), k.get(), v.get(), gates.get()};
    float* outputs[4]; // of the matrices that are there
    int count = 0;
    for (int i = 0; i < 4; i++)
        if (layer.inputs[i].part_count > 0) outputs[count++] = all[i];
    matmul(context, layer.in, context.tokens, outputs);
}

void edgerazor_decoder::forward_layer(const ThreadContext& context, int number) {
    const Layer& layer = layers[number];
    mixer_inputs(context, layer);
    if (layer.mixer == EDGERAZOR_ATTENTION)
        attention(context, layer);
    else if (layer.mixer == EDGERAZOR_SHORT_CONVOLUTION)
        short_convolution(context, layer);
    else if (layer.mixer == EDGERAZOR_MAMBA2)
        mamba2(context, layer);
    else
        gated_delta_rule(context, layer);
    quantize_input(context, layer.out, [&](int64_t t, float* input) {
        memcpy(input, attended.get() + t * layer.width, layer.width * sizeof(float));
        if (layer.has_gate || layer.gated_queries) gate_attention(layer, t, input);
        if (layer.mixer == EDGERAZOR_MAMBA2) norm_groups(layer.mamba2, input);
    });
    float* const result[] = {y.get()};
    matmul(context, layer.out, context.tokens, result);
    add_residual(context, layer.after_attention);
    if (layer.has_mlp()) mlp(context, layer);
    const bool has_experts = layer.experts.count > 0, has_both = has_experts && layer.has_mlp();
    if (has_both) keep_mlp(context, layer);
    if (has_experts) mixture_of_experts(context, layer);
    if (has_both) add_mlp(context, layer);
    add_residual(context, layer.after_mlp);
    if (!layer.input_gate_group.empty()) add_layer_input(context, layer);
    if (layer.output_scale == 1) return;
    float* const residual = context.buffers->residual.get();
    for (int64_t i = context.first * model.hidden_size; i < context.last * model.hidden_size; i++)
        residual[i] *= layer.output_scale;
}

void edgerazor_decoder::mlp(const ThreadContext& context, const Layer& layer) {
    norm_and_quantize(context, layer.gate_up, layer.before_mlp);
    float* const separate[] = {gate.get(), up.get()};
    matmul(context, layer.gate_up, context.tokens, layer.plain_mlp ? separate + 1 : separate);
    const int64_t width = layer.mlp_width, row = layer.fused_gate_up ? 2 * width : width;
    const float* const gates_of = layer.plain_mlp ? up.get() : gate.get();
    const float* const ups = layer.fused_gate_up ? gate.get() + width : up.get();
    quantize_input(context, layer.down_group, [&](int64_t t, float* input) {
        layer.activate(gates_of + t * row, layer.plain_mlp ? nullptr : ups + t * row, (int)width, input);
    });
    float* const result[] = {y.get()};
    matmul(context, layer.down_group, context.tokens, result);
}

void edgerazor_decoder::compute_logits(const ThreadContext& layers_context, const std::vector<int64_t>& rows,
                                       int64_t first, int64_t count, float* out) {
    ThreadContext context = layers_context;
    context.tokens = count;
    if (context.shared) {
        const WorkRange range(count, context.thread, threads.count());
        context.first = range.first;
        context.last = range.last;
    }
    const float* residual = context.buffers->residual.get();
    quantize_input(context, head, [&](int64_t t, float* input) {
        apply_norm(model.final_norm, residual + rows[first + t] * model.hidden_size, model.hidden_size, input);
    });
    matmul(context, head, count, &out);
    if (model.logit_scale == 1 && model.logit_soft_cap == 0) return;
    const WorkRange range(count * model.vocab_size, context.thread, threads.count());
    if (model.logit_scale != 1)
        for (int64_t i = range.first; i < range.last; i++) out[i] *= model.logit_scale;
    if (model.logit_soft_cap > 0) math.soft_cap(out + range.first, range.last - range.first, model.logit_soft_cap);
    threads.barrier();
}
