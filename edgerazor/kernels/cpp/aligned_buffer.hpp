// Memory of the decoder: aligned to cache lines, and in huge pages of 2 MB where it is large and the system has them.
#pragma once
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <new>

namespace edgerazor {

// Zeroed memory, aligned to 64 bytes or, from 2 MB on, to a huge page. The constructor throws std::bad_alloc.
class AlignedMemory {
  public:
    explicit AlignedMemory(size_t bytes = 0) : bytes_(bytes) {
        constexpr size_t huge_page = 2u << 20;
        const size_t alignment = bytes >= huge_page ? huge_page : 64;
        const size_t rounded = (bytes + alignment - 1) / alignment * alignment;
        if (bytes == 0) return;
        if (posix_memalign(&start_, alignment, rounded) != 0) throw std::bad_alloc();
#if defined(__linux__) && defined(MADV_HUGEPAGE)
        if (alignment == huge_page) madvise(start_, rounded, MADV_HUGEPAGE);
#endif
        memset(start_, 0, rounded);
    }

    AlignedMemory(AlignedMemory&& other) noexcept : start_(other.start_), bytes_(other.bytes_) {
        other.start_ = nullptr;
    }

    AlignedMemory& operator=(AlignedMemory&& other) noexcept {
        void* start = start_;
        start_ = other.start_;
        other.start_ = start; // the other one's destructor frees it
        bytes_ = other.bytes_;
        return *this;
    }

    ~AlignedMemory() { free(start_); }

    size_t bytes() const { return bytes_; }

    template <class T>
    T* as(size_t offset = 0) const {
        return (T*)((char*)start_ + offset);
    }

  private:
    void* start_ = nullptr;
    size_t bytes_;
};

// An array that only grows. Growing discards its contents.
template <class T>
class GrowBuffer {
  public:
    T* reserve(int64_t count) {
        if (memory_.bytes() < (size_t)count * sizeof(T)) memory_ = AlignedMemory((size_t)count * sizeof(T));
        return memory_.template as<T>();
    }

    T* get() const { return memory_.template as<T>(); }

  private:
    AlignedMemory memory_;
};

} // namespace edgerazor
