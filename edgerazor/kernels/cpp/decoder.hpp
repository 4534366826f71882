// The state of a decoder. Its steps are in decoder.cpp and decoder_attention.cpp, its C interface in decoder_api.cpp.
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
#include "thread_pool.hpp"

namespace edgerazor {

constexpr int64_t kMicroBatchTokens = 512;   // tokens that go through the layers together
constexpr int64_t kLogitTokens = 64;         // tokens whose logits are computed together, where they are not the output
constexpr int64_t kAttentionTileTokens = 32; // tokens of an attention tile

struct Layer {
    LinearGroup qkv, o, gate_up, down;
    edgerazor_norm before_attention, after_attention, before_mlp, after_mlp, q_norm, k_norm;
    int rope_dim;
    int64_t sliding_window;

    Layer(const edgerazor_layer& from, int threads)
        : qkv({&from.q, &from.k, &from.v}, threads), o({&from.o}, threads), gate_up({&from.gate, &from.up}, threads),
          down({&from.down}, threads), before_attention(from.before_attention),
          after_attention(from.after_attention), before_mlp(from.before_mlp), after_mlp(from.after_mlp),
          q_norm(from.q_norm), k_norm(from.k_norm), rope_dim(from.rope_dim), sliding_window(from.sliding_window) {}
};

// The tokens of a span that are in the current micro-batch.
struct SpanChunk {
    int64_t token; // the first one's index in the micro-batch
    int64_t count;
    SlotRange prefix;
    int64_t slot, past_length; // as in the span, but counting the tokens of earlier micro-batches
    const int32_t* pages;      // as in the span
    int64_t first_position() const { return prefix.count + past_length; }
};

// A unit of attention that one thread computes: the query heads of one KV head, for some tokens of a chunk.
struct AttentionTile {
    const SpanChunk* chunk;
    int kv_head;
    int64_t first, count; // tokens of the chunk
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
    edgerazor::LinearGroup embedding, head;
    std::vector<edgerazor::Layer> layers;
    std::vector<int32_t> embedding_part, embedding_index; // of each token, where the rows have several formats
    edgerazor::KvCache kv_cache;
    const float *cosines = nullptr, *sines = nullptr;

    int64_t max_columns = 0;                               // of the input of a linear group
    size_t max_inputs = 0;                                 // quantized inputs of a linear group
    int64_t decode_tokens = 0, prefill_tokens = 0;         // tokens that buffers are allocated for
    edgerazor::ThreadBuffers prefill_buffers;              // of all threads
    std::vector<edgerazor::ThreadBuffers> decode_buffers;  // of each thread
    std::vector<edgerazor::GrowBuffer<char>> scratch;      // of each thread, for attention
    edgerazor::GrowBuffer<float> q, k, v, attended, gate, up, y, logits; // [tokens, ...]
    std::vector<edgerazor::SpanChunk> chunks;              // of the micro-batch
    std::vector<const edgerazor::SpanChunk*> chunk_of_token;
    std::vector<edgerazor::AttentionTile> tiles;           // of the micro-batch, in prefill
    std::atomic<int64_t> next_tile{0};
    std::atomic<bool> finite{true};

    int64_t q_width() const { return (int64_t)model.num_heads * model.head_dim; }
    int64_t kv_width() const { return (int64_t)model.num_kv_heads * model.head_dim; }

    // All tokens of a call through all layers. By the calling thread.
    void forward(const edgerazor_sequence_span* spans, int64_t span_count, const int32_t* tokens,
                 edgerazor::LogitSink& sink);
    void plan_micro_batch(const edgerazor_sequence_span* spans, int64_t span_count, int64_t first, int64_t count);
    void plan_attention_tiles();
    void allocate(int64_t tokens);

    // The steps. By all threads, each with its context.
    edgerazor::ThreadContext context_of(int thread, int64_t tokens);
    void embed(const edgerazor::ThreadContext& context, const int32_t* tokens);
    void forward_layer(const edgerazor::ThreadContext& context, int layer);
    template <class Fill>
    void quantize_input(const edgerazor::ThreadContext& context, const edgerazor::LinearGroup& group, const Fill& fill);
    void norm_and_quantize(const edgerazor::ThreadContext& context, const edgerazor::LinearGroup& group,
                           const edgerazor_norm& norm);
    void matmul(const edgerazor::ThreadContext& context, const edgerazor::LinearGroup& group, int64_t tokens,
                float* const* outputs);
    void attention(const edgerazor::ThreadContext& context, int layer);
    void qk_norm_rope_store(int layer, int64_t token, int kv_head);
    void attention_tile(const edgerazor::ThreadContext& context, int layer, const edgerazor::AttentionTile& tile);
    void apply_norm(const edgerazor_norm& norm, const float* x, int64_t count, float* out) const;
    void add_residual(const edgerazor::ThreadContext& context, const edgerazor_norm& norm);
    // Logits [count, vocab_size] of the tokens rows[first], ..., rows[first + count - 1] of the micro-batch.
    void compute_logits(const edgerazor::ThreadContext& context, const std::vector<int64_t>& rows, int64_t first,
                        int64_t count, float* out);

  private:
    void quantize_token(const edgerazor::ThreadContext& context, const edgerazor::LinearGroup& group, int64_t token);
};
