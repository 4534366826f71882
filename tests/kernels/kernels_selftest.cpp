// Tests every instruction set of the library that this machine can run against float64 sums of dequantized rows. It is
// for machines without Python: `make test-arm` runs it in an emulator, `make test-sanitizers` under sanitizers. (Where
// there is Python, `tests/kernels/test_native.py` compares the same functions with numpy and torch.)
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <memory>
#include <vector>

#include "float_kernels.hpp"
#include "library.h"
#include "selftest.hpp"

namespace {

struct Case {
    int columns, group, activation_group, rows, tokens, bits, min_level_x2, x_bits;
};

// A byte that is valid at any place of the codes: base-3 bytes are 0 to 242, and 2-bit fields of ternary codes are 0 to
// 2.
uint8_t random_byte(const Case& c) {
    if (c.bits != 0) return (uint8_t)draw();
    static const uint8_t valid[] = {0, 1, 2, 4, 5, 6, 8, 9, 10, 16, 17, 18, 20, 21, 22, 32, 33, 34, 36, 37, 38, 40,
                                   41, 42, 64, 65, 66, 128, 129, 130, 132, 133, 134, 136, 137, 138, 144, 145, 160};
    return valid[draw() % sizeof valid];
}

void fill_base3(uint8_t* codes, int64_t blocks, int64_t block_bytes) {
    for (int64_t block = 0; block < blocks; block++)
        for (int64_t chunk = 0; chunk + 832 <= block_bytes; chunk += 832)
            for (int i = 0; i < 768; i++) codes[block * block_bytes + chunk + i] = (uint8_t)(draw() % 243);
}

int wrong = 0, checks = 0;

// The product with float32 activations, against float64 sums of dequantized rows.
void check_linear_float(const Case& c, const edgerazor_row_layout* layout, const edgerazor_format_rows& part,
                        const float* x) {
    auto weights = memory<float>(c.columns), y = memory<float>((int64_t)c.tokens * c.rows);
    for (int isa = 0; isa < edgerazor_isa_count(); isa++) {
        edgerazor_linear_float(layout, isa, &part, c.tokens, x, nullptr, y.get(), c.rows, 0, (c.rows + 15) / 16);
        for (int row = 0; row < c.rows; row++) {
            edgerazor_dequantize_row(layout, &part, row, weights.get());
            for (int token = 0; token < c.tokens; token++) {
                double sum = 0, size = 0;
                for (int i = 0; i < c.columns; i++) {
                    const double product = (double)weights[i] * x[(int64_t)token * c.columns + i];
                    sum += product;
                    size += fabs(product);
                }
                checks++;
                if (fabs(y[token * c.rows + c.rows - 1 - row] - sum) <= 2e-6 * size) continue;
                wrong++;
                printf("%s in floats: row %d, token %d: %g, not %g (%d columns, %d bits)\n", edgerazor_isa_name(isa),
                       row, token, y[token * c.rows + c.rows - 1 - row], sum, c.columns, c.bits);
            }
        }
    }
}

void check(const Case& c) {
    edgerazor_row_layout* layout = edgerazor_row_layout_new(c.columns, c.group, c.activation_group);
    const int64_t blocks = (c.rows + 15) / 16, block_bytes = edgerazor_block_bytes(layout, c.bits);
    const int group = c.group < c.columns ? c.group : c.columns, groups = (c.columns + group - 1) / group;
    auto codes = memory<uint8_t>(blocks * block_bytes);
    auto scales = memory<uint16_t>(blocks * groups * 16);
    auto rows = memory<int32_t>(c.rows);
    auto bias = memory<float>(c.rows);
    auto x = memory<float>((int64_t)c.tokens * c.columns);
    for (int64_t i = 0; i < blocks * block_bytes; i++) codes[i] = random_byte(c);
    if (c.bits == 0) fill_base3(codes.get(), blocks, block_bytes);
    for (int64_t i = 0; i < blocks * groups * 16; i++) scales[i] = (uint16_t)(draw() % 0x4000); // below 2
    for (int i = 0; i < c.rows; i++) rows[i] = c.rows - 1 - i, bias[i] = (float)(draw() % 100);
    for (int i = 0; i < c.tokens * c.columns; i++) x[i] = (float)(int32_t)draw() * 1e-9f;
    const edgerazor_format_rows part = {codes.get(), scales.get(), rows.get(), c.rows, c.bits, c.min_level_x2};

    const int64_t width = edgerazor_activation_bytes(layout), segments = edgerazor_segments(layout);
    std::vector<float> first;
    for (int isa = 0; isa < edgerazor_isa_count(); isa++) {
        auto x_codes = memory<int8_t>(c.tokens * width);
        auto x_scales = memory<float>(c.tokens * segments);
        auto sums = memory<int32_t>(c.tokens * segments);
        auto y = memory<float>((int64_t)c.tokens * c.rows);
        edgerazor_quantize(layout, isa, x.get(), c.tokens, c.x_bits, 0, x_codes.get(), x_scales.get(), sums.get());
        edgerazor_linear(layout, isa, &part, c.tokens, x_codes.get(), x_scales.get(), sums.get(), bias.get(),
                         y.get(), c.rows, 0, blocks);
        if (isa == 0) first.assign(y.get(), y.get() + c.tokens * c.rows);
        checks++;
        if (memcmp(first.data(), y.get(), first.size() * sizeof(float)) != 0) {
            wrong++;
            printf("%s is not portable: %d columns, groups %d and %d, %d rows, %d tokens, %d bits\n",
                   edgerazor_isa_name(isa), c.columns, c.group, c.activation_group, c.rows, c.tokens, c.bits);
        }
    }
    // The portable kernels against float64 sums of dequantized rows.
    auto weights = memory<float>(c.columns);
    for (int row = 0; row < c.rows; row++) {
        edgerazor_dequantize_row(layout, &part, row, weights.get());
        for (int token = 0; token < c.tokens; token++) {
            const float* values = x.get() + (int64_t)token * c.columns;
            double sum = 0, size = 0;
            for (int begin = 0; begin < c.columns; begin += c.activation_group) {
                const int end = begin + c.activation_group < c.columns ? begin + c.activation_group : c.columns;
                float largest = 0;
                for (int i = begin; i < end; i++) largest = fmaxf(largest, fabsf(values[i]));
                const float scale = largest / (float)((1 << (c.x_bits - 1)) - 1);
                for (int i = begin; i < end; i++) {
                    const double product = (double)weights[i] * scale * nearbyintf(values[i] / scale);
                    sum += product;
                    size += fabs(product);
                }
            }
            const double result = first[token * c.rows + c.rows - 1 - row] - bias[c.rows - 1 - row];
            checks++;
            if (fabs(result - sum) > 1e-5 * size + 1e-5) {
                wrong++;
                printf("row %d, token %d: %g, not %g (%d columns, %d bits)\n", row, token, result, sum, c.columns,
                       c.bits);
            }
        }
    }
    check_linear_float(c, layout, part, x.get());
    edgerazor_row_layout_free(layout);
}

// Bytes that are no valid codes (base-3 bytes above 242, ternary fields of 3), as a hostile file may contain them: the
// results are finite, and a sanitizer sees no access outside the arguments.
void check_any_bytes(int columns, int group, int bits, int min_level_x2) {
    const int rows = 40, blocks = 3, tokens = 7;
    edgerazor_row_layout* layout = edgerazor_row_layout_new(columns, group, group);
    const int64_t bytes = blocks * edgerazor_block_bytes(layout, bits), groups = (columns + group - 1) / group;
    const int64_t segments = edgerazor_segments(layout);
    auto codes = memory<uint8_t>(bytes), expanded = memory<uint8_t>(blocks * edgerazor_block_bytes(layout, 2));
    auto scales = memory<uint16_t>(blocks * groups * 16);
    auto x = memory<float>(tokens * columns), weights = memory<float>(columns), y = memory<float>(tokens * rows);
    auto x_codes = memory<int8_t>(tokens * edgerazor_activation_bytes(layout));
    auto x_scales = memory<float>(tokens * segments);
    auto sums = memory<int32_t>(tokens * segments);
    for (int64_t i = 0; i < bytes; i++) codes[i] = draw() % 2 ? 255 : (uint8_t)draw();
    for (int64_t i = 0; i < blocks * groups * 16; i++) scales[i] = 0x3c00; // one
    for (int i = 0; i < tokens * columns; i++) x[i] = (float)(int32_t)draw() * 1e-9f;
    for (int isa = 0; isa < edgerazor_isa_count(); isa++) {
        edgerazor_format_rows part = {codes.get(), scales.get(), nullptr, rows, bits, min_level_x2};
        edgerazor_quantize(layout, isa, x.get(), tokens, 8, 0, x_codes.get(), x_scales.get(), sums.get());
        for (int form = 0; form < (bits == 0 ? 2 : 1); form++) {
            for (int count : {1, tokens})
                edgerazor_linear(layout, isa, &part, count, x_codes.get(), x_scales.get(), sums.get(), nullptr,
                                 y.get(), rows, 0, blocks);
            if (draw() % 2)
                edgerazor_linear_float(layout, isa, &part, tokens, x.get(), nullptr, y.get(), rows, 0, blocks);
            for (int row = 0; row < rows; row++) edgerazor_dequantize_row(layout, &part, row, weights.get());
            checks++;
            for (int i = 0; i < tokens * rows; i++)
                if (!isfinite(y[i])) {
                    wrong++;
                    printf("%s: a result of invalid codes is not finite (%d columns, %d bits)\n",
                           edgerazor_isa_name(isa), columns, bits);
                    break;
                }
            if (bits != 0) break;
            edgerazor_expand_ternary(layout, isa, codes.get(), blocks, expanded.get());
            part = {expanded.get(), scales.get(), nullptr, rows, 2, min_level_x2};
        }
    }
    edgerazor_row_layout_free(layout);
}

// The pages of one KV head.
struct Cache {
    int bits, head_dim;
    std::vector<edgerazor::KvPage> pages;
    std::vector<std::unique_ptr<char[], Free>> keys, values;
    std::vector<std::unique_ptr<float[], Free>> scales;

