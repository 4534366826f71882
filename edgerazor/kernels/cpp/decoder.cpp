// A transformer, layer by layer, on some tokens at a time.
//
// All threads go through the same steps, each with its share, and meet where one step needs what others computed. Of
// one token (decoding) every thread keeps the hidden state for itself and does the short steps, norms and rounding, all
// by itself: that takes less time than to meet. Of many tokens (a prompt) each thread has some, in memory that all see.
#include "decoder.h"

#include <math.h>
#include <string.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <memory>
#include <new>
#include <vector>

#include "floats.hpp"
#include "kernels.hpp"
#include "memory.hpp"
#include "threads.hpp"

using namespace edgerazor;

namespace {

constexpr int64_t kTokens = 512;    // of one pass through the layers
constexpr int64_t kHeadTokens = 64; // whose logits are computed at a time, where they are not asked for
constexpr int64_t kTile = 32;       // tokens whose queries go through the cache together
constexpr int64_t kUnit = 4;        // row blocks that products compute side by side

// Matrices -----------------------------------------------------------------------------------------------------------

struct Matrix {
    const Geometry* geometry;
    std::vector<Part> parts;
    int64_t rows;
    const float* bias;
    float scale;

    explicit Matrix(const edgerazor_matrix& from)
        : geometry(&known(from.geometry)), rows(from.rows), bias(from.bias), scale(from.scale) {
        for (int i = 0; i < from.part_count; i++) parts.push_back(part_of(from.parts[i]));
    }

    bool takes_input_of(const Matrix& other) const {
        const Geometry &a = *geometry, &b = *other.geometry;
        return a.columns == b.columns && a.group == b.group && a.activation_group == b.activation_group &&
               scale == other.scale;
    }
};

// Matrices with a common input, and which rows of them each thread computes.
struct Stage {
    struct Slice {
        const Matrix* matrix;
        const Part* part;
        int output; // number of the matrix
        int input;  // number of the quantized input
        int64_t first, last;
    };

    std::vector<Matrix> matrices;
    std::vector<const Matrix*> inputs; // one matrix for each way in which the input is quantized
    std::vector<std::vector<Slice>> of_thread;

    Stage(std::initializer_list<const edgerazor_matrix*> from, int threads) {
        for (const edgerazor_matrix* each : from) matrices.emplace_back(*each);
        std::vector<Slice> all;
        double bytes = 0;
        for (size_t m = 0; m < matrices.size(); m++) {
            const int input = input_of(matrices[m]);
            for (const Part& part : matrices[m].parts) {
                all.push_back({&matrices[m], &part, (int)m, input, 0, row_blocks(part.count)});
                bytes += cost(all.back()) * (double)all.back().last;
            }
        }
        share_out(all, bytes, threads);
    }

    Stage(const Stage&) = delete; // slices point into it
    Stage(Stage&&) = default;

    int64_t columns() const { return matrices[0].geometry->columns; }

  private:
    static double cost(const Slice& slice) { // bytes of a row block
        const Geometry& geometry = *slice.matrix->geometry;
        return (double)(codes_bytes(slice.part->bits, geometry.quads) + 2 * kRows * (int64_t)geometry.groups);
    }

    int input_of(const Matrix& matrix) {
        for (size_t i = 0; i < inputs.size(); i++)
            if (inputs[i]->takes_input_of(matrix)) return (int)i;
        inputs.push_back(&matrix);
        return (int)inputs.size() - 1;
    }

    // Equal bytes for each thread, cut between whole units of row blocks.
    void share_out(const std::vector<Slice>& all, double bytes, int threads) {
        of_thread.resize(threads);
        double before = 0;
        for (const Slice& slice : all) {
            const double each = cost(slice);
            int64_t first = 0;
            for (int thread = 0; thread < threads; thread++) {
                const double ends = (bytes * (thread + 1) / threads - before) / each;
                int64_t last = (int64_t)(ends / kUnit + 0.5) * kUnit;
                last = thread + 1 == threads ? slice.last : std::min(std::max(last, first), slice.last);
                if (last > first) of_thread[thread].push_back({slice.matrix, slice.part, slice.output, slice.input, first, last});
                first = last;
            }
            before += each * (double)slice.last;
        }
    }
};

struct Layer {
    Stage qkv, o, gate_up, down;
    edgerazor_norm before_attention, after_attention, before_mlp, after_mlp, q_norm, k_norm;
    int rotary;
    int64_t window;

