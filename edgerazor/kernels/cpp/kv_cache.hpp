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
    KvCache(int layers, int kv_heads, int head_dim, int bits)
        : kv_heads_(kv_heads), head_dim_(head_dim), bits_(bits), pages_((size_t)layers * kv_heads) {}

    // Adds pages until there are so many slots. Throws std::bad_alloc; the slots that there are stay.
    void reserve(int64_t slots) {
        while ((int64_t)memory_.size() * kPageSlots < slots) {
            const size_t codes = round_up_to_line(kPageSlots * kv_vector_bytes(bits_, head_dim_));
            const size_t scales = kPageSlots * sizeof(float), head_bytes = 2 * (codes + scales);
            for (std::vector<KvPage>& pages : pages_) pages.reserve(memory_.size() + 1);
            memory_.reserve(memory_.size() + 1);
            AlignedMemory memory(head_bytes * pages_.size());
            for (size_t i = 0; i < pages_.size(); i++) {
                const size_t at = i * head_bytes;
                pages_[i].push_back({memory.as<void>(at), memory.as<void>(at + codes),
                                     memory.as<float>(at + 2 * codes), memory.as<float>(at + 2 * codes + scales)});
            }
            bytes_ += (int64_t)(head_bytes * pages_.size());
            memory_.push_back(std::move(memory));
        }
    }

    // Copies what the slots of a page of a page table hold to another one, of all layers and heads.
    void copy_page(int64_t from, int64_t to) {
        constexpr int64_t ratio = kPageSlots / kTablePageSlots;
        static_assert(kPageSlots % kTablePageSlots == 0 && kTablePageSlots % kKeyLanes == 0, "");
        const size_t vector_bytes = (size_t)kv_vector_bytes(bits_, head_dim_);
        for (const std::vector<KvPage>& pages : pages_) {
            const KvPage &source = pages[from / ratio], &target = pages[to / ratio];
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

    // The pages of a KV head of a layer, by number.
    const KvPage* pages(int layer, int kv_head) const { return pages_[(size_t)layer * kv_heads_ + kv_head].data(); }

    int64_t bytes() const { return bytes_; }

  private:
    static size_t round_up_to_line(int64_t bytes) { return (size_t)(bytes + 63) / 64 * 64; }

    const int kv_heads_, head_dim_, bits_;
    int64_t bytes_ = 0;
    std::vector<std::vector<KvPage>> pages_; // [layers * KV heads][pages]
    std::vector<AlignedMemory> memory_;      // one for each page number, for all layers and heads
};

} // namespace edgerazor