    Cache(int bits, int head_dim, int count) : bits(bits), head_dim(head_dim) {
        const int64_t bytes = edgerazor::kv_vector_bytes(bits, head_dim) * edgerazor::kPageSlots;
        for (int i = 0; i < count; i++) {
            keys.push_back(memory<char>(bytes));
            values.push_back(memory<char>(bytes));
            for (int k = 0; k < 2; k++) scales.push_back(memory<float>(edgerazor::kPageSlots));
            memset(keys.back().get(), 255, bytes); // NaN in the slots that are not filled
            memset(values.back().get(), 255, bytes);
            for (int k = 0; k < edgerazor::kPageSlots; k++) scales[2 * i][k] = scales[2 * i + 1][k] = NAN;
            pages.push_back({keys.back().get(), values.back().get(), scales[2 * i].get(), scales[2 * i + 1].get()});
        }
    }

    double dequantize(const void* memory, const float* scales, int slot, int64_t at, int64_t pair, bool high) const {
        if (bits == 16) return ((const float*)memory)[at];
        if (bits == 8) return (double)((const int8_t*)memory)[at] * scales[slot];
        const int byte = ((const uint8_t*)memory)[pair];
        return (double)((high ? byte >> 4 : byte & 15) - 8) * scales[slot];
    }

