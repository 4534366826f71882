// How keys and values lie in the KV cache: a slot holds the key and the value of one token, and slots are kept in
// pages.
#pragma once
#include <stdint.h>

namespace edgerazor {

constexpr int kPageSlots = 256; // KV slots of a page
constexpr int kTablePageSlots = 64; // KV slots of a page of a sequence's page table: blocks of attention never cross two
constexpr int kKeyLanes = 16;   // keys that lie side by side, so that a vector instruction takes one feature of all

// The keys and values of one KV head in a page, by the bits of the cache:
//   8:  keys int8 [kPageSlots / 16, head_dim, 16], values int8 [kPageSlots, head_dim]; codes -127 to 127
//   4:  keys uint8 [kPageSlots / 16, head_dim / 2, 16], values uint8 [kPageSlots, head_dim / 2]; code + 8, 1 to 15,
//       with feature 2 i in the low and 2 i + 1 in the high nibble (an odd head_dim is rounded up, its last nibble is 8)
//   16: keys float [kPageSlots / 16, head_dim, 16], values float [kPageSlots, head_dim]; no scales
// Scales are those of `formats.fake_quantize_kv`: one for each key and each value, rounded to fp16 and stored as
// floats.
struct KvPage {
    void* keys;
    void* values;
    float* key_scales;   // [kPageSlots]
    float* value_scales; // [kPageSlots]
};

// Bytes of the codes of one key; those of one value are as many.
constexpr int64_t kv_vector_bytes(int bits, int head_dim) {
    return bits == 16 ? 4 * (int64_t)head_dim : bits == 8 ? head_dim : (head_dim + 1) / 2;
}

// The KV slots of a sequence: consecutive ones, the first of which has a number that is a multiple of 16, or those of
// the pages of a page table.
struct SlotRange {
    int64_t slot, count;
    const int32_t* pages; // of kTablePageSlots slots each, by number; null: the slots are consecutive
};

// The number of the slot of the sequence's token `index`.
constexpr int64_t slot_at(int64_t slot, const int32_t* pages, int64_t index) {
    return pages == nullptr ? slot + index
                            : (int64_t)pages[index / kTablePageSlots] * kTablePageSlots + index % kTablePageSlots;
}

} // namespace edgerazor