    Layer(const edgerazor_layer& from, int threads)
        : qkv({&from.q, &from.k, &from.v}, threads), o({&from.o}, threads), gate_up({&from.gate, &from.up}, threads),
          down({&from.down}, threads), before_attention(from.before_attention),
          after_attention(from.after_attention), before_mlp(from.before_mlp), after_mlp(from.after_mlp),
          q_norm(from.q_norm), k_norm(from.k_norm), rotary(from.rotary), window(from.window) {}
};

// Cache --------------------------------------------------------------------------------------------------------------

// Keys and values of all layers, in pages of kPage cells.
class Cache {
  public:
    Cache(int layers, int heads, int head_dim, int bits)
        : heads_(heads), head_dim_(head_dim), bits_(bits), pages_((size_t)layers * heads) {}

    // Throws std::bad_alloc; what was reserved before stays.
    void reserve(int64_t cells) {
        while ((int64_t)memory_.size() * kPage < cells) {
            const size_t codes = rounded(kPage * key_bytes(bits_, head_dim_)), scales = kPage * sizeof(float);
            const size_t of_head = 2 * (codes + scales);
            for (std::vector<HeadPage>& pages : pages_) pages.reserve(memory_.size() + 1);
            memory_.reserve(memory_.size() + 1);
            Memory memory(of_head * pages_.size());
            for (size_t i = 0; i < pages_.size(); i++) {
                const size_t at = i * of_head;
                pages_[i].push_back({memory.as<void>(at), memory.as<void>(at + codes),
                                     memory.as<float>(at + 2 * codes), memory.as<float>(at + 2 * codes + scales)});
            }
            bytes_ += (int64_t)(of_head * pages_.size());
            memory_.push_back(std::move(memory));
        }
    }

    const HeadPage* pages(int layer, int head) const { return pages_[(size_t)layer * heads_ + head].data(); }

    int64_t bytes() const { return bytes_; }

  private:
    static size_t rounded(int64_t bytes) { return (size_t)(bytes + 63) / 64 * 64; }

    const int heads_, head_dim_, bits_;
    int64_t bytes_ = 0;
    std::vector<std::vector<HeadPage>> pages_; // [layers * heads][pages]
    std::vector<Memory> memory_;               // by page
};

// Tokens of one pass -------------------------------------------------------------------------------------------------

// Consecutive tokens of a run that are in the same pass.
struct Piece {
    int64_t token; // the first one's number in the pass
    int64_t count;
    Range prefix;
    int64_t cell, own; // as in the run, those of earlier passes among `own`
    int64_t position() const { return prefix.count + own; }
};

// Queries that go through the cache together.
struct Task {
    const Piece* piece;
    int head; // of keys
    int64_t first, count;
};

// A quantized input of some tokens.
struct Quantized {
    Buffer<int8_t> codes;
    Buffer<float> scales;
    Buffer<int32_t> sums;

    void reserve(const Geometry& geometry, int64_t tokens) {
        codes.reserve(tokens * geometry.x_quads * 4);
        scales.reserve(tokens * geometry.count);
        sums.reserve(tokens * geometry.count);
    }
};

// Where a thread works: on its own copy of the only token, or on its share of many in memory that all threads see.
struct Desk {
    Buffer<float> states; // [tokens, hidden]
    Buffer<float> x;      // [tokens, widest input of a product]
    std::vector<Quantized> inputs;
};

struct View {
    Desk* desk;
    int thread;
    int64_t tokens;      // of the pass
    int64_t first, last; // those that the thread works on
    bool shared;
};

} // namespace

struct edgerazor_decoder {
    edgerazor_decoder(const edgerazor_model& model, int isa, int threads);

    edgerazor_model model;
    const Kernels& kernels;
    const Floats& floats;
    Threads threads;
    Stage embedding, head;
    std::vector<Layer> layers;
    std::vector<int32_t> embedding_part, embedding_index; // of each row, where there is more than one part
    Cache cache;
    const float *cosines = nullptr, *sines = nullptr;

