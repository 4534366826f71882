// The state of a decoder. Its steps are in decoder.cpp, decoder_attention.cpp, decoder_recurrent.cpp,
// decoder_experts.cpp and decoder_inputs.cpp, its C interface in decoder_api.cpp.
#pragma once
#include <stdint.h>

#include <atomic>
#include <vector>

#include "aligned_buffer.hpp"
#include "decoder.h"
#include "float_kernels.hpp"
#include "kv_cache.hpp"
#include "linear_group.hpp"
#include "matmul_kernels.hpp"
#include "state_store.hpp"
#include "thread_pool.hpp"

namespace edgerazor {

constexpr int64_t kMicroBatchTokens = 512;   // tokens that go through the layers together
constexpr int64_t kLogitTokens = 64;         // tokens whose logits are computed together, where they are not the output
constexpr int64_t kAttentionTileTokens = 32; // tokens of an attention tile
constexpr int64_t kTilesTogether = 8;        // attention tiles that a thread takes at a time, where there are many

// Where the products of a matrix lie: those of token t from start + t * stride on.
struct Products {
    float* start;
    int64_t stride;
    float* of(int64_t token) const { return start + token * stride; }
};

// An expert's matrices, and which of the inputs of all experts of its layer (`Layer::expert_inputs`) are those of its
// gate and up.
struct Expert {
    LinearGroup gate_up, down;
    std::vector<int> inputs;

    Expert(const edgerazor_expert& from, const LinearGroup& all, int threads)
        : gate_up({&from.gate, &from.up}, threads), down({&from.down}, threads) {
        for (const PackedMatrix* matrix : gate_up.inputs) inputs.push_back(all.find_input(*matrix));
    }
};

// What of a layer its parts need while they compute. How a layer is composed is decided when the decoder is made.
struct Layer : edgerazor_layer {
    LinearGroup in, out, gate_up, down_group; // the mixer's inputs, `o`, ...
    LinearGroup input_gate_group, input_o_group;
    int number;
    bool fused_qkv, fused_gate_up, plain_mlp; // q, k and v, or gate and up, are the rows of one matrix; there is no gate
    bool has_gate;                            // of attention, in a matrix of its own
    bool owns_kv;                             // attention: it does not attend to the keys and values of another layer
    int64_t width, mlp_width, expert_width;   // of what `o`, `down`, and `down` of an expert get
    LinearGroup expert_inputs;                // gate and up of all experts
    std::vector<Expert> expert_list;
    int kv_head = 0;                          // attention: the number of its first one in the KV cache
    int decode_parts = 1;                     // attention: of the query heads of a KV head, in decode
    int64_t state = 0, head_states = 0;       // other mixers: where their states lie in a state slot: those of the
                                              // convolution, and those of heads
    // activation(gate) * up, or with null instead of `up` activation(gate)
    void (*activate)(const float* gate, const float* up, int count, float* out);

    Layer(const edgerazor_layer& from, int number, const FloatKernels& math, int threads)
        : edgerazor_layer(from), in({&from.inputs[0], &from.inputs[1], &from.inputs[2], &from.inputs[3]}, threads),
          out({&from.o}, threads), gate_up({&from.gate, &from.up}, threads), down_group({&from.down}, threads),
          input_gate_group({&from.input_gate}, threads), input_o_group({&from.input_o}, threads), number(number),
          fused_qkv(from.inputs[1].part_count == 0 && from.kv_source == number),
          fused_gate_up(from.up.part_count == 0), plain_mlp(from.gate.part_count == 0),
          has_gate(from.mixer == EDGERAZOR_ATTENTION && from.inputs[3].part_count > 0),
          owns_kv(from.kv_source == number), width(out.columns()),
          mlp_width(down_group.empty() ? 0 : down_group.columns()), expert_width(0), expert_inputs(inputs_of(from.experts), 0),
          activate(from.activation == EDGERAZOR_SILU        ? math.swiglu
                   : from.activation == EDGERAZOR_GELU_TANH ? math.geglu
                                                            : math.reglu_squared) {
        for (int i = 0; i < experts.count; i++) expert_list.emplace_back(experts.experts[i], expert_inputs, threads);
        if (experts.count > 0) expert_width = expert_list[0].down.columns();
        experts.experts = nullptr; // the caller's
        if (mixer != EDGERAZOR_ATTENTION) return;
        // As few parts as give every thread equally many, if any number does.
        for (int parts = queries_per_kv(); parts > 0; parts--)
            if (queries_per_kv() % parts == 0 && num_kv_heads * parts % threads == 0) decode_parts = parts;
    }

