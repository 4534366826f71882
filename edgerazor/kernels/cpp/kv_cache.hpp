// The KV cache of a decoder: keys and values of all layers, in pages of kPageSlots slots (kv_page.hpp has their
// layout).
#pragma once
#include <stdint.h>
#include <string.h>

#include <utility>
#include <vector>

#include "aligned_buffer.hpp"
#include "kv_page.hpp"

namespace edgerazor {

class KvCache {
  public:
    explicit KvCache(int bits) : bits_(bits) {}

    // Room for some KV heads in every slot; before the first slot is reserved. Returns the number of the first one.
    int add(int kv_heads, int head_dim) {
        const int first = (int)heads_.size();
        heads_.resize(first + kv_heads, {head_dim, {}});
        return first;
    }

    // Adds pages until there are so many slots. Throws std::bad_alloc; the slots that there are stay.
    void reserve(int64_t slots) {
        while ((int64_t)memory_.size() * kPageSlots < slots) {
            const size_t scales = kPageSlots * sizeof(float);
            const auto codes_of = [&](const Head& head) {
                return round_up_to_line(kPageSlots * kv_vector_bytes(bits_, head.dim));
            };
            size_t bytes = 0, at = 0;
            for (Head& head : heads_) {
                head.pages.reserve(memory_.size() + 1);
                bytes += 2 * (codes_of(head) + scales);
            }
            memory_.reserve(memory_.size() + 1);
            AlignedMemory memory(bytes);
            for (Head& head : heads_) {
                const size_t codes = codes_of(head);
                head.pages.push_back({memory.as<void>(at), memory.as<void>(at + codes),
                                      memory.as<float>(at + 2 * codes), memory.as<float>(at + 2 * codes + scales)});
                at += 2 * (codes + scales);
            }
            bytes_ += (int64_t)bytes;
            memory_.push_back(std::move(memory));
        }
    }

    // Copies what the slots of a page of a page table hold to another one, of all layers and heads.
    void copy_page(int64_t from, int64_t to) {
        constexpr int64_t ratio = kPageSlots / kTablePageSlots;
        static_assert(kPageSlots % kTablePageSlots == 0 && kTablePageSlots % kKeyLanes == 0, "");
        for (const Head& head : heads_) {
            const size_t vector_bytes = (size_t)kv_vector_bytes(bits_, head.dim);
            const KvPage &source = head.pages[from / ratio], &target = head.pages[to / ratio];
            const size_t first = from % ratio * kTablePageSlots, to_first = to % ratio * kTablePageSlots;
            const auto copy = [&](void* out, const void* in, size_t slot_bytes) {
                memcpy((char*)out + to_first * slot_bytes, (const char*)in + first * slot_bytes,
                       kTablePageSlots * slot_bytes);
            };
            copy(target.keys, source.keys, vector_bytes);
            copy(target.values, source.values, vector_bytes);
            copy(target.key_scales, source.key_scales, sizeof(float));
            copy(target.value_scales, source.value_scales, sizeof(float));
        }
    }

    // The pages of a KV head, by number.
    const KvPage* pages(int head) const { return heads_[head].pages.data(); }

    int64_t bytes() const { return bytes_; }

  private:
    struct Head {
        int dim;
        std::vector<KvPage> pages;
    };

    static size_t round_up_to_line(int64_t bytes) { return (size_t)(bytes + 63) / 64 * 64; }

    const int bits_;
    int64_t bytes_ = 0;
    std::vector<Head> heads_;           // of all layers that have keys and values of their own
    std::vector<AlignedMemory> memory_; // one for each page number, for all heads
};

} // namespace edgerazor
