// Loops that the compiler has to write out, so that what they index can live in registers.
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

// The function of `unroll`, with the name of its Constant.
#define UNROLL(name) [&](auto name) __attribute__((always_inline))