    // The linear groups that get an input for each token.
    std::vector<const LinearGroup*> groups() const {
        std::vector<const LinearGroup*> there;
        for (const LinearGroup* group :
             {&in, &out, &gate_up, &down_group, &expert_inputs, &input_gate_group, &input_o_group})
            if (!group->empty()) there.push_back(group);
        return there;
    }

    bool has_mlp() const { return !down_group.empty(); }
    int64_t q_width() const { return (int64_t)num_heads * head_dim; }
    int64_t kv_width() const { return (int64_t)num_kv_heads * head_dim; }
    int queries_per_kv() const { return num_heads / num_kv_heads; }

    int64_t rows(int input) const { return inputs[input].part_count > 0 ? inputs[input].rows : 0; }

    // Features that the convolution of the mixer is over; 0: it has none.
    int64_t convolved() const {
        if (mixer == EDGERAZOR_MAMBA2) return width + 2 * (int64_t)mamba2.groups * mamba2.state_size;
        return mixer == EDGERAZOR_ATTENTION ? 0 : mixer == EDGERAZOR_SHORT_CONVOLUTION ? width : rows(0);
    }

    // Heads that have a state each.
    int heads_with_state() const {
        return mixer == EDGERAZOR_GATED_DELTA_RULE ? delta_rule.value_heads : mixer == EDGERAZOR_MAMBA2 ? mamba2.heads : 0;
    }

    // Floats of the state of such a head: whole vectors of sixteen columns.
    int64_t head_state_floats() const {
        const bool is_delta = mixer == EDGERAZOR_GATED_DELTA_RULE;
        const int columns = is_delta ? delta_rule.value_dim : mamba2.head_dim;
        return (int64_t)(columns + 15) / 16 * 16 * (is_delta ? delta_rule.key_dim : mamba2.state_size);
    }

  private:
    static std::vector<const edgerazor_matrix*> inputs_of(const edgerazor_experts& experts) {
        std::vector<const edgerazor_matrix*> matrices;
        for (int i = 0; i < experts.count; i++)
            for (const edgerazor_matrix* matrix : {&experts.experts[i].gate, &experts.experts[i].up})
                matrices.push_back(matrix);
        return matrices;
    }
};

// Which experts of a layer compute which tokens of a micro-batch. A token and one of its experts are an *assignment*;
// assignments are in the order of their experts, and those of an expert in the order of their tokens.
struct Routing {
    GrowBuffer<float> scores;         // [tokens, score_stride]: of all experts
    GrowBuffer<float> choice;         // likewise: what they are chosen by
    std::vector<int32_t> experts;     // [tokens, chosen], the best one first
    std::vector<float> weights;       // [tokens, chosen]
    std::vector<int64_t> assignments; // [tokens, chosen]: their numbers
    std::vector<int32_t> expert_of;   // [assignments]
    std::vector<int64_t> first;       // [experts + 1]: the first assignment of each
};

// A matrix of which a token reads its row.
struct RowTable {
    LinearGroup group;
    std::vector<int32_t> part, index; // of each row, where the rows have several formats