    double key(int64_t number, int feature) const {
        const edgerazor::KvPage& page = pages[number / edgerazor::kPageSlots];
        const int slot = (int)(number % edgerazor::kPageSlots), key_block = slot / 16, lane = slot % 16;
        return dequantize(page.keys, page.key_scales, slot, ((int64_t)key_block * head_dim + feature) * 16 + lane,
                      ((int64_t)key_block * ((head_dim + 1) / 2) + feature / 2) * 16 + lane, feature % 2);
    }

    double value(int64_t number, int feature) const {
        const edgerazor::KvPage& page = pages[number / edgerazor::kPageSlots];
        const int slot = (int)(number % edgerazor::kPageSlots);
        return dequantize(page.values, page.value_scales, slot, (int64_t)slot * head_dim + feature,
                      (int64_t)slot * ((head_dim + 1) / 2) + feature / 2, feature % 2);
    }
};

struct AttentionCase {
    int bits, head_dim, heads, tokens;
    edgerazor::SlotRange prefix, own;
    int sliding_window;
};

// The attention of one query to the KV slots that its token sees, in float64.
void exact_attention(const AttentionCase& c, const Cache& cache, const float* query, int token,
                     std::vector<double>& out) {
    const int64_t last = c.prefix.count + c.own.count - (c.tokens - 1 - token);
    const int64_t first = c.sliding_window > 0 && last > c.sliding_window ? last - c.sliding_window : 0;
    double total = 0;
    out.assign(c.head_dim, 0);
    for (int64_t i = first; i < last; i++) {
        const int64_t slot = i < c.prefix.count ? c.prefix.slot + i : c.own.slot + i - c.prefix.count;
        double score = 0;
        for (int k = 0; k < c.head_dim; k++) score += query[k] * cache.key(slot, k);
        const double weight = exp(score / sqrt(c.head_dim));
        total += weight;
        for (int k = 0; k < c.head_dim; k++) out[k] += weight * cache.value(slot, k);
    }
    for (double& sum : out) sum /= total;
}

void check_attention(const AttentionCase& c) {
    const int64_t ends[] = {c.prefix.slot + c.prefix.count, c.own.slot + c.own.count};
    const int pages = (int)((ends[0] > ends[1] ? ends[0] : ends[1]) - 1) / edgerazor::kPageSlots + 1;
    const int64_t width = (int64_t)c.heads * c.head_dim;
    auto queries = memory<float>(c.tokens * width), out = memory<float>(c.tokens * width);
    auto key = memory<float>(c.head_dim);
    const auto fill = [](float* x, int64_t count) {
        for (int64_t i = 0; i < count; i++) x[i] = (float)(int32_t)draw() * 1e-9f;
    };
    fill(queries.get(), c.tokens * width);
    for (int isa = 0; isa < edgerazor_isa_count(); isa++) {
        const edgerazor::FloatKernels& kernels = *(const edgerazor::FloatKernels*)edgerazor_float_kernels(isa);
        Cache cache(c.bits, c.head_dim, pages);
        for (const edgerazor::SlotRange& range : {c.prefix, c.own})
            for (int64_t slot = range.slot; slot < range.slot + range.count; slot++) {
                fill(key.get(), c.head_dim);
                auto value = memory<float>(c.head_dim);
                fill(value.get(), c.head_dim);
                kernels.store_kv(cache.pages[slot / edgerazor::kPageSlots], (int)(slot % edgerazor::kPageSlots), c.bits,
                                 c.head_dim, key.get(), value.get());
            }
        auto scratch = memory<char>(kernels.attention_scratch_bytes(c.head_dim, c.heads, c.tokens));
        const float scale = 1 / sqrtf((float)c.head_dim), soft_cap = 0;
        kernels.attention({c.bits, c.head_dim, scale, soft_cap, cache.pages.data(), queries.get(), width, c.heads,
                           c.tokens, {c.prefix, c.own}, c.sliding_window, out.get(), width, scratch.get()});
        std::vector<double> expected;
        for (int token = 0; token < c.tokens; token++)
            for (int head = 0; head < c.heads; head++) {
                const int64_t at = token * width + head * c.head_dim;
                exact_attention(c, cache, queries.get() + at, token, expected);
                for (int k = 0; k < c.head_dim; k++) {
                    checks++;
                    if (fabs(out[at + k] - expected[k]) <= 5e-6) continue;
                    wrong++;
                    printf("%s: attention, %d bits, head_dim %d, %d heads, token %d of %d: %g, not %g\n",
                           edgerazor_isa_name(isa), c.bits, c.head_dim, c.heads, token, c.tokens, out[at + k],
                           expected[k]);
                    return;
                }
            }
    }
}

// Norms, rotation, SwiGLU and sums of vectors of `count` numbers.
void check_vectors(int count) {
    auto x = memory<float>(count), y = memory<float>(count), out = memory<float>(count);
    double squares = 0, mean = 0, exponentials = 0;
    int largest = 0;
    for (int i = 0; i < count; i++) {
        x[i] = (float)(int32_t)draw() * 2e-9f;
        y[i] = (float)(int32_t)draw() * 1e-9f;
        squares += (double)x[i] * x[i] / count;
        mean += (double)x[i] / count;
        exponentials += exp(x[i]);
        if (x[i] > x[largest]) largest = i;
    }
    const double deviation = sqrt(squares - mean * mean + 1e-5);
    for (int isa = 0; isa < edgerazor_isa_count(); isa++) {
        const edgerazor::FloatKernels& kernels = *(const edgerazor::FloatKernels*)edgerazor_float_kernels(isa);
        const auto expect = [&](const char* name, double result, double expected) {
            checks++;
            if (fabs(result - expected) <= 1e-5) return;
            wrong++;
            printf("%s: %s of %d numbers: %g, not %g\n", edgerazor_isa_name(isa), name, count, result, expected);
        };
        kernels.rms_norm(x.get(), count, 1e-5f, y.get(), out.get());
        for (int i = 0; i < count; i++) expect("rms_norm", out[i], x[i] / sqrt(squares + 1e-5) * y[i]);
        kernels.layer_norm(x.get(), count, 1e-5f, y.get(), x.get(), out.get());
        for (int i = 0; i < count && count > 1; i++)
            expect("layer_norm", out[i], (x[i] - mean) / deviation * y[i] + x[i]);
        kernels.swiglu(x.get(), y.get(), count, out.get());
        for (int i = 0; i < count; i++) expect("swiglu", out[i], x[i] / (1 + exp(-(double)x[i])) * y[i]);
        memcpy(out.get(), x.get(), sizeof(float) * count);
        kernels.add(out.get(), y.get(), count);
        for (int i = 0; i < count; i++) expect("add", out[i], (double)x[i] + y[i]);
        memcpy(out.get(), x.get(), sizeof(float) * count);
        const int half = count / 2;
        kernels.rope(out.get(), 2 * half, y.get(), y.get() + half);
        for (int i = 0; i < half; i++) {
            expect("rope", out[i], (double)x[i] * y[i] - (double)x[half + i] * y[half + i]);
            expect("rope", out[half + i], (double)x[half + i] * y[i] + (double)x[i] * y[half + i]);
        }
        expect("argmax", kernels.argmax(x.get(), count), largest);
        expect("log_sum_exp", kernels.log_sum_exp(x.get(), count), log(exponentials));
    }
}

// The rotation, and back, of rows of `columns` numbers, against the letter of section "Rotation" of packed/FORMAT.md.
void check_rotation(int columns, int block) {
    const int rows = 3;
    auto x = memory<float>(rows * columns), out = memory<float>(rows * columns), signs = memory<float>(columns);
    auto bits = memory<uint8_t>((columns + 7) / 8);
    for (int i = 0; i < (columns + 7) / 8; i++) bits[i] = (uint8_t)draw();
    for (int i = 0; i < rows * columns; i++)
        x[i] = draw() % 8 == 0 ? 0 : (float)(int32_t)draw() * ldexpf(1, -(int)(draw() % 60));
    for (int i = 0; i < columns; i++) signs[i] = bits[i / 8] >> i % 8 & 1 ? -1.0f : 1.0f;
    const float factor = (float)(1 / sqrt((double)block));
    for (int back = 0; back < 2; back++) {
        std::vector<float> expected(x.get(), x.get() + rows * columns);
        for (int row = 0; row < rows; row++) {
            float* values = expected.data() + row * columns;
            for (int i = 0; i < columns && !back; i++) values[i] = signs[i] * values[i];
            for (int stride = 1; stride < block; stride *= 2)
                for (int i = 0; i < columns; i++) {
                    if (i & stride) continue;
                    const float first = values[i], second = values[i + stride];
                    values[i] = first + second;
                    values[i + stride] = first - second;
                }
            for (int i = 0; i < columns; i++) values[i] = factor * values[i];
            for (int i = 0; i < columns && back; i++) values[i] = signs[i] * values[i];
        }
        for (int isa = 0; isa < edgerazor_isa_count(); isa++)
            for (int in_place = 0; in_place < 2; in_place++) {
                if (in_place) memcpy(out.get(), x.get(), sizeof(float) * rows * columns);
                const float* from = in_place ? out.get() : x.get();
                edgerazor_rotate(isa, from, rows, columns, block, bits.get(), back, out.get());
                checks++;
                if (memcmp(out.get(), expected.data(), sizeof(float) * rows * columns) == 0) continue;
                wrong++;
                printf("%s: rotation of %d columns in blocks of %d, back %d, in place %d\n", edgerazor_isa_name(isa),
                       columns, block, back, in_place);
            }
    }
}

double nearest_half(float x) {
    if (x <= 0) return 0;
    const double bounded = x < 65504.0f ? x : 65504.0f;
    const double step = ldexp(1, (ilogb(bounded) > -14 ? ilogb(bounded) : -14) - 10);
    return nearbyint(bounded / step) * step;
}

// The scale of least squared error of a group by its definition in `formats`, with sums of integers.
double least_error_scale(const edgerazor_scale_search& search, const float* w, int size) {
    float largest = 0;
    for (int i = 0; i < size; i++) largest = fmaxf(largest, fabsf(w[i]));
    if (largest < ldexpf(1, -26)) return 0;
    const float unit = largest / 8192.0f, units = 8192.0f / largest;
    double square = 0, products = 0, squares = 1;
    std::vector<float> whole(size);
    for (int i = 0; i < size; i++) {
        whole[i] = nearbyintf(w[i] * units);
        square += whole[i] * whole[i];
    }
    const auto attempt = [&](float ideal) {
        const float scale = (float)nearest_half(ideal);
        if (scale == 0) return;
        const float factor = unit / scale;
        int64_t wl = 0, ll = 0; // of doubled levels
        for (int i = 0; i < size; i++) {
            const float ratio = fminf(fmaxf(whole[i] * factor, search.min_code), search.max_code);
            const int64_t level = search.mid_rise ? 2 * (int64_t)floorf(ratio) + 1 : 2 * (int64_t)nearbyintf(ratio);
            wl += level * (int64_t)whole[i];
            ll += level * level;
        }
        const double p = 0.5 * (double)wl, s = 0.25 * (double)ll;
        if (!(p * p * squares > products * products * s)) return;
        products = p;
        squares = s;
    };
    const float rms = (float)sqrt(square / size) * search.rms_factor;
    const float base = search.absmax_units > 0 ? fminf(rms, search.absmax_units) : rms;
    for (int i = 0; i < search.count; i++) attempt(base * search.ratios[i] * unit);
    if (search.absmax_units > 0) attempt(unit * search.absmax_units);
    for (int i = 0; i < search.refinements; i++) attempt((float)(products / squares) * unit);
    return nearest_half((float)(products / squares) * unit);
}

double half_to_double(uint16_t half) {
    const int exponent = half >> 10 & 31, fraction = half & 1023;
    return exponent == 0 ? ldexp(fraction, -24) : ldexp(1024 + fraction, exponent - 25);
}

int nearest_code(const edgerazor_scale_search& search, float w, float scale) {
    if (scale == 0) return 0;
    const float ratio = fminf(fmaxf(w / scale, search.min_code), search.max_code);
    return (int)(search.mid_rise ? floorf(ratio) : nearbyintf(ratio));
}

// Scales of least squared error of groups of `size` weights of all magnitudes.
void check_scales(int size) {
    constexpr int kGroups = 12;
    const float ratios[] = {0.5f, 0.62f, 0.77f, 0.95f, 1.2f};
    const edgerazor_scale_search searches[] = {
        {ratios, 4, 2, 2.0f, 0, -1, 1, 0},
        {ratios, 5, 1, 1.0f, 0, -2, 1, 1},
        {ratios, 5, 1, 1.0f, 8192 / 7.0f, -8, 7, 0},
        {ratios, 1, 0, 1.0f, 0, -2, 1, 0},
        {ratios, 5, 1, 0.1f, 8192 / 127.0f, -128, 127, 0},
    };
    auto w = memory<float>((int64_t)kGroups * size);
    auto scales = memory<uint16_t>(kGroups);
    auto codes = memory<int8_t>((int64_t)kGroups * size);
    for (int group = 0; group < kGroups; group++) {
        const float magnitude = ldexpf(1, group == 0 ? 120 : group == 1 ? -150 : (int)(draw() % 45) - 28);
        for (int i = 0; i < size; i++)
            w[group * size + i] = draw() % 8 == 0 ? 0 : (float)(int32_t)draw() * 2e-9f * magnitude;
    }
    for (const edgerazor_scale_search& search : searches)
        for (int isa = 0; isa < edgerazor_isa_count(); isa++) {
            if (edgerazor_least_error(isa, &search, w.get(), kGroups, size, scales.get(), codes.get()) != -1) wrong++;
            for (int i = 0; i < kGroups * size; i++, checks++)
                if (codes[i] != nearest_code(search, w[i], (float)half_to_double(scales[i / size]))) wrong++;
            for (int group = 0; group < kGroups; group++) {
                const double expected = least_error_scale(search, w.get() + group * size, size);
                checks++;
                if (half_to_double(scales[group]) == expected) continue;
                wrong++;
                printf("%s: scale of %d weights: %g, not %g\n", edgerazor_isa_name(isa), size,
                       half_to_double(scales[group]), expected);
            }
        }
    w[5 * size + size / 2] = NAN;
    w[7 * size] = INFINITY;
    for (int isa = 0; isa < edgerazor_isa_count(); isa++)
        if (edgerazor_least_error(isa, searches, w.get(), kGroups, size, scales.get(), nullptr) != 5) wrong++;
}

// Weights rounded with given scales, and the gradients of both, by the definition in `formats`; groups of 64 and a rest.
void check_fake_quantize(int columns) {
    constexpr int kRows = 5, kGroup = 64;
    const int groups = (columns + kGroup - 1) / kGroup;
    const int64_t numbers[] = {4, 0, 2};
    const edgerazor_code_range ranges[] = {{-1, 1, 0}, {-2, 1, 1}, {-8, 7, 0}, {-128, 127, 0}};
    auto w = memory<float>((int64_t)kRows * columns), gradient = memory<float>((int64_t)kRows * columns);
    auto rounded = memory<float>((int64_t)kRows * columns), to_w = memory<float>((int64_t)kRows * columns);
    auto half = memory<uint16_t>((int64_t)kRows * columns);
    auto scales = memory<float>((int64_t)kRows * groups), to_scales = memory<float>((int64_t)kRows * groups);
    for (int i = 0; i < kRows * columns; i++) {
        w[i] = (float)(int32_t)draw() * 1e-9f;
        gradient[i] = (float)(int32_t)draw() * 1e-9f;
    }
    for (int i = 0; i < kRows * groups; i++) scales[i] = (float)nearest_half((float)(1 + draw() % 1000) * 1e-3f);
    const edgerazor_weight_rows rows = {w.get(), scales.get(), numbers, 3, columns, kGroup};
    for (const edgerazor_code_range& range : ranges)
        for (int isa = 0; isa < edgerazor_isa_count(); isa++) {
            if (edgerazor_round_weights(isa, &range, &rows, 0, rounded.get()) != -1) wrong++;
            if (edgerazor_round_weights(isa, &range, &rows, 1, half.get()) != -1) wrong++;
            edgerazor_learned_gradients(isa, &range, &rows, gradient.get(), to_w.get(), to_scales.get());
            const float top = range.max_code + (range.mid_rise ? 0.5f : 0.0f);
            for (int64_t row : numbers)
                for (int group = 0; group < groups; group++) {
                    const int size = columns - group * kGroup < kGroup ? columns - group * kGroup : kGroup;
                    double sum = 0, magnitudes = 0;
                    for (int k = 0; k < size; k++, checks++) {
                        const int64_t i = row * columns + group * kGroup + k;
                        const float scale = scales[row * groups + group], ratio = w[i] / scale;
                        const float bounded = fminf(fmaxf(ratio, range.min_code), range.max_code);
                        const float level = range.mid_rise ? floorf(bounded) + 0.5f : nearbyintf(bounded);
                        const bool inside = ratio > range.min_code && ratio < 2 * top - range.max_code;
                        sum += (double)gradient[i] * (double)(level - (inside ? ratio : 0.0f));
                        magnitudes += fabs((double)gradient[i] * (double)(level - (inside ? ratio : 0.0f)));
                        const double expected = (double)(level * scale);
                        const uint32_t bits = (uint32_t)half[i] << 16;
                        float widened;
                        memcpy(&widened, &bits, 4);
                        if (rounded[i] != level * scale || to_w[i] != (inside ? gradient[i] : 0.0f)) wrong++;
                        if (fabs((double)widened - expected) > fabs(expected) / 256) wrong++;
                    }
                    const double factor = sqrt((double)size * top);
                    if (fabs(to_scales[row * groups + group] * factor - sum) > 1e-5 * magnitudes) wrong++;
                }
        }
    w[2 * columns + columns - 1] = NAN;
    for (int isa = 0; isa < edgerazor_isa_count(); isa++)
        if (edgerazor_round_weights(isa, ranges, &rows, 0, rounded.get()) != 2) wrong++;
}

} // namespace

