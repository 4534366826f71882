// The attention of a layer: from the outputs of the q, k and v projections to the input of the output projection.
#include <string.h>

#include <algorithm>
#include <cmath>

#include "decoder.hpp"

using namespace edgerazor;

// Where the products of q, k and v lie: in buffers of their own, or beside each other.
Products edgerazor_decoder::queries(const Layer& layer) const {
    if (layer.fused_qkv || layer.gated_queries) return {mixed.get(), layer.rows(0)};
    return {q.get(), layer.q_width()};
}

Products edgerazor_decoder::keys(const Layer& layer) const {
    return layer.fused_qkv ? Products{mixed.get() + layer.q_width(), layer.rows(0)}
                           : Products{k.get(), layer.kv_width()};
}

Products edgerazor_decoder::values(const Layer& layer) const {
    if (layer.fused_qkv) return {mixed.get() + layer.q_width() + layer.kv_width(), layer.rows(0)};
    return {layer.rows(2) > 0 ? v.get() : k.get(), layer.kv_width()};
}

// What attention gives for a token, times the sigmoid of its gate.
void edgerazor_decoder::gate_attention(const Layer& layer, int64_t token, float* attended_row) const {
    const int64_t dim = layer.head_dim;
    if (layer.gated_queries) { // each head's gate lies behind its query
        const float* head = queries(layer).of(token);
        for (int h = 0; h < layer.num_heads; h++)
            math.sigmoid_gate(head + (2 * h + 1) * dim, (int)dim, attended_row + h * dim);
        return;
    }
    const float* gate_row = gates.get() + token * layer.rows(3);
    if (layer.rows(3) == layer.q_width()) return math.sigmoid_gate(gate_row, (int)layer.q_width(), attended_row);
    for (int h = 0; h < layer.num_heads; h++) {
        const float factor = 1.0f / (1.0f + std::exp(-gate_row[h]));
        for (int64_t i = 0; i < dim; i++) attended_row[h * dim + i] *= factor;
    }
}

int64_t edgerazor_decoder::position_of(int64_t token) const {
    const SpanChunk& chunk = *chunk_of_token[token];
    return chunk.first_position() + token - chunk.token;
}

// A head of q or k, in its place or from another one.
void edgerazor_decoder::norm_and_rope(const Layer& layer, const edgerazor_norm& norm, int64_t position,
                                      const float* from, float* head) const {
    const int64_t dim = layer.head_dim;
    const int64_t rope_row = (position * model.rope_tables + layer.rope_table) * (model.rope_dim / 2);
    if (!model.norm_all_heads && !model.norm_after_rope)
        apply_norm(norm, from, dim, head);
    else if (from != head)
        memcpy(head, from, dim * sizeof(float));
    if (layer.rope_dim > 0) math.rope(head, layer.rope_dim, cosines + rope_row, sines + rope_row);
    if (!model.norm_all_heads && model.norm_after_rope) apply_norm(norm, head, dim, head);
}

// For one token, heads of q: their norms, RoPE, and factors.
void edgerazor_decoder::q_norm_rope(const Layer& layer, int64_t token, const QueryHeads& heads) {
    const int64_t position = position_of(token), dim = layer.head_dim;
    for (int i = heads.first; i < heads.last; i++) {
        const int64_t index = (int64_t)heads.kv_head * layer.queries_per_kv() + i;
        float* head = q.get() + token * layer.q_width() + index * dim;
        norm_and_rope(layer, layer.q_norm, position, queries(layer).of(token) + index * (layer.gated_queries ? 2 : 1) * dim,
                      head);
        if (query_scales != nullptr)
            for (int64_t j = 0; j < dim; j++) head[j] *= query_scales[position];
    }
}

// For one token, a head of k and v: their norms, RoPE, and storing the key and the value in the token's KV slot.
void edgerazor_decoder::k_norm_rope_store(const Layer& layer, int64_t token, int kv_head) {
    const SpanChunk& chunk = *chunk_of_token[token];
    const int64_t kv_slot = slot_at(chunk.slot, chunk.pages, chunk.past_length + token - chunk.token);
    const int64_t dim = layer.head_dim, at = token * layer.kv_width() + kv_head * dim;
    const float* value = values(layer).of(token) + kv_head * dim;
    if (layer.v_norm.kind != EDGERAZOR_NO_NORM || value == k.get() + at) { // before the key, which may lie in its place
        apply_norm(layer.v_norm, value, dim, v.get() + at);
        value = v.get() + at;
    }
    float* key = k.get() + at;
    norm_and_rope(layer, layer.k_norm, position_of(token), keys(layer).of(token) + kv_head * dim, key);
    const KvPage& page = kv_cache.pages(layer.kv_head + kv_head)[kv_slot / kPageSlots];
    if (!math.store_kv(page, (int)(kv_slot % kPageSlots), model.kv_bits, layer.head_dim, key, value))
        finite.store(false, std::memory_order_relaxed);
}

