// Loops that the compiler has to write out, so that what they index can live in registers; and those that it must not.
#pragma once
#include "kernels.hpp"

namespace {

template <int N>
struct Constant {
    static constexpr int value = N;
};

// function(Constant<begin>), ..., function(Constant<end - 1>).
template <int begin, int end, class Function>
EDGERAZOR_INLINE void unroll(Function&& function) {
    if constexpr (begin < end) {
        function(Constant<begin>{});
        unroll<begin + 1, end>(function);
    }
}

} // namespace

// In front of a loop that the compiler must leave one.
#if defined(__clang__)
#define EDGERAZOR_ROLLED _Pragma("clang loop unroll(disable)")
#else
#define EDGERAZOR_ROLLED _Pragma("GCC unroll 1")
#endif

// The function of `unroll`, with the name of its Constant.
#define UNROLL(name) [&](auto name) __attribute__((always_inline))
