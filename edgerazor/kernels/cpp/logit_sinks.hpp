// What a call does with hidden states after the last layer: returns logits, scores targets, or takes the best token.
#pragma once
#include <stdint.h>
#include <string.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "decoder.hpp"

namespace edgerazor {

// The output positions of a call that are in the current micro-batch. Each token among them has its logits computed
// once, kLogitTokens tokens at a time, however often it is asked for.
class OutputPositions : public LogitSink {
  public:
    OutputPositions(edgerazor_decoder& decoder, const int64_t* positions, int64_t count)
        : decoder(decoder), positions(positions), count(count) {}

    int64_t first_needed(int64_t first, int64_t tokens) const override {
        int64_t needed = tokens;
        for (int64_t i = 0; i < count; i++)
            if (positions[i] >= first) needed = std::min(needed, positions[i] - first);
        return needed;
    }

    void begin(int64_t first, int64_t tokens) override {
        std::vector<int64_t> row_of_token(tokens, -1);
        rows.clear();
        outputs.clear();
        for (int64_t i = 0; i < count; i++) {
            const int64_t token = positions[i] - first;
            if (token < 0 || token >= tokens) continue;
            if (row_of_token[token] < 0) {
                row_of_token[token] = (int64_t)rows.size();
                rows.push_back(token);
                outputs.emplace_back();
            }
            outputs[row_of_token[token]].push_back(i);
        }
        decoder.logits.reserve(std::min(kLogitTokens, (int64_t)rows.size()) * decoder.model.vocab_size);
    }

  protected:
    // Calls use(index into rows, logits) for each row, on any thread.
    template <class Use>
    void for_each_row(const ThreadContext& context, const Use& use) {
        for (int64_t first = 0; first < (int64_t)rows.size(); first += kLogitTokens) {
            const int64_t row_count = std::min(kLogitTokens, (int64_t)rows.size() - first);
            decoder.compute_logits(context, rows, first, row_count, decoder.logits.get());
            const WorkRange range(row_count, context.thread, decoder.threads.count());
            for (int64_t i = range.first; i < range.last; i++)
                use(first + i, decoder.logits.get() + i * decoder.model.vocab_size);
            decoder.threads.barrier(); // before the logits are overwritten
        }
    }

    edgerazor_decoder& decoder;
    const int64_t* positions;
    int64_t count;
    std::vector<int64_t> rows;                 // tokens of the micro-batch
    std::vector<std::vector<int64_t>> outputs; // for each of the rows: the indices of `positions` that name it
};

// Copies the logits out.
class LogitsSink : public OutputPositions {
  public:
    LogitsSink(edgerazor_decoder& decoder, const int64_t* positions, int64_t count, float* out)
        : OutputPositions(decoder, positions, count), out(out) {}

    void consume(const ThreadContext& context) override {
        const int64_t vocab_size = decoder.model.vocab_size;
        if (rows.size() == 1 && outputs[0].size() == 1) // in decode: computed in place, nothing to copy
            return decoder.compute_logits(context, rows, 0, 1, out + outputs[0][0] * vocab_size);
        for_each_row(context, [&](int64_t row, const float* logits) {
            for (const int64_t output : outputs[row])
                memcpy(out + output * vocab_size, logits, vocab_size * sizeof(float));
        });
    }

  private:
    float* out;
};

// Log-probabilities of targets, and the most probable tokens.
class ScoresSink : public OutputPositions {
  public:
    ScoresSink(edgerazor_decoder& decoder, const int64_t* positions, int64_t count, const int32_t* targets,
               float* log_probabilities, int32_t* best)
        : OutputPositions(decoder, positions, count), targets(targets), log_probabilities(log_probabilities),
          best(best) {}

    void consume(const ThreadContext& context) override {
        for_each_row(context, [&](int64_t row, const float* logits) {
            const int64_t vocab_size = decoder.model.vocab_size;
            const float log_total = decoder.math.log_sum_exp(logits, vocab_size);
            const int32_t most_probable = decoder.math.argmax(logits, vocab_size);
            if (!std::isfinite(log_total)) decoder.finite.store(false, std::memory_order_relaxed);
            for (const int64_t output : outputs[row]) {
                log_probabilities[output] = logits[targets[output]] - log_total;
                best[output] = most_probable;
            }
        });
    }

  private:
    const int32_t* targets;
    float* log_probabilities;
    int32_t* best;
};

// Logits of a step of a batch, computed in place, and the most probable tokens.
class StepSink : public LogitSink {
  public:
    StepSink(edgerazor_decoder& decoder, const int64_t* positions, int64_t count, const uint8_t* wanted, float* logits,
             float* log_totals)
        : decoder(decoder), positions(positions), count(count), wanted(wanted), logits(logits),
          log_totals(log_totals), best_of_thread(decoder.threads.count(), std::vector<int32_t>(count, -1)) {}