void edgerazor_decoder::attention_tile(const ThreadContext& context, const Layer& layer, const AttentionTile& tile,
                                       const AttentionTile* next) {
    const auto& [chunk, first, count] = tile.tokens;
    AttentionArgs args;
    args.bits = model.kv_bits;
    args.head_dim = layer.head_dim;
    args.scale = model.attention_scale;
    args.soft_cap = model.attention_soft_cap;
    args.pages = kv_cache.pages(layer.kv_head + tile.heads.kv_head);
    const int64_t head = (int64_t)tile.heads.kv_head * layer.queries_per_kv() + tile.heads.first;
    const int64_t at = (chunk->token + first) * layer.q_width() + head * layer.head_dim;
    args.queries = q.get() + at;
    args.query_stride = args.out_stride = layer.q_width();
    args.heads = tile.heads.last - tile.heads.first;
    args.tokens = (int)count;
    args.ranges[0] = chunk->prefix;
    args.ranges[1] = {chunk->slot, chunk->past_length + first + count, chunk->pages};
    args.sliding_window = layer.sliding_window;
    args.out = attended.get() + at;
    args.scratch = scratch[context.thread].get();
    args.next_keys = args.next_values = nullptr;
    if (next != nullptr) {
        const SpanChunk& of_next = *next->tokens.chunk;
        const SlotRange& begin = of_next.prefix.count > 0 ? of_next.prefix : SlotRange{of_next.slot, 0, of_next.pages};
        const int64_t slot = slot_at(begin.slot, begin.pages, 0);
        const int64_t before = slot % kPageSlots * kv_vector_bytes(model.kv_bits, layer.head_dim);
        const KvPage& page = kv_cache.pages(layer.kv_head + next->heads.kv_head)[slot / kPageSlots];
        args.next_keys = (const char*)page.keys + before;
        args.next_values = (const char*)page.values + before;
    }
    math.attention(args);
}

void edgerazor_decoder::attention(const ThreadContext& context, const Layer& layer) {
    const int kv_heads = layer.num_kv_heads, queries = layer.queries_per_kv();
    if (model.norm_all_heads && layer.q_norm.kind != EDGERAZOR_NO_NORM) {
        const WorkRange range(context.tokens, context.thread, threads.count());
        const int64_t q_size = layer.q_width(), kv_size = layer.kv_width();
        for (int64_t t = range.first; t < range.last; t++) {
            apply_norm(layer.q_norm, q.get() + t * q_size, q_size, q.get() + t * q_size);
            if (layer.owns_kv) apply_norm(layer.k_norm, k.get() + t * kv_size, kv_size, k.get() + t * kv_size);
        }
        threads.barrier();
    }
    if (!context.shared) { // decode: where threads have whole KV heads, nobody waits between storing and attention
        if (layer.owns_kv) {
            const WorkRange stored(kv_heads, context.thread, threads.count());
            for (int64_t h = stored.first; h < stored.last; h++) k_norm_rope_store(layer, 0, (int)h);
            if (layer.decode_parts > 1) threads.barrier();
        }
        const WorkRange range(kv_heads * layer.decode_parts, context.thread, threads.count());
        const int size = queries / layer.decode_parts;
        const auto tile_of = [&](int64_t i) {
            const int first = (int)(i % layer.decode_parts) * size;
            return AttentionTile{{&chunks[0], 0, 1}, {(int)(i / layer.decode_parts), first, first + size}};
        };
        for (int64_t i = range.first; i < range.last; i++) {
            const AttentionTile tile = tile_of(i), next = tile_of(i + 1);
            q_norm_rope(layer, 0, tile.heads);
            attention_tile(context, layer, tile, i + 1 < range.last ? &next : nullptr);
        }
        threads.barrier();
        return;
    }
    if (context.thread == 0) next_tile.store(0, std::memory_order_relaxed);
    for (int64_t t = context.first; t < context.last; t++)
        for (int h = 0; h < kv_heads; h++) {
            q_norm_rope(layer, t, {h, 0, queries});
            if (layer.owns_kv) k_norm_rope_store(layer, t, h);
        }
    threads.barrier(); // every key and value is in the KV cache
    const int64_t count = (int64_t)tiles.size() * kv_heads;
    const int64_t together = std::min(kTilesTogether, std::max<int64_t>(1, count / (8 * threads.count())));
    const auto tile_of = [&](int64_t i) {
        return AttentionTile{tiles[i / kv_heads], {(int)(i % kv_heads), 0, queries}};
    };
    for (int64_t i; (i = next_tile.fetch_add(together, std::memory_order_relaxed)) < count;)
        for (const int64_t last = std::min(i + together, count); i < last; i++) {
            const AttentionTile tile = tile_of(i), next = tile_of(i + 1 < last ? i + 1 : i);
            attention_tile(context, layer, tile, i + 1 < last ? &next : nullptr);
        }
    threads.barrier();
}

// The tiles that see the most slots come first, so that no thread begins a long one when the others are done.
void edgerazor_decoder::plan_attention_tiles() {
    tiles.clear();
    for (const SpanChunk& chunk : chunks)
        for (int64_t first = 0; first < chunk.count; first += kAttentionTileTokens)
            tiles.push_back({&chunk, first, std::min(kAttentionTileTokens, chunk.count - first)});
    const auto work = [](const TokenTile& tile) {
        return tile.count * (tile.chunk->first_position() + tile.first + tile.count);
    };
    std::stable_sort(tiles.begin(), tiles.end(),
                     [&](const TokenTile& a, const TokenTile& b) { return work(a) > work(b); });
}