    explicit RowTable(const edgerazor_matrix& from);
    // A row, rotated back.
    void read(const MatmulKernels& kernels, int32_t row, float* out) const;
};

// The tokens of a span that are in the current micro-batch.
struct SpanChunk {
    int64_t token; // the first one's index in the micro-batch
    int64_t count;
    SlotRange prefix;
    int64_t slot, past_length; // as in the span, but counting the tokens of earlier micro-batches
    const int32_t* pages;      // as in the span
    int64_t state_in, state_out; // as in the span, but going on from the tokens of earlier micro-batches
    int64_t first_position() const { return prefix.count + past_length; }
};

// Query heads [first, last) among those of a KV head.
struct QueryHeads {
    int kv_head, first, last;
};

// Some tokens of a chunk.
struct TokenTile {
    const SpanChunk* chunk;
    int64_t first, count;
};

// A unit of attention that one thread computes: query heads of one KV head, for some tokens of a chunk.
struct AttentionTile {
    TokenTile tokens;
    QueryHeads heads;
};

// What the steps between two barriers read and write.
struct ThreadBuffers {
    GrowBuffer<float> residual; // [tokens, hidden_size]: the residual stream
    GrowBuffer<float> input;    // [tokens, columns]: the input of a linear group
    std::vector<QuantizedInput> quantized_inputs;
};

// What a thread works on. In decode, with one token, every thread has the whole token in buffers of its own; in
// prefill, it has a range of the tokens in buffers that all threads share.
struct ThreadContext {
    ThreadBuffers* buffers;
    int thread;
    int64_t tokens;      // of the micro-batch
    int64_t first, last; // tokens that this thread works on in steps without a matrix
    bool shared;
};

// Receives the hidden states after the last layer, and computes from them the logits that a call returns.
class LogitSink {
  public:
    virtual ~LogitSink() = default;
    // Of the tokens [first, first + tokens) of a call, the number of the first one whose hidden states it needs; `tokens`
    // or more: of none.
    virtual int64_t first_needed(int64_t first, int64_t tokens) const = 0;
    // Before each micro-batch, by one thread: the first token's index in the call, and the number of tokens.
    virtual void begin(int64_t first, int64_t tokens) = 0;
    // After the last layer, by all threads.
    virtual void consume(const ThreadContext& context) = 0;
};

} // namespace edgerazor

// The name is that of the C interface.
struct edgerazor_decoder {
    edgerazor_decoder(const edgerazor_model& model, int isa, int threads);

    edgerazor_model model;
    const edgerazor::MatmulKernels& matmul_kernels;
    const edgerazor::FloatKernels& math;
    edgerazor::ThreadPool threads;
    edgerazor::RowTable embedding;
    edgerazor::LinearGroup head;
    edgerazor::RowTable input_table; // of the inputs of layers; empty where there are none
    std::vector<edgerazor::Layer> layers;
    edgerazor::KvCache kv_cache;
    edgerazor::StateStore states;
    const float *cosines = nullptr, *sines = nullptr, *query_scales = nullptr;
    const float *features = nullptr, *deep_features = nullptr; // of tokens behind the vocabulary
    int64_t feature_count = 0;
    int32_t deep_levels = 0;