    int64_t first_needed(int64_t first, int64_t tokens) const override {
        const int64_t* const output = std::lower_bound(positions, positions + count, first);
        return output == positions + count ? tokens : *output - first;
    }

    void begin(int64_t first, int64_t tokens) override {
        next += (int64_t)rows.size();
        rows.clear();
        for (int64_t i = next; i < count && positions[i] < first + tokens; i++) rows.push_back(positions[i] - first);
    }

    // Each thread takes the best tokens of its part of the vocabulary, whose logits it has mostly computed itself.
    void consume(const ThreadContext& context) override {
        const int64_t vocab_size = decoder.model.vocab_size, row_count = (int64_t)rows.size();
        const WorkRange part(vocab_size, context.thread, decoder.threads.count());
        for (int64_t first = 0; first < row_count; first += kLogitTokens) {
            const int64_t together = std::min(kLogitTokens, row_count - first);
            float* out = logits + (next + first) * vocab_size;
            decoder.compute_logits(context, rows, first, together, out);
            for (int64_t i = 0; i < together && part.first < part.last; i++)
                best_of_thread[context.thread][next + first + i] =
                    (int32_t)part.first +
                    decoder.math.argmax(out + i * vocab_size + part.first, part.last - part.first);
            const WorkRange range(together, context.thread, decoder.threads.count());
            for (int64_t i = range.first; i < range.last; i++)
                if (wanted[next + first + i])
                    log_totals[next + first + i] = decoder.math.log_sum_exp(out + i * vocab_size, vocab_size);
        }
    }

    // After the call.
    void best_tokens(int32_t* best) const {
        for (int64_t i = 0; i < count; i++) {
            const float* row = logits + i * decoder.model.vocab_size;
            best[i] = -1;
            for (const std::vector<int32_t>& of_part : best_of_thread)
                if (of_part[i] >= 0 && (best[i] < 0 || row[of_part[i]] > row[best[i]])) best[i] = of_part[i];
            if (!std::isfinite(row[best[i]])) best[i] = -1;
        }
    }

  private:
    edgerazor_decoder& decoder;
    const int64_t* positions;
    const int64_t count;
    const uint8_t* wanted;
    float* logits;
    float* log_totals;
    int64_t next = 0;          // the first output of the micro-batch
    std::vector<int64_t> rows; // tokens of the micro-batch that have outputs
    std::vector<std::vector<int32_t>> best_of_thread;
};

// The most probable token after each token of a call.
class GreedySink : public LogitSink {
  public:
    GreedySink(edgerazor_decoder& decoder, int64_t count)
        : decoder(decoder), best_of_thread(decoder.threads.count(), std::vector<Candidate>(count)) {}

    int64_t first_needed(int64_t, int64_t) const override { return 0; }

    void begin(int64_t first, int64_t tokens) override {
        before = first;
        rows.resize(tokens);
        for (int64_t i = 0; i < tokens; i++) rows[i] = i;
        decoder.logits.reserve(std::min(kLogitTokens, tokens) * decoder.model.vocab_size);
    }

    // Each thread takes the best tokens of its part of the vocabulary.
    void consume(const ThreadContext& context) override {
        const int64_t vocab_size = decoder.model.vocab_size, count = (int64_t)rows.size();
        const WorkRange part(vocab_size, context.thread, decoder.threads.count());
        for (int64_t first = 0; first < count; first += kLogitTokens) {
            const int64_t together = std::min(kLogitTokens, count - first);
            if (first > 0) decoder.threads.barrier(); // before the logits are overwritten
            decoder.compute_logits(context, rows, first, together, decoder.logits.get());
            for (int64_t i = 0; i < together && part.first < part.last; i++) {
                const float* logits = decoder.logits.get() + i * vocab_size + part.first;
                const int32_t best = decoder.math.argmax(logits, part.last - part.first);
                best_of_thread[context.thread][before + first + i] = {(int32_t)part.first + best, logits[best]};
            }
        }
    }

    // After the call: the first of equally probable tokens. False, and the decoder is told, where no logit is finite.
    bool best_tokens(int32_t* out) const {
        bool finite = true;
        for (size_t i = 0; i < best_of_thread[0].size(); i++) {
            Candidate best;
            for (const std::vector<Candidate>& of_part : best_of_thread)
                if (of_part[i].token >= 0 && (best.token < 0 || of_part[i].logit > best.logit)) best = of_part[i];
            finite = finite && best.token >= 0 && std::isfinite(best.logit);
            out[i] = best.token;
        }
        if (!finite) decoder.finite.store(false, std::memory_order_relaxed);
        return finite;
    }

  private:
    struct Candidate {
        int32_t token = -1;
        float logit = 0;
    };

    edgerazor_decoder& decoder;
    int64_t before = 0;        // tokens of earlier micro-batches
    std::vector<int64_t> rows; // all tokens of the micro-batch
    std::vector<std::vector<Candidate>> best_of_thread;
};

} // namespace edgerazor
