// What the kernels ask of the compiler: functions that must be inlined, loops that must be unrolled so that the arrays
// they index can live in registers, and loops that must stay loops.
#pragma once

#define EDGERAZOR_INLINE inline __attribute__((always_inline))

namespace {

template <int N>
struct Constant {
    static constexpr int value = N;
};

// Calls function(Constant<begin>), ..., function(Constant<end - 1>).
template <int begin, int end, class Function>
EDGERAZOR_INLINE void unroll(Function&& function) {
    if constexpr (begin < end) {
        function(Constant<begin>{});
        unroll<begin + 1, end>(function);
    }
}

} // namespace

// Stands in front of a loop that the compiler must not unroll.
#if defined(__clang__)
#define EDGERAZOR_ROLLED _Pragma("clang loop unroll(disable)")
#else
#define EDGERAZOR_ROLLED _Pragma("GCC unroll 1")
#endif

// The lambda that `unroll` calls; `name` is its Constant.
#define UNROLL(name) [&](auto name) __attribute__((always_inline))
