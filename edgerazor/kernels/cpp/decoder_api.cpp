// The C interface of the decoder.
#include <string.h>

#include <algorithm>
#include <exception>

#include "decoder.hpp"
#include "logit_sinks.hpp"

using namespace edgerazor;

namespace {

// Runs `work`, which returns nothing, and returns its status: exceptions must not leave a C function.
template <class Work>
int status_of(edgerazor_decoder* decoder, const Work& work) {
    decoder->finite.store(true, std::memory_order_relaxed);
    try {
        work();
    } catch (const std::exception&) { // there is no memory, or a size is larger than any memory
        return EDGERAZOR_NO_MEMORY;
    }
    return decoder->finite.load(std::memory_order_relaxed) ? EDGERAZOR_OK : EDGERAZOR_NOT_FINITE;
}

} // namespace

extern "C" {

edgerazor_decoder* edgerazor_decoder_new(const edgerazor_model* model, int isa, int threads) {
    try {
        return new edgerazor_decoder(*model, isa, threads);
    } catch (const std::exception&) { // there is no memory, or a thread cannot be created
        return nullptr;
    }
}

void edgerazor_decoder_free(edgerazor_decoder* decoder) { delete decoder; }

void edgerazor_decoder_set_rope(edgerazor_decoder* decoder, const float* cosines, const float* sines,
                                const float* query_scales) {
    decoder->cosines = cosines;
    decoder->sines = sines;
    decoder->query_scales = query_scales;
}

int edgerazor_decoder_reserve_states(edgerazor_decoder* decoder, int64_t count) {
    return status_of(decoder, [&] { decoder->states.reserve(count); });
}

int64_t edgerazor_decoder_state_bytes(const edgerazor_decoder* decoder) { return decoder->states.slot_bytes(); }

void edgerazor_decoder_copy_state(edgerazor_decoder* decoder, int64_t from, int64_t to) {
    decoder->states.copy(from, to);
}

int edgerazor_decoder_reserve_kv(edgerazor_decoder* decoder, int64_t slots) {
    return status_of(decoder, [&] { decoder->kv_cache.reserve(slots); });
}

void edgerazor_decoder_copy_page(edgerazor_decoder* decoder, int32_t from, int32_t to) {
    decoder->kv_cache.copy_page(from, to);
}

int64_t edgerazor_decoder_kv_bytes(const edgerazor_decoder* decoder) { return decoder->kv_cache.bytes(); }

int edgerazor_decoder_logits(edgerazor_decoder* decoder, const edgerazor_sequence_span* spans, int64_t span_count,
                             const int32_t* tokens, const int64_t* output_positions, int64_t count, float* logits) {
    return status_of(decoder, [&] {
        LogitsSink sink(*decoder, output_positions, count, logits);
        decoder->forward(spans, span_count, tokens, sink);
    });
}

int edgerazor_decoder_scores(edgerazor_decoder* decoder, const edgerazor_sequence_span* spans, int64_t span_count,
                             const int32_t* tokens, const int64_t* output_positions, const int32_t* targets,
                             int64_t count, float* log_probabilities, int32_t* best) {
    return status_of(decoder, [&] {
        ScoresSink sink(*decoder, output_positions, count, targets, log_probabilities, best);
        decoder->forward(spans, span_count, tokens, sink);
    });
}

int edgerazor_decoder_step(edgerazor_decoder* decoder, const edgerazor_sequence_span* spans, int64_t span_count,
                           const int32_t* tokens, const int64_t* output_positions, int64_t count,
                           const uint8_t* wanted, float* logits, int32_t* best, float* log_totals) {
    return status_of(decoder, [&] {
        StepSink sink(*decoder, output_positions, count, wanted, logits, log_totals);
        decoder->forward(spans, span_count, tokens, sink);
        sink.best_tokens(best);
    });
}

int edgerazor_decoder_greedy(edgerazor_decoder* decoder, const edgerazor_sequence_span* first_spans,
                             int64_t span_count, const int32_t* tokens, const int32_t* stops, int64_t stop_count,
                             int64_t count, const int32_t* interrupt, int32_t* out, int64_t* written) {
    *written = 0;
    return status_of(decoder, [&] {
        GreedySink sink(*decoder, span_count);
        std::vector<edgerazor_sequence_span> spans(first_spans, first_spans + span_count);
        const auto stop = [&](int32_t token) {
            return std::find(stops, stops + stop_count, token) != stops + stop_count;
        };
        const auto interrupted = [&] { return interrupt && __atomic_load_n(interrupt, __ATOMIC_RELAXED) != 0; };
        for (bool goes_on = true; goes_on && *written < count; out += span_count) {
            decoder->forward(spans.data(), span_count, tokens, sink);
            if (!sink.best_tokens(out)) break;
            ++*written;
            tokens = out;
            for (edgerazor_sequence_span& span : spans) {
                span.past_length++;
                span.state_in = span.state_out;
            }
            goes_on = std::none_of(out, out + span_count, stop) && !interrupted();
        }
    });
}

int edgerazor_decoder_layer(edgerazor_decoder* decoder, int32_t layer, const edgerazor_sequence_span* spans,
                            int64_t span_count, float* hidden_states) {
    return status_of(decoder, [&] {
        int64_t count = 0;
        for (int64_t i = 0; i < span_count; i++) count += spans[i].count;
        decoder->plan_micro_batch(spans, span_count, 0, count);
        decoder->allocate(count);
        decoder->threads.run([&](int thread) {
            const ThreadContext context = decoder->context_of(thread, count);
            const int64_t hidden_size = decoder->model.hidden_size, first = context.first * hidden_size;
            const int64_t size = (context.last - context.first) * hidden_size;
            float* residual = context.buffers->residual.get() + first;
            memcpy(residual, hidden_states + first, size * sizeof(float));
            decoder->threads.barrier(); // of a single token every thread has read the hidden states
            decoder->forward_layer(context, layer);
            if (context.shared || thread == 0) memcpy(hidden_states + first, residual, size * sizeof(float));
        });
    });
}

} // extern "C"
