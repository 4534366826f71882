// The functions of float_kernels.hpp for the instruction set that the options of this compilation allow; EDGERAZOR_UNIT
// is its name. They are in one translation unit, so that the compiler can inline what they share.
#include "float_kernels.hpp"

#include "attention.hpp"
#include "kv_store.hpp"
#include "recurrent.hpp"
#include "unpacked_product.hpp"
#include "vector_math.hpp"

#define EDGERAZOR_JOIN(a, b) a##b
#define EDGERAZOR_TABLE(unit) EDGERAZOR_JOIN(unit, _float_kernels)

const edgerazor::FloatKernels edgerazor::EDGERAZOR_TABLE(EDGERAZOR_UNIT) = {
    rms_norm, layer_norm, rope, swiglu, add, store_kv, attention, attention_scratch_bytes, argmax, log_sum_exp,
    geglu, reglu_squared, sigmoid_gate, soft_cap, convolve, delta_rule,
    state_space, multiply_unpacked, add_scaled,
};