    int64_t widest = 0;           // features of an input of a product
    int64_t one = 0, many = 0;    // tokens that there is memory for: of passes of one, and of several
    size_t most_inputs = 0;
    Desk shared;
    std::vector<Desk> own;                                // of threads
    std::vector<Buffer<char>> scratch;                    // of threads
    Buffer<float> q, k, v, attended, gate, up, y, logits; // [tokens, ...]
    std::vector<Piece> pieces;
    std::vector<const Piece*> piece_of; // each token of the pass
    std::vector<Task> tasks;
    std::atomic<int64_t> next_task{0};
    std::atomic<bool> finite{true};

    int64_t q_width() const { return (int64_t)model.heads * model.head_dim; }
    int64_t k_width() const { return (int64_t)model.kv_heads * model.head_dim; }

    // Of all threads at once, below: each with its thread's view.
    void prepare(int64_t tokens);
    View view(int thread, int64_t tokens);
    void embed(const View& view, const int32_t* tokens);
    void run_layer(const View& view, int number);
    void attend(const View& view, int number);
    void prepare_heads(int number, int64_t token, int head);
    void attend_task(const View& view, int number, const Task& task);
    void normalize(const edgerazor_norm& norm, const float* x, int64_t count, float* out) const;
    void add_residual(const View& view, const edgerazor_norm& norm);
    void quantize(const View& view, const Stage& stage, int64_t token);
    template <class Fill>
    void enter(const View& view, const Stage& stage, const Fill& fill);
    void multiply(const View& view, const Stage& stage, int64_t tokens, float* const* outputs);
    void run_head(const View& view, const std::vector<int64_t>& rows, int64_t first, int64_t count, float* out);

    template <class Finish>
    void forward(const edgerazor_run* runs, int64_t run_count, const int32_t* tokens, Finish& finish);
    void begin_pass(const edgerazor_run* runs, int64_t run_count, int64_t first, int64_t count);
    void make_tasks();
};

edgerazor_decoder::edgerazor_decoder(const edgerazor_model& from, int isa, int count)
    : model(from), kernels(kernels_at(isa)), floats(floats_at(isa)), threads(count), embedding({&from.embedding}, count),
      head({&from.head}, count), cache(from.layer_count, from.kv_heads, from.head_dim, from.kv_bits), own(count),
      scratch(count) {
    layers.reserve(from.layer_count);
    for (int i = 0; i < from.layer_count; i++) layers.emplace_back(from.layers[i], count);
    std::vector<const Stage*> stages = {&head};
    for (const Layer& layer : layers)
        for (const Stage* stage : {&layer.qkv, &layer.o, &layer.gate_up, &layer.down}) stages.push_back(stage);
    for (const Stage* stage : stages) {
        widest = std::max(widest, stage->columns());
        most_inputs = std::max(most_inputs, stage->inputs.size());
    }
    const std::vector<Part>& parts = embedding.matrices[0].parts;
    if (parts.size() > 1) {
        embedding_part.resize(model.vocabulary);
        embedding_index.resize(model.vocabulary);
        for (size_t p = 0; p < parts.size(); p++)
            for (int64_t i = 0; i < parts[p].count; i++) {
                embedding_part[parts[p].rows[i]] = (int32_t)p;
                embedding_index[parts[p].rows[i]] = (int32_t)i;
            }
    }
}

// Steps --------------------------------------------------------------------------------------------------------------

// Memory for a pass of so many tokens, so that nothing has to be found while threads work.
void edgerazor_decoder::prepare(int64_t tokens) {
    int64_t& prepared = tokens > 1 ? many : one;
    if (tokens <= prepared) return;
    const auto furnish = [&](Desk& desk, int64_t count) {
        desk.states.reserve(count * model.hidden);
        desk.x.reserve(count * widest);
        desk.inputs.resize(most_inputs);
        const auto make_room = [&](const Stage& stage) {
            for (size_t i = 0; i < stage.inputs.size(); i++) desk.inputs[i].reserve(*stage.inputs[i]->geometry, count);
        };
        for (const Layer& layer : layers)
            for (const Stage* stage : {&layer.qkv, &layer.o, &layer.gate_up, &layer.down}) make_room(*stage);
        make_room(head);
    };
    if (tokens > 1) {
        furnish(shared, std::max(tokens, kHeadTokens));
    } else {
        for (Desk& desk : own) furnish(desk, 1);
    }
    q.reserve(tokens * q_width());
    k.reserve(tokens * k_width());
    v.reserve(tokens * k_width());
    attended.reserve(tokens * q_width());
    gate.reserve(tokens * model.intermediate);
    up.reserve(tokens * model.intermediate);
    y.reserve(tokens * model.hidden);
    const int group = model.heads / model.kv_heads;
    for (Buffer<char>& each : scratch)
        each.reserve(floats.attention_scratch(model.head_dim, group, (int)std::min(tokens, kTile)));
    prepared = tokens;
}

