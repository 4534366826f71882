// Runs a small random transformer through the decoder, with every instruction set that this machine has: prefill and
// decode, one thread and several, prefixes that sequences share, greedy decoding. It is for machines without Python
// (`make test-arm`) and for sanitizers (`make test-sanitizers`); `tests/runtime/test_runtime.py` compares with transformers.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include <atomic>
#include <memory>
#include <system_error>
#include <thread>
#include <vector>

#include "decoder.h"
#include "selftest.hpp"
#include "thread_pool.hpp"

namespace {

float uniform() { return (float)(int32_t)draw() * 4.656612873077393e-10f; } // -1 to 1

std::vector<float> random_floats(int64_t count, float mean = 0) {
    std::vector<float> numbers(count);
    for (float& number : numbers) number = mean + 0.5f * uniform();
    return numbers;
}

struct Config {
    int hidden_size, heads, kv_heads, head_dim, intermediate_size, vocab_size, layers, group, bits, activation_bits;
    int kv_bits;
    int rope_dim, sliding_window, norm_all_heads, post_norms, norm;
    int block; // of the rotation of matrices whose columns it divides; 0: none
    int parts = 0; // 1: other parts of attention and MLP, 2: other mixers, 3: mixtures of experts, 4: what Gemma 4 has
};

constexpr int kInputFeatures = 12; // of the inputs of single layers

// The weights of one matrix. Of more than 20 rows, a third is ternary, and the others have `bits`.
struct Weights {
    edgerazor_row_layout* layout;
    std::vector<std::unique_ptr<uint8_t[], Free>> codes;
    std::vector<std::vector<uint16_t>> scales;
    std::vector<std::vector<int32_t>> places;
    std::vector<edgerazor_format_rows> parts;
    std::vector<float> bias;
    std::vector<uint8_t> signs;
    int rows, block;

    Weights(int rows, int columns, int bits, const Config& c, bool with_bias)
        : rows(rows), block(c.block > 0 && columns % c.block == 0 ? c.block : 0) {
        for (int byte = 0; byte < (columns + 7) / 8; byte++) signs.push_back((uint8_t)(byte * 37 + 11));
        layout = edgerazor_row_layout_new(columns, c.group, c.group);
        places.resize(2);
        for (int row = 0; row < rows; row++) places[rows > 20 && row % 3 == 0].push_back(row);
        for (int p = 0; p < (rows > 20 ? 2 : 1); p++) add_part(p == 0 ? bits : 0, p);
        if (with_bias) bias = random_floats(rows);
    }

    Weights(const Weights&) = delete;
    ~Weights() { edgerazor_row_layout_free(layout); }

    void add_part(int part_bits, int p) {
        const int64_t count = (int64_t)places[p].size(), blocks = (count + 15) / 16;
        const int64_t bytes = blocks * edgerazor_block_bytes(layout, part_bits);
        codes.push_back(memory<uint8_t>(bytes));
        uint8_t* u = codes.back().get();
        for (int64_t i = 0; i < bytes; i++) u[i] = part_bits == 0 ? (uint8_t)(draw() % 3 * 85) : (uint8_t)draw();
        scales.emplace_back(blocks * 16 * 1024);
        for (uint16_t& scale : scales.back()) scale = (uint16_t)(0x2800 + draw() % 0x400); // about 1/32
        const int min_level_x2 = part_bits == 0 ? -2 : -(2 << (part_bits - 1));
        parts.push_back({u, scales.back().data(), places[p].data(), count, part_bits, min_level_x2});
    }

