// What the self-tests share: numbers that look random, and memory without room to spare.
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

// Exactly as long as it has to be, so that a sanitizer sees a step too far.
template <class T>
std::unique_ptr<T[], Free> memory(int64_t count) {
    void* found = nullptr;
    if (posix_memalign(&found, 64, count * sizeof(T)) != 0) abort();
    return std::unique_ptr<T[], Free>((T*)found);
}

} // namespace