View edgerazor_decoder::view(int thread, int64_t tokens) {
    if (tokens == 1) return {&own[thread], thread, 1, 0, 1, false};
    const Share share(tokens, thread, threads.count());
    return {&shared, thread, tokens, share.first, share.last, true};
}

void edgerazor_decoder::embed(const View& view, const int32_t* tokens) {
    const Matrix& matrix = embedding.matrices[0];
    for (int64_t t = view.first; t < view.last; t++) {
        const int32_t token = tokens[t];
        const bool one = matrix.parts.size() == 1 && matrix.parts[0].rows == nullptr;
        const Part& part = matrix.parts[one || embedding_part.empty() ? 0 : embedding_part[token]];
        float* states = view.desk->states.get() + t * model.hidden;
        decode_row(*matrix.geometry, part, one || embedding_index.empty() ? token : embedding_index[token], states);
        if (model.embedding_scale != 1)
            for (int i = 0; i < model.hidden; i++) states[i] *= model.embedding_scale;
    }
}

void edgerazor_decoder::normalize(const edgerazor_norm& norm, const float* x, int64_t count, float* out) const {
    if (norm.kind == EDGERAZOR_RMS_NORM) {
        floats.rms_norm(x, (int)count, norm.epsilon, norm.weight, out);
    } else if (norm.kind == EDGERAZOR_LAYER_NORM) {
        floats.layer_norm(x, (int)count, norm.epsilon, norm.weight, norm.bias, out);
    } else if (x != out) {
        memcpy(out, x, count * sizeof(float));
    }
}

// The token's row of x, as the products of a stage take it.
void edgerazor_decoder::quantize(const View& view, const Stage& stage, int64_t token) {
    if (model.activation_bits == 16) return;
    const float* x = view.desk->x.get() + token * stage.columns();
    for (size_t i = 0; i < stage.inputs.size(); i++) {
        const Geometry& geometry = *stage.inputs[i]->geometry;
        const Quantized& input = view.desk->inputs[i];
        const int64_t segment = token * geometry.count;
        if (!kernels.quantize(geometry, x, model.activation_bits, stage.inputs[i]->scale,
                              input.codes.get() + token * geometry.x_quads * 4, input.scales.get() + segment,
                              input.sums.get() + segment))
            finite.store(false, std::memory_order_relaxed);
    }
}

// The input of a stage: fill(token, row of x) for each token.
template <class Fill>
void edgerazor_decoder::enter(const View& view, const Stage& stage, const Fill& fill) {
    for (int64_t t = view.first; t < view.last; t++) {
        fill(t, view.desk->x.get() + t * stage.columns());
        quantize(view, stage, t);
    }
    if (view.shared) threads.meet();
}

// The thread's rows of the products with the input, [tokens, rows of the matrix] each; then all meet.
void edgerazor_decoder::multiply(const View& view, const Stage& stage, int64_t tokens, float* const* outputs) {
    for (const Stage::Slice& slice : stage.of_thread[view.thread]) {
        const Matrix& matrix = *slice.matrix;
        const Output output = {outputs[slice.output], matrix.rows, matrix.bias};
        if (model.activation_bits == 16) {
            kernels.linear_float(*matrix.geometry, *slice.part, tokens, view.desk->x.get(), output, slice.first, slice.last);
            continue;
        }
        const Quantized& input = view.desk->inputs[slice.input];
        const Activations x = {tokens, input.codes.get(), input.scales.get(), input.sums.get()};
        kernels.linear(*matrix.geometry, *slice.part, x, output, slice.first, slice.last);
    }
    threads.meet();
}

