// Quantizing keys and values into slots of the KV cache. Included by `float_kernels.cpp`, once for each instruction
// set.
#pragma once
#include <stdint.h>
#include <string.h>

#include "kv_page.hpp"
#include "rounding.hpp"
#include "vector_math.hpp"

namespace {

using namespace edgerazor;

// Quantizes a key or value by the rules of `formats.fake_quantize_kv` and calls keep(first feature, count, codes) for
// some features at a time. Returns false where a number is not finite.
template <class Keep>
EDGERAZOR_INLINE bool quantize_kv(const float* x, int head_dim, int bits, float& scale, Keep&& keep) {
    constexpr int kStep = 256;
    const int max_code = (1 << (bits - 1)) - 1;
    const uint32_t magnitude = largest_magnitude(x, head_dim);
    if (magnitude >= kInfinityBits) return false;
    const float exact = float_of(magnitude) / (float)max_code;
    scale = round_to_f16(exact < 65504.0f ? exact : 65504.0f);
    int8_t codes[kStep + 1] = {};
    for (int first = 0; first < head_dim; first += kStep) {
        const int count = (int)smaller(kStep, head_dim - first);
        if (scale > 0) round_ratios(x + first, count, scale, max_code, codes);
        codes[count] = 0; // fills the byte of the last feature of an odd head_dim
        keep(first, count, codes);
    }
    return true;
}

uint8_t pack_nibbles(const int8_t* codes) { return (uint8_t)((codes[0] + 8) | (codes[1] + 8) << 4); }

bool store_kv_f32(const KvPage& page, int slot, int head_dim, const float* key, const float* value) {
    if (largest_magnitude(key, head_dim) >= kInfinityBits || largest_magnitude(value, head_dim) >= kInfinityBits)
        return false;
    float* keys = (float*)page.keys + (int64_t)(slot / kKeyLanes) * head_dim * kKeyLanes + slot % kKeyLanes;
    for (int i = 0; i < head_dim; i++) keys[i * kKeyLanes] = key[i];
    memcpy((float*)page.values + (int64_t)slot * head_dim, value, sizeof(float) * head_dim);
    return true;
}

bool store_kv(const KvPage& page, int slot, int bits, int head_dim, const float* key, const float* value) {
    if (bits == 16) return store_kv_f32(page, slot, head_dim, key, value);
    const int64_t bytes = kv_vector_bytes(bits, head_dim);
    uint8_t* keys = (uint8_t*)page.keys + slot / kKeyLanes * bytes * kKeyLanes + slot % kKeyLanes;
    uint8_t* values = (uint8_t*)page.values + slot * bytes;
    const auto keep = [bits](uint8_t* at, int step) {
        return [=](int first, int count, const int8_t* codes) {
            if (bits == 8)
                for (int i = 0; i < count; i++) at[(first + i) * step] = (uint8_t)codes[i];
            else
                for (int i = 0; i < count; i += 2) at[(first + i) / 2 * step] = pack_nibbles(codes + i);
        };
    };
    return quantize_kv(key, head_dim, bits, page.key_scales[slot], keep(keys, kKeyLanes)) &&
           quantize_kv(value, head_dim, bits, page.value_scales[slot], keep(values, 1));
}

} // namespace
