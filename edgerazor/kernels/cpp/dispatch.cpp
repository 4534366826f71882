// Choice of the instruction set at run time: what the CPU has, of what the compiler could build.
#include "dispatch.hpp"

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

using namespace edgerazor;

namespace {

#if defined(__x86_64__)
bool has_f16c() {
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) && (c & 1u << 29);
}

bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c(); }

bool has_avx2vnni() {
    unsigned a, b, c, d;
    return has_avx2() && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & 1u << 4);
}

bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vbmi") &&
           __builtin_cpu_supports("avx512vnni");
}
#elif defined(__aarch64__) && defined(__linux__)
bool has_dot_product() { return getauxval(AT_HWCAP) & 1ul << 20; }
bool has_i8mm() { return has_dot_product() && getauxval(AT_HWCAP2) & 1ul << 13; }
#elif defined(__aarch64__) && defined(__APPLE__)
bool has_feature(const char* name) {
    int value = 0;
    size_t size = sizeof value;
    return sysctlbyname(name, &value, &size, nullptr, 0) == 0 && value != 0;
}
bool has_dot_product() { return has_feature("hw.optional.arm.FEAT_DotProd"); }
bool has_i8mm() { return has_feature("hw.optional.arm.FEAT_I8MM"); }
#endif

// build.py defines EDGERAZOR_HAVE_<NAME> for each instruction set that the compiler knows.
std::vector<IsaKernels> detect() {
    std::vector<IsaKernels> isas = {{&portable_matmul, &portable_float_kernels, portable_scale_search, &portable_fake_quantize}};
#ifdef EDGERAZOR_HAVE_AVX2
    if (has_avx2())
        isas.push_back({&avx2_matmul, &avx2_float_kernels, avx2_scale_search, &avx2_fake_quantize});
#endif
#ifdef EDGERAZOR_HAVE_AVX2VNNI
    if (has_avx2vnni())
        isas.push_back({&avx2vnni_matmul, &avx2vnni_float_kernels, avx2vnni_scale_search, &avx2vnni_fake_quantize});
#endif
#ifdef EDGERAZOR_HAVE_AVX512
    if (has_avx512())
        isas.push_back({&avx512_matmul, &avx512_float_kernels, avx512_scale_search, &avx512_fake_quantize});
#endif
#ifdef EDGERAZOR_HAVE_NEON
    if (has_dot_product())
        isas.push_back({&neon_matmul, &neon_float_kernels, neon_scale_search, &neon_fake_quantize});
#endif
#ifdef EDGERAZOR_HAVE_I8MM
    if (has_i8mm())
        isas.push_back({&i8mm_matmul, &i8mm_float_kernels, i8mm_scale_search, &i8mm_fake_quantize});
#endif
    return isas;
}

} // namespace

const std::vector<IsaKernels>& edgerazor::runnable_isas() {
    static const std::vector<IsaKernels> isas = detect();
    return isas;
}

const MatmulKernels& edgerazor::matmul_kernels(int isa) { return *runnable_isas()[isa].matmul; }

const FloatKernels& edgerazor::float_kernels(int isa) { return *runnable_isas()[isa].floats; }