// Norm, rotary embedding and the cache's rounding of the heads of a token that share a key head.
void edgerazor_decoder::prepare_heads(int number, int64_t token, int head) {
    const Layer& layer = layers[number];
    const Piece& piece = *piece_of[token];
    const int64_t index = token - piece.token, position = piece.position() + index, cell = piece.cell + piece.own + index;
    const int64_t row = position * (model.rotary_features / 2), dim = model.head_dim;
    const int group = model.heads / model.kv_heads;
    const auto turn = [&](float* one, const edgerazor_norm& norm) {
        if (!model.norm_all_heads) normalize(norm, one, dim, one);
        if (layer.rotary > 0) floats.rotate(one, layer.rotary, cosines + row, sines + row);
    };
    for (int i = 0; i < group; i++) turn(q.get() + token * q_width() + (head * group + i) * dim, layer.q_norm);
    float* key = k.get() + token * k_width() + head * dim;
    turn(key, layer.k_norm);
    const HeadPage& page = cache.pages(number, head)[cell / kPage];
    if (!floats.store(page, (int)(cell % kPage), model.kv_bits, model.head_dim, key, v.get() + token * k_width() + head * dim))
        finite.store(false, std::memory_order_relaxed);
}

void edgerazor_decoder::attend_task(const View& view, int number, const Task& task) {
    const int group = model.heads / model.kv_heads;
    const Piece& piece = *task.piece;
    Attention work;
    work.bits = model.kv_bits;
    work.head_dim = model.head_dim;
    work.scale = model.attention_scale;
    work.pages = cache.pages(number, task.head);
    const int64_t at = (piece.token + task.first) * q_width() + (int64_t)task.head * group * model.head_dim;
    work.queries = q.get() + at;
    work.query_stride = work.out_stride = q_width();
    work.heads = group;
    work.tokens = (int)task.count;
    work.ranges[0] = piece.prefix;
    work.ranges[1] = {piece.cell, piece.own + task.first + task.count};
    work.window = layers[number].window;
    work.out = attended.get() + at;
    work.scratch = scratch[view.thread].get();
    floats.attend(work);
}

void edgerazor_decoder::attend(const View& view, int number) {
    const Layer& layer = layers[number];
    if (model.norm_all_heads && layer.q_norm.kind != EDGERAZOR_NO_NORM) {
        const Share share(view.tokens, view.thread, threads.count());
        for (int64_t t = share.first; t < share.last; t++) {
            normalize(layer.q_norm, q.get() + t * q_width(), q_width(), q.get() + t * q_width());
            normalize(layer.k_norm, k.get() + t * k_width(), k_width(), k.get() + t * k_width());
        }
        threads.meet();
    }
    if (!view.shared) {
        const Share share(model.kv_heads, view.thread, threads.count());
        for (int64_t h = share.first; h < share.last; h++) {
            prepare_heads(number, 0, (int)h);
            attend_task(view, number, {&pieces[0], (int)h, 0, 1});
        }
        threads.meet();
        return;
    }
    if (view.thread == 0) next_task.store(0, std::memory_order_relaxed);
    for (int64_t t = view.first; t < view.last; t++)
        for (int h = 0; h < model.kv_heads; h++) prepare_heads(number, t, h);
    threads.meet();
    for (int64_t i; (i = next_task.fetch_add(1, std::memory_order_relaxed)) < (int64_t)tasks.size();)
        attend_task(view, number, tasks[i]);
    threads.meet();
}

// states += norm(y); the row of x that the norm needs is not where other stages have it.
void edgerazor_decoder::add_residual(const View& view, const edgerazor_norm& norm) {
    for (int64_t t = view.first; t < view.last; t++) {
        float* row = y.get() + t * model.hidden;
        float* states = view.desk->states.get() + t * model.hidden;
        if (norm.kind == EDGERAZOR_NO_NORM) {
            floats.add(states, row, model.hidden);
        } else {
            float* x = view.desk->x.get() + t * widest;
            normalize(norm, row, model.hidden, x);
            floats.add(states, x, model.hidden);
        }
    }
    if (view.shared && norm.kind != EDGERAZOR_NO_NORM) threads.meet();
}

