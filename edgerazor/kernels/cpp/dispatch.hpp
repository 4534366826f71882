// The kernels of the instruction sets that this machine can run.
#pragma once
#include <vector>

#include "fake_quantize.hpp"
#include "float_kernels.hpp"
#include "matmul_kernels.hpp"
#include "scale_search.hpp"

namespace edgerazor {

// What is compiled once for each instruction set.
struct IsaKernels {
    const MatmulKernels* matmul;
    const FloatKernels* floats;
    ScaleSearch scale_search;
    const FakeQuantizeKernels* fake_quantize;
};

// Plain C++ first, the best one last. The number of an instruction set is its index.
const std::vector<IsaKernels>& runnable_isas();

} // namespace edgerazor