    int64_t max_columns = 0;                               // of the input of a linear group
    size_t max_inputs = 0;                                 // quantized inputs of a linear group
    int64_t decode_tokens = 0, prefill_tokens = 0;         // tokens that buffers are allocated for
    edgerazor::ThreadBuffers prefill_buffers;              // of all threads
    std::vector<edgerazor::ThreadBuffers> decode_buffers;  // of each thread
    std::vector<edgerazor::GrowBuffer<char>> scratch;      // of each thread, for attention
    edgerazor::GrowBuffer<float> q, k, v, gate, up, y, logits; // [tokens, ...]
    edgerazor::GrowBuffer<float> attended;                 // [tokens, ...]: the results of a mixer, which `o` gets
    // Products of inputs of a mixer: those of its first matrix where they are not q alone, and of its others. [tokens, ...]
    edgerazor::GrowBuffer<float> mixed, gates, betas, alphas, convolved;
    // Inputs of all layers [tokens, layer_input_stride()], and rows of their table [tokens, input_width].
    edgerazor::GrowBuffer<float> layer_inputs, table_rows;
    // The most floats that a token has in them, over all layers.
    int64_t q_width = 0, kv_width = 0, attended_width = 0, gate_width = 0, up_width = 0, mixed_width = 0;
    int64_t gates_width = 0, heads_width = 0, convolved_width = 0;
    int64_t input_width = 0;
    int keeping_layers = 0; // the layers behind these keep nothing of a token: they use keys and values of these
    std::vector<edgerazor::SpanChunk> chunks;              // of the micro-batch
    std::vector<const edgerazor::SpanChunk*> chunk_of_token;
    std::vector<edgerazor::TokenTile> tiles;               // of the micro-batch, in prefill
    // Of mixtures of experts: the inputs of gate and up, in prefill, and the products of `down`. [assignments, ...]
    edgerazor::Routing routing;
    edgerazor::GrowBuffer<float> routed, expert_outputs, of_mlp; // the last one: what an MLP beside them gives, [tokens, ...]
    std::vector<edgerazor::QuantizedInput> routed_inputs;
    int64_t max_chosen = 0, max_experts = 0;               // over all layers
    std::atomic<int64_t> next_tile{0};
    std::atomic<bool> finite{true};

    // Floats of a token in `layer_inputs`: whole blocks of rows of the projection.
    int64_t layer_input_stride() const { return (input_width + 15) / 16 * 16; }

    // All tokens of a call through all layers. By the calling thread.
    void forward(const edgerazor_sequence_span* spans, int64_t span_count, const int32_t* tokens,
                 edgerazor::LogitSink& sink);
    void plan_micro_batch(const edgerazor_sequence_span* spans, int64_t span_count, int64_t first, int64_t count);
    void plan_attention_tiles();
    void drop_first(int64_t dropped, int64_t left);
    void allocate(int64_t tokens);
    void allocate_routing(int64_t tokens);
    void place_states(edgerazor::Layer& layer);
    void measure(const edgerazor::Layer& layer);

