// Helpers of the self-tests: pseudorandom numbers, and memory without room to spare.
#pragma once
#include <stdint.h>
#include <stdlib.h>

#include <memory>

namespace {

uint64_t state = 88172645463325252u;

uint32_t draw() {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return (uint32_t)(state >> 32);
}

struct Free {
    void operator()(void* memory) const { free(memory); }
};

// Exactly as long as needed, so that a sanitizer sees an access beyond it.
template <class T>
std::unique_ptr<T[], Free> memory(int64_t count) {
    void* allocated = nullptr;
    if (posix_memalign(&allocated, 64, count * sizeof(T)) != 0) abort();
    return std::unique_ptr<T[], Free>((T*)allocated);
}

} // namespace
