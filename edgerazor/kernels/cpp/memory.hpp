// Memory of a decoder: aligned to cache lines, in pages of 2 MB where it is large and the system has them.
#pragma once
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <new>

namespace edgerazor {

// Zeroed; throws std::bad_alloc.
class Memory {
  public:
    explicit Memory(size_t bytes = 0) : bytes_(bytes) {
        constexpr size_t huge = 2u << 20;
        const size_t alignment = bytes >= huge ? huge : 64, whole = (bytes + alignment - 1) / alignment * alignment;
        if (bytes == 0) return;
        if (posix_memalign(&start_, alignment, whole) != 0) throw std::bad_alloc();
#if defined(__linux__) && defined(MADV_HUGEPAGE)
        if (alignment == huge) madvise(start_, whole, MADV_HUGEPAGE);
#endif
        memset(start_, 0, whole);
    }

    Memory(Memory&& other) noexcept : start_(other.start_), bytes_(other.bytes_) { other.start_ = nullptr; }

    Memory& operator=(Memory&& other) noexcept {
        void* start = start_;
        start_ = other.start_;
        other.start_ = start;
        bytes_ = other.bytes_;
        return *this;
    }

    ~Memory() { free(start_); }

    size_t bytes() const { return bytes_; }

    template <class T>
    T* as(size_t offset = 0) const {
        return (T*)((char*)start_ + offset);
    }

  private:
    void* start_ = nullptr;
    size_t bytes_;
};

// An array that only grows, and forgets what was in it then.
template <class T>
class Buffer {
  public:
    T* reserve(int64_t count) {
        if (memory_.bytes() < (size_t)count * sizeof(T)) memory_ = Memory((size_t)count * sizeof(T));
        return memory_.template as<T>();
    }

    T* get() const { return memory_.template as<T>(); }

  private:
    Memory memory_;
};

} // namespace edgerazor