    // The steps. By all threads, each with its context.
    edgerazor::ThreadContext context_of(int thread, int64_t tokens);
    void embed(const edgerazor::ThreadContext& context, const int32_t* tokens);
    void make_layer_inputs(const edgerazor::ThreadContext& context, const int32_t* tokens);
    void add_layer_input(const edgerazor::ThreadContext& context, const edgerazor::Layer& layer);
    void add_deep_features(const edgerazor::ThreadContext& context, const int32_t* tokens, int layer);
    void forward_layer(const edgerazor::ThreadContext& context, int layer);
    // Computes the input of a linear group by fill(token, row) for each of the thread's tokens, rotates and quantizes it.
    template <class Fill>
    void quantize_input(const edgerazor::ThreadContext& context, const edgerazor::LinearGroup& group, const Fill& fill) {
        for (int64_t t = context.first; t < context.last; t++) {
            fill(t, context.buffers->input.get() + t * group.columns());
            quantize_token(context, group, t);
        }
        if (context.shared) threads.barrier();
    }
    void norm_and_quantize(const edgerazor::ThreadContext& context, const edgerazor::LinearGroup& group,
                           const edgerazor_norm& norm);
    void matmul(const edgerazor::ThreadContext& context, const edgerazor::LinearGroup& group, int64_t tokens,
                float* const* outputs);
    // The products of the thread's row blocks with `tokens` tokens from number `first` of the inputs on: x [tokens,
    // columns] with float32 activations, otherwise input_of(number of the group's input).
    template <class InputOf>
    void matmul_slices(const edgerazor::LinearGroup& group, int thread, int64_t first, int64_t tokens, const float* x,
                  const InputOf& input_of, float* const* outputs) const {
        using namespace edgerazor;
        for (const LinearGroup::RowSlice& slice : group.thread_slices[thread]) {
            const PackedMatrix& matrix = *slice.matrix;
            const RowLayout& layout = *matrix.layout;
            const MatmulOutput output = {outputs[slice.output] + first * matrix.rows, matrix.rows, matrix.bias};
            if (model.activation_bits == 16) {
                matmul_kernels.linear_float(layout, *slice.rows, tokens, x + first * layout.columns, output, slice.first,
                                            slice.last);
                continue;
            }
            const QuantizedInput& input = input_of(slice.input);
            const int64_t segment = first * layout.segment_count;
            const QuantizedActivations activations = {tokens, input.codes.get() + first * layout.x_quads * 4,
                                                      input.scales.get() + segment, input.sums.get() + segment};
            matmul_kernels.linear(layout, *slice.rows, activations, output, slice.first, slice.last);
        }
    }
    void mixer_inputs(const edgerazor::ThreadContext& context, const edgerazor::Layer& layer);
    void mlp(const edgerazor::ThreadContext& context, const edgerazor::Layer& layer);
    void mixture_of_experts(const edgerazor::ThreadContext& context, const edgerazor::Layer& layer);
    void keep_mlp(const edgerazor::ThreadContext& context, const edgerazor::Layer& layer);
    void add_mlp(const edgerazor::ThreadContext& context, const edgerazor::Layer& layer);
    void route(const edgerazor::ThreadContext& context, const edgerazor::Layer& layer);
    void choose_experts(const edgerazor::Layer& layer, int64_t token);
    void order_assignments(const edgerazor::Layer& layer, int64_t tokens);
    void gather_inputs(const edgerazor::ThreadContext& context, const edgerazor::Layer& layer);
    void attention(const edgerazor::ThreadContext& context, const edgerazor::Layer& layer);
    void gate_attention(const edgerazor::Layer& layer, int64_t token, float* attended) const;
    void convolve(const edgerazor::ThreadContext& context, const edgerazor::Layer& layer);
    void short_convolution(const edgerazor::ThreadContext& context, const edgerazor::Layer& layer);
    void gated_delta_rule(const edgerazor::ThreadContext& context, const edgerazor::Layer& layer);
    void mamba2(const edgerazor::ThreadContext& context, const edgerazor::Layer& layer);
    void norm_groups(const edgerazor_mamba2& mixer, float* x) const;
    edgerazor::Products queries(const edgerazor::Layer& layer) const;
    edgerazor::Products keys(const edgerazor::Layer& layer) const;
    edgerazor::Products values(const edgerazor::Layer& layer) const;
    void q_norm_rope(const edgerazor::Layer& layer, int64_t token, const edgerazor::QueryHeads& heads);
    void k_norm_rope_store(const edgerazor::Layer& layer, int64_t token, int kv_head);
    void norm_and_rope(const edgerazor::Layer& layer, const edgerazor_norm& norm, int64_t position, const float* from,
                       float* head) const;
    int64_t position_of(int64_t token) const;
    // `next`: the tile that this thread computes next, or null.
    void attention_tile(const edgerazor::ThreadContext& context, const edgerazor::Layer& layer,
                        const edgerazor::AttentionTile& tile, const edgerazor::AttentionTile* next);
    void apply_norm(const edgerazor_norm& norm, const float* x, int64_t count, float* out) const;
    void add_residual(const edgerazor::ThreadContext& context, const edgerazor_norm& norm);
    // Logits [count, vocab_size] of the tokens rows[first], ..., rows[first + count - 1] of the micro-batch.
    void compute_logits(const edgerazor::ThreadContext& context, const std::vector<int64_t>& rows, int64_t first,
                        int64_t count, float* out);

  private:
    void quantize_token(const edgerazor::ThreadContext& context, const edgerazor::LinearGroup& group, int64_t token);
};