void edgerazor_decoder::run_layer(const View& view, int number) {
    const Layer& layer = layers[number];
    const float* states = view.desk->states.get();
    enter(view, layer.qkv, [&](int64_t t, float* x) {
        normalize(layer.before_attention, states + t * model.hidden, model.hidden, x);
    });
    float* const heads[] = {q.get(), k.get(), v.get()};
    multiply(view, layer.qkv, view.tokens, heads);
    attend(view, number);
    enter(view, layer.o, [&](int64_t t, float* x) {
        memcpy(x, attended.get() + t * q_width(), q_width() * sizeof(float));
    });
    float* const results[] = {y.get()};
    multiply(view, layer.o, view.tokens, results);
    add_residual(view, layer.after_attention);
    enter(view, layer.gate_up, [&](int64_t t, float* x) {
        normalize(layer.before_mlp, states + t * model.hidden, model.hidden, x);
    });
    float* const both[] = {gate.get(), up.get()};
    multiply(view, layer.gate_up, view.tokens, both);
    enter(view, layer.down, [&](int64_t t, float* x) {
        const int64_t at = t * model.intermediate;
        floats.swiglu(gate.get() + at, up.get() + at, model.intermediate, x);
    });
    multiply(view, layer.down, view.tokens, results);
    add_residual(view, layer.after_mlp);
}

// Logits [count, vocabulary] of rows of the states.
void edgerazor_decoder::run_head(const View& all, const std::vector<int64_t>& rows, int64_t first, int64_t count,
                                 float* out) {
    View view = all;
    view.tokens = count;
    if (view.shared) {
        const Share share(count, view.thread, threads.count());
        view.first = share.first;
        view.last = share.last;
    }
    enter(view, head, [&](int64_t t, float* x) {
        normalize(model.final_norm, view.desk->states.get() + rows[first + t] * model.hidden, model.hidden, x);
    });
    multiply(view, head, count, &out);
    if (model.logit_scale == 1) return;
    const Share share(count * model.vocabulary, view.thread, threads.count());
    for (int64_t i = share.first; i < share.last; i++) out[i] *= model.logit_scale;
    threads.meet();
}

// Passes -------------------------------------------------------------------------------------------------------------

// The pieces of runs that tokens [first, first + count) of a call are.
void edgerazor_decoder::begin_pass(const edgerazor_run* runs, int64_t run_count, int64_t first, int64_t count) {
    pieces.clear();
    int64_t begin = 0; // of the run, among the tokens of the call
    for (const edgerazor_run* run = runs; run < runs + run_count; begin += run->count, run++) {
        const int64_t from = std::max(begin, first), to = std::min(begin + run->count, first + count);
        if (from < to)
            pieces.push_back({from - first, to - from, {run->prefix_cell, run->prefix}, run->cell, run->own + from - begin});
    }
    piece_of.clear();
    for (const Piece& piece : pieces) piece_of.insert(piece_of.end(), piece.count, &piece);
    if (count > 1) make_tasks();
}

// Those that see the most come first, so that no thread begins a long one last.
void edgerazor_decoder::make_tasks() {
    tasks.clear();
    for (const Piece& piece : pieces)
        for (int64_t first = 0; first < piece.count; first += kTile)
            for (int h = 0; h < model.kv_heads; h++)
                tasks.push_back({&piece, h, first, std::min(kTile, piece.count - first)});
    const auto work = [](const Task& task) { return task.count * (task.piece->position() + task.first + task.count); };
    std::stable_sort(tasks.begin(), tasks.end(), [&](const Task& a, const Task& b) { return work(a) > work(b); });
}

// All tokens through all layers. For each pass finish.begin(its first token, its tokens) is called first, and at the end
// finish(view) by all threads.
template <class Finish>
void edgerazor_decoder::forward(const edgerazor_run* runs, int64_t run_count, const int32_t* tokens, Finish& finish) {
    int64_t total = 0;
    for (int64_t i = 0; i < run_count; i++) total += runs[i].count;
    // Passes of equal length: a short one costs nearly as much as a whole one.
    const int64_t passes = (total + kTokens - 1) / kTokens;
    for (int64_t pass = 0; pass < passes; pass++) {
        const Share share(total, (int)pass, (int)passes);
        const int64_t first = share.first, count = share.last - first;
        begin_pass(runs, run_count, first, count);
        prepare(count);
        finish.begin(first, count);
        threads.run([&](int thread) {
            const View view = this->view(thread, count);
            embed(view, tokens + first);
            for (int i = 0; i < model.layer_count; i++) run_layer(view, i);
            if (view.shared) threads.meet(); // wanted tokens are shared out anew
            finish(view);
        });
    }
}

