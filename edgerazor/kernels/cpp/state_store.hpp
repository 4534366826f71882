// What mixers other than attention know of the earlier tokens of sequences: a state slot holds that of all layers.
#pragma once
#include <stdint.h>
#include <string.h>

#include <vector>

#include "aligned_buffer.hpp"

namespace edgerazor {

class StateStore {
  public:
    // Room for so many floats in every slot; before the first slot is reserved. Returns where they begin.
    int64_t add(int64_t floats) {
        const int64_t begin = floats_;
        floats_ += (floats + 15) / 16 * 16;
        return begin;
    }

    // Adds slots until there are so many. Throws std::bad_alloc; those that there are stay.
    void reserve(int64_t count) {
        memory_.reserve(count);
        while ((int64_t)memory_.size() < count) memory_.emplace_back(sizeof(float) * floats_);
    }

    void copy(int64_t from, int64_t to) {
        if (from == to || floats_ == 0) return; // slots of nothing have no memory
        memcpy(memory_[to].as<float>(), memory_[from].as<float>(), sizeof(float) * floats_);
    }

    // A part of a slot; null for slot -1.
    float* at(int64_t slot, int64_t begin) const { return slot < 0 ? nullptr : memory_[slot].as<float>() + begin; }

    int64_t slot_bytes() const { return (int64_t)sizeof(float) * floats_; }

  private:
    int64_t floats_ = 0;
    std::vector<AlignedMemory> memory_;
};

} // namespace edgerazor