int main() {
    const int columns[] = {1, 3, 31, 33, 127, 172, 256, 960, 1300}, groups[] = {32, 33, 64, 100, 128, 256, 512, 5000};
    const int min_level_x2[] = {-2, -1, -3, -8, -16, -32, -64, -128, -256};
    for (int bits = 0; bits <= 8; bits++)
        for (int c : columns)
            for (int g : groups)
                check({c, g, draw() % 2 ? g : groups[draw() % 8], (int)(1 + draw() % 70), (int)(1 + draw() % 9), bits,
                       min_level_x2[bits], (int)(2 + draw() % 7)});
    for (int tokens = 2; tokens <= 33; tokens++) // as many as are multiplied together, and one more
        for (int c : {320, 576, 960})
            for (int g : {64, 128, 256}) check({c, g, g, 35, tokens, 0, -2, 8});
    for (int bits : {0, 2, 3, 4})
        for (int c : columns)
            for (int g : groups) check_any_bytes(c, g, bits, min_level_x2[bits]);
    for (int count : {1, 7, 16, 33, 128, 1000}) check_vectors(count);
    for (int block = 2; block <= 512; block *= 2)
        for (int blocks : {1, 2, 3, 9}) check_rotation(blocks * block, block);
    for (int size : {1, 3, 16, 31, 33, 127, 256, 257, 960, 5000}) check_scales(size);
    for (int columns : {1, 16, 33, 64, 100, 576}) check_fake_quantize(columns);
    for (int bits : {4, 8, 16})
        for (int head_dim : {1, 5, 31, 64, 80, 128}) {
            check_attention({bits, head_dim, 1, 1, {0, 0}, {0, 1}, 0});
            check_attention({bits, head_dim, 2, 1, {0, 0}, {240, 300}, 0});
            check_attention({bits, head_dim, 3, 9, {512, 70}, {16, 60}, 0});
            check_attention({bits, head_dim, 7, 20, {0, 17}, {256, 20}, 0});
            check_attention({bits, head_dim, 1, 33, {0, 0}, {0, 270}, 40});
        }
    for (int isa = 0; isa < edgerazor_isa_count(); isa++) printf("%s ", edgerazor_isa_name(isa));
    printf(": %d checks, %d wrong\n", checks, wrong);
    return wrong != 0;
}