// C interface --------------------------------------------------------------------------------------------------------

namespace {

// Tokens of a pass whose logits are wanted, each once, some at a time.
struct Wanted {
    edgerazor_decoder& decoder;
    const int64_t* wanted;
    int64_t count;
    std::vector<int64_t> rows;                // of the pass
    std::vector<std::vector<int64_t>> places; // in `wanted`, of each row

    Wanted(edgerazor_decoder& decoder, const int64_t* wanted, int64_t count)
        : decoder(decoder), wanted(wanted), count(count) {}

    void begin(int64_t first, int64_t tokens) {
        std::vector<int64_t> of_row(tokens, -1);
        rows.clear();
        places.clear();
        for (int64_t i = 0; i < count; i++) {
            const int64_t row = wanted[i] - first;
            if (row < 0 || row >= tokens) continue;
            if (of_row[row] < 0) {
                of_row[row] = (int64_t)rows.size();
                rows.push_back(row);
                places.emplace_back();
            }
            places[of_row[row]].push_back(i);
        }
        decoder.logits.reserve(std::min(kHeadTokens, (int64_t)rows.size()) * decoder.model.vocabulary);
    }

    // use(number of a wanted row, its logits) for each of them, by any thread.
    template <class Use>
    void each(const View& view, const Use& use) {
        for (int64_t first = 0; first < (int64_t)rows.size(); first += kHeadTokens) {
            const int64_t now = std::min(kHeadTokens, (int64_t)rows.size() - first);
            decoder.run_head(view, rows, first, now, decoder.logits.get());
            const Share share(now, view.thread, decoder.threads.count());
            for (int64_t i = share.first; i < share.last; i++)
                use(first + i, decoder.logits.get() + i * decoder.model.vocabulary);
            decoder.threads.meet();
        }
    }
};

struct Logits : Wanted {
    float* out;

    Logits(edgerazor_decoder& decoder, const int64_t* wanted, int64_t count, float* out)
        : Wanted(decoder, wanted, count), out(out) {}

    void operator()(const View& view) {
        const int64_t vocabulary = decoder.model.vocabulary;
        if (rows.size() == 1 && places[0].size() == 1) // decoding: nothing to copy
            return decoder.run_head(view, rows, 0, 1, out + places[0][0] * vocabulary);
        each(view, [&](int64_t row, const float* logits) {
            for (const int64_t place : places[row]) memcpy(out + place * vocabulary, logits, vocabulary * sizeof(float));
        });
    }
};

struct Scores : Wanted {
    const int32_t* targets;
    float* log_probabilities;
    int32_t* best;

    Scores(edgerazor_decoder& decoder, const int64_t* wanted, int64_t count, const int32_t* targets,
           float* log_probabilities, int32_t* best)
        : Wanted(decoder, wanted, count), targets(targets), log_probabilities(log_probabilities), best(best) {}

    void operator()(const View& view) {
        each(view, [&](int64_t row, const float* logits) {
            const int64_t vocabulary = decoder.model.vocabulary;
            const float all = decoder.floats.log_sum_exp(logits, vocabulary);
            const int32_t largest = decoder.floats.largest(logits, vocabulary);
            if (!std::isfinite(all)) decoder.finite.store(false, std::memory_order_relaxed);
            for (const int64_t place : places[row]) {
                log_probabilities[place] = logits[targets[place]] - all;
                best[place] = largest;
            }
        });
    }
};

// The most probable token after the only one.
struct Greedy {
    edgerazor_decoder& decoder;
    const std::vector<int64_t> rows = {0};
    std::vector<int32_t> best; // of each thread's share of the vocabulary

    explicit Greedy(edgerazor_decoder& decoder) : decoder(decoder), best(decoder.threads.count()) {}

    void begin(int64_t, int64_t) { decoder.logits.reserve(decoder.model.vocabulary); }

    void operator()(const View& view) {
        decoder.run_head(view, rows, 0, 1, decoder.logits.get());
        const Share share(decoder.model.vocabulary, view.thread, decoder.threads.count());
        best[view.thread] = -1;
        if (share.first < share.last) {
            const float* logits = decoder.logits.get() + share.first;
            best[view.thread] = (int32_t)share.first + decoder.floats.largest(logits, share.last - share.first);
        }
    }