    edgerazor_matrix matrix() const {
        return {layout, parts.data(), (int32_t)parts.size(), rows, bias.empty() ? nullptr : bias.data(), 0, block,
                signs.data()};
    }
};

// The address of memory that nobody may read.
const uint8_t* unreadable() {
    static const void* const page = mmap(nullptr, 1 << 20, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (page == MAP_FAILED) abort();
    return (const uint8_t*)page;
}

struct Model {
    Config c;
    std::vector<std::unique_ptr<Weights>> weights;
    std::vector<std::vector<float>> vectors;
    std::vector<edgerazor_layer> layers;
    std::vector<std::vector<edgerazor_expert>> experts; // of the layers
    std::vector<float> cosines, sines;
    edgerazor_model model;

    edgerazor_matrix random(int rows, int columns, bool bias = false) {
        weights.push_back(std::make_unique<Weights>(rows, columns, c.bits, c, bias));
        return weights.back()->matrix();
    }

    edgerazor_norm norm(int features, bool there = true) {
        if (!there) return {EDGERAZOR_NO_NORM, 0, nullptr, nullptr};
        vectors.push_back(random_floats(features, 1));
        return {c.norm, 1e-6f, vectors.back().data(), nullptr};
    }

    void add_mixer(edgerazor_layer& layer, bool is_short) {
        layer.mixer = is_short ? EDGERAZOR_SHORT_CONVOLUTION : EDGERAZOR_GATED_DELTA_RULE;
        const int keys = 2 * 5, values = 4 * 9, features = is_short ? c.hidden_size : 2 * keys + values;
        layer.o = random(c.hidden_size, is_short ? c.hidden_size : values);
        layer.inputs[0] = random(is_short ? 3 * features : features, c.hidden_size);
        vectors.push_back(random_floats(4 * features));
        layer.convolution = {4, vectors.back().data(), nullptr};
        if (is_short) return;
        layer.inputs[1] = random(values, c.hidden_size);
        layer.inputs[2] = random(4, c.hidden_size), layer.inputs[3] = random(4, c.hidden_size);
        vectors.push_back(random_floats(4, -1));
        vectors.push_back(random_floats(4));
        const float *decay = vectors[vectors.size() - 2].data(), *decay_bias = vectors.back().data();
        layer.delta_rule = {2, 4, 5, 9, decay, decay_bias, norm(9)};
    }

    // Of 19 experts with half the features; the last one, whose codes cannot be read, is never chosen.
    void add_experts(edgerazor_layer& layer, bool sigmoid) {
        constexpr int count = 19, blocks = 2;
        experts.emplace_back();
        for (int e = 0; e < count; e++)
            experts.back().push_back({random(c.intermediate_size / 2, c.hidden_size),
                                      random(c.intermediate_size / 2, c.hidden_size),
                                      random(c.hidden_size, c.intermediate_size / 2)});
        for (const edgerazor_matrix* matrix : {&experts.back()[18].gate, &experts.back()[18].down})
            for (int i = 0; i < matrix->part_count; i++) ((edgerazor_format_rows*)matrix->parts)[i].codes = unreadable();
        vectors.push_back(random_floats(blocks * 16 * c.hidden_size));
        std::vector<float>& router = vectors.back();
        for (size_t i = 0; i < router.size(); i++)
            if ((int)(i / 16 / c.hidden_size) * 16 + (int)(i % 16) >= count) router[i] = 0;
        vectors.push_back(random_floats(count));
        vectors.back()[18] = -10;
        layer.experts = {count, 5, sigmoid, sigmoid, sigmoid ? 1e-6f : 0, 1.5f, router.data(), vectors.back().data(),
                         nullptr, {}, {}, {}, {}, experts.back().data()};
    }

    // The layer's own input; a wider head, values that are the keys, and a layer that attends to those of the first one.
    void add_layer_input(edgerazor_layer& layer, int number) {
        layer.input_gate = random(kInputFeatures, c.hidden_size);
        layer.input_o = random(c.hidden_size, kInputFeatures);
        layer.after_input = norm(c.hidden_size);
        layer.v_norm = {EDGERAZOR_RMS_NORM, 1e-6f, nullptr, nullptr};
        layer.output_scale = 0.8f;
        if (number == 1) {
            layer.head_dim = 2 * c.head_dim, layer.num_kv_heads = 1;
            layer.o = random(c.hidden_size, c.heads * layer.head_dim);
            layer.inputs[0] = random(c.heads * layer.head_dim, c.hidden_size);
            layer.inputs[1] = random(layer.head_dim, c.hidden_size);
            layer.inputs[2] = {};
        } else if (number == 2) {
            layer.kv_source = 0;
            layer.inputs[1] = layer.inputs[2] = {};
        }
    }

    edgerazor_layer_inputs layer_inputs() {
        const int width = c.layers * kInputFeatures;
        vectors.push_back(random_floats((width + 15) / 16 * 16 * c.hidden_size));
        const float* projection = vectors.back().data();
        return {kInputFeatures, random(c.vocab_size, width), projection, 0, norm(kInputFeatures), 3, 0.2f, 0.7f};
    }

    explicit Model(const Config& config) : c(config) {
        vectors.reserve(1000);
        experts.reserve(c.layers);
        const int q = c.heads * c.head_dim, kv = c.kv_heads * c.head_dim;
        for (int i = 0; i < c.layers; i++) {
            edgerazor_layer layer;
            memset(&layer, 0, sizeof layer);
            layer.activation = c.parts == 1 ? 1 + i % 2 : EDGERAZOR_SILU;
            layer.num_heads = c.heads, layer.num_kv_heads = c.kv_heads, layer.head_dim = c.head_dim;
            layer.kv_source = i;
            layer.output_scale = 1;
            layer.o = random(c.hidden_size, q);
            if (c.parts == 2 && i % 3 != 1) {
                add_mixer(layer, i % 3 == 0);
            } else if (c.parts == 1 && i % 2 == 0) {
                layer.inputs[0] = random(q + 2 * kv, c.hidden_size, true);
                layer.inputs[3] = random(c.heads, c.hidden_size);
            } else {
                layer.gated_queries = c.parts == 1;
                layer.inputs[0] = random(c.parts == 1 ? 2 * q : q, c.hidden_size, true);
                layer.inputs[1] = random(kv, c.hidden_size, true);
                layer.inputs[2] = random(kv, c.hidden_size);
            }
            if (c.parts == 3) {
                add_experts(layer, i % 2 == 1);
            } else {
                if (c.parts != 1 || i % 2 == 1)
                    layer.gate = random(c.parts == 1 ? 2 * c.intermediate_size : c.intermediate_size, c.hidden_size);
                if (c.parts != 1 || i % 2 == 0) layer.up = random(c.intermediate_size, c.hidden_size);
                layer.down = random(c.hidden_size, c.intermediate_size);
            }
            if (c.parts == 4) add_layer_input(layer, i);
            layer.before_attention = norm(c.hidden_size, !c.post_norms);
            layer.before_mlp = norm(c.hidden_size, !c.post_norms);
            layer.after_attention = norm(c.hidden_size, c.post_norms);
            layer.after_mlp = norm(c.hidden_size, c.post_norms);
            layer.q_norm = norm(c.norm_all_heads ? q : layer.head_dim);
            layer.k_norm = norm(c.norm_all_heads ? kv : layer.head_dim);
            layer.rope_dim = i % 2 ? 0 : c.rope_dim;
            layer.sliding_window = i % 2 ? 0 : c.sliding_window;
            layers.push_back(layer);
        }
        for (int position = 0; position < 1024; position++)
            for (int i = 0; i < c.rope_dim / 2; i++) {
                const double angle = position * pow(10000, -2.0 * i / c.rope_dim);
                cosines.push_back((float)cos(angle));
                sines.push_back((float)sin(angle));
            }
        model = {c.hidden_size, c.vocab_size, c.norm_all_heads,
                 c.parts == 1, c.activation_bits, c.kv_bits, 1 / sqrtf((float)c.head_dim), 1.5f, 0.5f,
                 c.parts == 1 ? 0.7f : 1.0f, c.parts == 1 ? 3.0f : 0.0f, c.parts == 1 ? 5.0f : 0.0f, c.rope_dim, 1,
                 random(c.vocab_size, c.hidden_size), {}, norm(c.hidden_size), {}, layers.data(), c.layers};
        model.head = model.embedding;
        if (c.parts == 4) model.layer_inputs = layer_inputs();
    }
};

struct Close {
    void operator()(edgerazor_decoder* decoder) const { edgerazor_decoder_free(decoder); }
};

using Decoder = std::unique_ptr<edgerazor_decoder, Close>;

int wrong = 0, checks = 0;

Decoder open(const Model& model, int isa, int threads) {
    Decoder decoder(edgerazor_decoder_new(&model.model, isa, threads));
    edgerazor_decoder_set_rope(decoder.get(), model.cosines.data(), model.sines.data(), nullptr);
    if (edgerazor_decoder_reserve_kv(decoder.get(), 2000) != EDGERAZOR_OK) abort();
    if (edgerazor_decoder_reserve_states(decoder.get(), 4) != EDGERAZOR_OK) abort();
    return decoder;
}

std::vector<float> logits(const Model& model, const Decoder& decoder, const std::vector<edgerazor_sequence_span>& spans,
                          const std::vector<int32_t>& tokens, const std::vector<int64_t>& positions) {
    std::vector<float> result(positions.size() * model.c.vocab_size);
    const int status = edgerazor_decoder_logits(decoder.get(), spans.data(), (int64_t)spans.size(), tokens.data(),
                                                positions.data(), (int64_t)positions.size(), result.data());
    checks++;
    if (status != EDGERAZOR_OK) wrong++, printf("status %d\n", status);
    return result;
}

// The relative distance of two sets of logits.
double distance(const std::vector<float>& a, const std::vector<float>& b) {
    double difference = 0, size = 0;
    for (size_t i = 0; i < a.size(); i++) {
        difference += ((double)a[i] - b[i]) * ((double)a[i] - b[i]);
        size += (double)b[i] * b[i];
    }
    return sqrt(difference / size);
}

void expect(bool right, const char* what, const Config& c, int isa, double number = 0) {
    checks++;
    if (right) return;
    wrong++;
    printf("%s: %s (%g): hidden %d, %d bits, activations %d, KV cache %d, window %d\n", edgerazor_isa_name(isa), what,
           number, c.hidden_size, c.bits, c.activation_bits, c.kv_bits, c.sliding_window);
}

// The first tokens of a sequence.
edgerazor_sequence_span from_start(int64_t count) { return {0, 0, 0, 0, count, nullptr, -1, 0}; }

std::vector<int32_t> prompt_of(const std::vector<int32_t>& tokens, int64_t count) {
    return {tokens.begin(), tokens.begin() + count};
}

// Pages anywhere, beside another sequence.
void check_pages(const Model& model, const Decoder& three, int isa, const std::vector<int32_t>& twice) {
    const Config& c = model.c;
    const int32_t first_pages[] = {7}, other_pages[] = {20};
    const edgerazor_sequence_span paged[] = {{0, 0, 0, 0, 40, first_pages, 0, 0},
                                             {0, 0, 0, 0, 10, other_pages, 0, 0}};
    const int64_t outputs[] = {39, 49};
    const uint8_t wanted[] = {1, 0};
    std::vector<float> of_pages(2 * c.vocab_size), totals(2);
    std::vector<int32_t> likeliest(2);
    const int status = edgerazor_decoder_step(three.get(), paged, 2, twice.data(), outputs, 2, wanted,
                                              of_pages.data(), likeliest.data(), totals.data());
    of_pages.resize(c.vocab_size);
    const std::vector<float> alone = logits(model, three, {from_start(40)}, prompt_of(twice, 40), {39});
    expect(status == EDGERAZOR_OK && of_pages == alone, "pages change the result", c, isa);
    double total = 0;
    for (const float each : alone) total += exp((double)each);
    expect(fabs(totals[0] - log(total)) < 1e-4, "a total is wrong", c, isa, totals[0]);
}

// After a token at position 39; the state before it is in slot 3.
void check_greedy(const Model& model, const Decoder& three, int isa, int32_t token) {
    const Config& c = model.c;
    std::vector<int32_t> text(20), again;
    std::vector<float> step;
    int64_t written = 0;
    const edgerazor_sequence_span span = {0, 0, 0, 39, 1, nullptr, 3, 1};
    edgerazor_decoder_greedy(three.get(), &span, 1, &token, nullptr, 0, 20, nullptr, text.data(), &written);
    for (int64_t i = 0; i < 20; i++) {
        if (i == 19) edgerazor_decoder_copy_state(three.get(), 2, 1);
        const edgerazor_sequence_span next = {0, 0, 0, 39 + i, 1, nullptr, i == 0 ? 3 : 2, 2};
        step = logits(model, three, {next}, {i == 0 ? token : again.back()}, {0});
        int32_t best = 0;
        for (int32_t t = 1; t < c.vocab_size; t++)
            if (step[t] > step[best]) best = t;
        again.push_back(best);
    }
    expect(written == 20 && text == again, "greedy decoding is not the most probable text", c, isa);
    float log_probability = 0;
    int32_t best = -1;
    const int64_t last = 0;
    const edgerazor_sequence_span end = {0, 0, 0, 58, 1, nullptr, 1, 1};
    edgerazor_decoder_scores(three.get(), &end, 1, &again[18], &last, &again[19], 1, &log_probability, &best);
    double sum = 0;
    for (const float each : step) sum += exp((double)each - step[again[19]]);
    const bool scored = best == again[19] && fabs(log_probability + log(sum)) < 1e-4;
    expect(scored, "a score is wrong", c, isa, log_probability);
}

void check(const Config& c) {
    const Model model(c);
    const int64_t length = 600; // more than a micro-batch
    std::vector<int32_t> tokens(length);
    for (int32_t& token : tokens) token = (int32_t)(draw() % c.vocab_size);
    const std::vector<int64_t> positions = {length - 1, 3, 3, 599, 40};
    // A sum in another order may be rounded the other way, which moves a quantized activation by one step.
    const double near = c.activation_bits == 16 && c.kv_bits == 16 ? 1e-5 : 0.05;
    std::vector<float> first;
    for (int isa = 0; isa < edgerazor_isa_count(); isa++) {
        const Decoder one = open(model, isa, 1), three = open(model, isa, 3);
        const std::vector<float> whole = logits(model, one, {from_start(length)}, tokens, positions);
        const std::vector<float> threaded = logits(model, three, {from_start(length)}, tokens, positions);
        const bool equal = memcmp(whole.data(), threaded.data(), whole.size() * sizeof(float)) == 0;
        expect(equal, "threads change the result", c, isa);
        if (isa == 0) first = whole;
        expect(distance(whole, first) < near, "another result than portable", c, isa, distance(whole, first));
        // A prefix and two sequences that continue it, in one call; then the same tokens one by one.
        const std::vector<int32_t> prompt(tokens.begin(), tokens.begin() + 50);
        const std::vector<edgerazor_sequence_span> spans = {
            {0, 0, 0, 0, 30, nullptr, -1, 0}, {0, 30, 1024, 0, 10, nullptr, 0, 1}, {0, 30, 1040, 0, 10, nullptr, 0, 1}};
        std::vector<int32_t> twice(prompt.begin(), prompt.begin() + 40);
        twice.insert(twice.end(), prompt.begin() + 30, prompt.begin() + 40);
        const std::vector<float> shared = logits(model, three, spans, twice, {39, 49});
        std::vector<float> step;
        for (int64_t i = 0; i < 40; i++) {
            if (i == 39) edgerazor_decoder_copy_state(three.get(), 2, 3);
            step = logits(model, three, {{0, 0, 0, i, 1, nullptr, i == 0 ? -1 : 2, 2}}, {prompt[i]}, {0});
        }
        const std::vector<float> left(shared.begin(), shared.begin() + c.vocab_size);
        const std::vector<float> right(shared.begin() + c.vocab_size, shared.end());
        expect(left == right, "equal sequences differ", c, isa);
        expect(distance(left, step) < near, "a shared prefix changes the result", c, isa, distance(left, step));
        if (c.parts != 2) check_pages(model, three, isa, twice);
        check_greedy(model, three, isa, prompt[39]);
    }
}

// A thread that the system can create only `left` more times.
struct Scarce {
    static int left;
    static std::atomic<int> alive;
    std::thread thread;

    template <class Work>
    explicit Scarce(const Work& work) {
        if (left-- <= 0) throw std::system_error(std::make_error_code(std::errc::resource_unavailable_try_again));
        thread = std::thread([work] {
            alive++;
            work();
            alive--;
        });
    }

    Scarce(Scarce&&) = default;

    void join() { thread.join(); }
};

int Scarce::left = 0;
std::atomic<int> Scarce::alive{0};

// Where a thread cannot be created, those created before it end, and the caller's signals are unblocked.
void check_scarce_threads() {
    const Config c = {};
    for (int left = 0; left <= 4; left++) {
        for (int repeat = 0; repeat < 20; repeat++) {
            Scarce::left = left;
            bool refused = false;
            int done = 0;
            try {
                edgerazor::BasicThreadPool<Scarce> threads(5);
                std::atomic<int> sum{0};
                threads.run([&](int thread) { sum += 1 << thread; });
                done = sum;
            } catch (const std::system_error&) {
                refused = true;
            }
            expect(refused == (left < 4), "a thread that cannot be created is not refused", c, 0, left);
            expect(refused || done == 31, "not all threads work", c, 0, left);
            expect(Scarce::alive == 0, "a thread is left behind", c, 0, left);
            sigset_t blocked;
            pthread_sigmask(SIG_SETMASK, nullptr, &blocked);
            expect(!sigismember(&blocked, SIGINT), "signals are blocked", c, 0, left);
        }
    }
}

} // namespace

int main() {
    check_scarce_threads();
    // hidden size, heads, KV heads, head_dim, intermediate size, vocabulary, layers, group, bits, activation bits, KV
    // bits, rope_dim, sliding window, norm of all heads, norms after attention and MLP instead of before, kind of norm,
    // block of the rotation, parts
    const Config configs[] = {
        {64, 4, 2, 16, 96, 300, 2, 32, 4, 8, 8, 16, 0, 0, 0, EDGERAZOR_RMS_NORM, 0},
        {64, 4, 2, 16, 96, 300, 2, 32, 4, 8, 8, 16, 0, 0, 0, EDGERAZOR_RMS_NORM, 32},
        {64, 4, 2, 16, 96, 300, 2, 32, 4, 16, 16, 16, 0, 0, 0, EDGERAZOR_RMS_NORM, 64},
        {96, 3, 1, 20, 100, 77, 3, 64, 2, 16, 16, 8, 40, 1, 1, EDGERAZOR_RMS_NORM, 0},
        {40, 5, 5, 7, 33, 50, 2, 33, 3, 8, 4, 6, 100, 0, 0, EDGERAZOR_LAYER_NORM, 8},
        {128, 2, 1, 64, 256, 1000, 1, 128, 0, 16, 8, 64, 17, 0, 0, EDGERAZOR_RMS_NORM, 128},
        {64, 4, 2, 16, 96, 300, 2, 32, 4, 8, 8, 16, 40, 0, 0, EDGERAZOR_RMS_NORM, 0, 1},
        {64, 4, 2, 16, 96, 300, 3, 32, 4, 8, 8, 16, 0, 0, 0, EDGERAZOR_RMS_NORM, 0, 2},
        {40, 5, 5, 7, 33, 50, 3, 33, 3, 16, 16, 6, 0, 0, 0, EDGERAZOR_RMS_NORM, 8, 2},
        {64, 4, 2, 16, 96, 300, 2, 32, 4, 8, 8, 16, 0, 0, 0, EDGERAZOR_RMS_NORM, 16, 3},
        {64, 4, 2, 16, 96, 300, 3, 32, 4, 8, 8, 16, 40, 0, 0, EDGERAZOR_RMS_NORM, 4, 4},
        {40, 5, 5, 7, 33, 50, 3, 33, 3, 16, 16, 6, 0, 0, 0, EDGERAZOR_RMS_NORM, 0, 4},
        {40, 5, 5, 7, 66, 50, 2, 33, 3, 16, 16, 6, 0, 0, 1, EDGERAZOR_RMS_NORM, 0, 3},
    };
    for (const Config& config : configs) check(config);
    for (int isa = 0; isa < edgerazor_isa_count(); isa++) printf("%s ", edgerazor_isa_name(isa));
    printf(": %d checks of the decoder, %d wrong\n", checks, wrong);
    return wrong != 0;
}