    int32_t found() const {
        int32_t found = -1;
        for (const int32_t each : best)
            if (each >= 0 && (found < 0 || decoder.logits.get()[each] > decoder.logits.get()[found])) found = each;
        if (found < 0 || !std::isfinite(decoder.logits.get()[found])) decoder.finite.store(false, std::memory_order_relaxed);
        return found;
    }
};

// Runs `work`, which returns nothing, and says what came of it.
template <class Work>
int guarded(edgerazor_decoder* decoder, const Work& work) {
    decoder->finite.store(true, std::memory_order_relaxed);
    try {
        work();
    } catch (const std::exception&) { // no memory, or a size that no memory has
        return EDGERAZOR_NO_MEMORY;
    }
    return decoder->finite.load(std::memory_order_relaxed) ? EDGERAZOR_OK : EDGERAZOR_NOT_FINITE;
}

} // namespace

extern "C" {

edgerazor_decoder* edgerazor_decoder_new(const edgerazor_model* model, int isa, int threads) {
    try {
        return new edgerazor_decoder(*model, isa, threads);
    } catch (const std::exception&) { // no memory, or no thread
        return nullptr;
    }
}

void edgerazor_decoder_free(edgerazor_decoder* decoder) { delete decoder; }

void edgerazor_decoder_rotary(edgerazor_decoder* decoder, const float* cosines, const float* sines) {
    decoder->cosines = cosines;
    decoder->sines = sines;
}

int edgerazor_decoder_reserve(edgerazor_decoder* decoder, int64_t cells) {
    return guarded(decoder, [&] { decoder->cache.reserve(cells); });
}

int64_t edgerazor_decoder_cache_bytes(const edgerazor_decoder* decoder) { return decoder->cache.bytes(); }

int edgerazor_decoder_logits(edgerazor_decoder* decoder, const edgerazor_run* runs, int64_t run_count,
                             const int32_t* tokens, const int64_t* wanted, int64_t count, float* logits) {
    return guarded(decoder, [&] {
        Logits finish(*decoder, wanted, count, logits);
        decoder->forward(runs, run_count, tokens, finish);
    });
}

int edgerazor_decoder_scores(edgerazor_decoder* decoder, const edgerazor_run* runs, int64_t run_count,
                             const int32_t* tokens, const int64_t* wanted, const int32_t* targets, int64_t count,
                             float* log_probabilities, int32_t* best) {
    return guarded(decoder, [&] {
        Scores finish(*decoder, wanted, count, targets, log_probabilities, best);
        decoder->forward(runs, run_count, tokens, finish);
    });
}

int edgerazor_decoder_greedy(edgerazor_decoder* decoder, const edgerazor_run* from, int32_t token,
                             const int32_t* stops, int64_t stop_count, int64_t count, int32_t* out, int64_t* written) {
    *written = 0;
    return guarded(decoder, [&] {
        Greedy finish(*decoder);
        edgerazor_run run = *from;
        while (*written < count && decoder->finite.load(std::memory_order_relaxed)) {
            decoder->forward(&run, 1, &token, finish);
            const int32_t found = finish.found();
            if (found < 0) break;
            token = out[(*written)++] = found;
            run.own++;
            if (std::find(stops, stops + stop_count, token) != stops + stop_count) break;
        }
    });
}

int edgerazor_decoder_layer(edgerazor_decoder* decoder, int32_t layer, const edgerazor_run* runs, int64_t run_count,
                            float* states) {
    return guarded(decoder, [&] {
        int64_t count = 0;
        for (int64_t i = 0; i < run_count; i++) count += runs[i].count;
        decoder->begin_pass(runs, run_count, 0, count);
        decoder->prepare(count);
        decoder->threads.run([&](int thread) {
            const View view = decoder->view(thread, count);
            const int64_t hidden = decoder->model.hidden, from = view.first * hidden, size = (view.last - view.first) * hidden;
            float* own = view.desk->states.get() + from;
            memcpy(own, states + from, size * sizeof(float));
            decoder->threads.meet(); // of one token each thread has a copy of the states
            decoder->run_layer(view, layer);
            if (view.shared || thread == 0) memcpy(states + from, own, size * sizeof(float));
        });
    });
}

} // extern "C"
