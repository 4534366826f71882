// The functions that others call: geometry, choice of the instruction set, products, rows of a table.
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <new>
#include <vector>

#include "digits.hpp"
#include "floats.hpp"
#include "kernels.hpp"
#include "scales.hpp"

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

using namespace edgerazor;

namespace {

// What the machine can run ---------------------------------------------------------------------------------------

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

// What there is for an instruction set.
struct Unit {
    const Kernels* kernels;
    const Floats* floats;
    LeastError scales;
};

// The best one last; EDGERAZOR_HAVE_* says which units were compiled.
std::vector<Unit> runnable() {
    std::vector<Unit> found = {{&portable_kernels, &portable_floats, portable_scales}};
#ifdef EDGERAZOR_HAVE_AVX2
    if (has_avx2()) found.push_back({&avx2_kernels, &avx2_floats, avx2_scales});
#endif
#ifdef EDGERAZOR_HAVE_AVX2VNNI
    if (has_avx2vnni()) found.push_back({&avx2vnni_kernels, &avx2vnni_floats, avx2vnni_scales});
#endif
#ifdef EDGERAZOR_HAVE_AVX512
    if (has_avx512()) found.push_back({&avx512_kernels, &avx512_floats, avx512_scales});
#endif
#ifdef EDGERAZOR_HAVE_NEON
    if (has_dot_product()) found.push_back({&neon_kernels, &neon_floats, neon_scales});
#endif
#ifdef EDGERAZOR_HAVE_I8MM
    if (has_i8mm()) found.push_back({&i8mm_kernels, &i8mm_floats, i8mm_scales});
#endif
    return found;
}

const std::vector<Unit>& units() {
    static const std::vector<Unit> found = runnable();
    return found;
}

// Geometry ---------------------------------------------------------------------------------------------------------

int quads_of(int columns) { return (columns + 3) / 4; }

// Segments of the group of weights that begins at column `begin`: cut where a group of activations ends.
void cut_group(Geometry& geometry, int begin, std::vector<Segment>& segments) {
    const int end = std::min(begin + geometry.group, geometry.columns);
    const int base = geometry.quads; // so far
    for (int column = begin; column < end;) {
        const int activation_group = column / geometry.activation_group;
        const int64_t cut = std::min<int64_t>((int64_t)(activation_group + 1) * geometry.activation_group,
                                              (int64_t)column - column % kLongest + kLongest);
        const int stop = (int)std::min<int64_t>(end, cut);
        Segment segment;
        segment.column = column;
        segment.width = stop - column;
        segment.lead = (column - begin) % 4;
        segment.first_quad = base + (column - begin) / 4;
        segment.quads = base + quads_of(stop - begin) - segment.first_quad;
        segment.x_quad = geometry.x_quads;
        segment.group = begin / geometry.group;
        segment.activation_group = activation_group;
        geometry.x_quads += segment.quads;
        segments.push_back(segment);
        column = stop;
    }
    geometry.quads += quads_of(end - begin);
}

int uniform_quads(const std::vector<Segment>& segments) {
    for (size_t i = 0; i < segments.size(); i++) {
        const Segment &segment = segments[i], &first = segments[0];
        const bool last = i + 1 == segments.size();
        if (segment.x_quad != segment.first_quad) return 0;
        if (last ? segment.quads > first.quads : segment.quads != first.quads) return 0;
    }
    return segments[0].quads;
}

// Codes of one row -------------------------------------------------------------------------------------------------

// u of quad q of a chunk of `quads` quads, for one lane: by the definition of the layout.
void ternary_quad(const uint8_t* lane, int quads, int q, uint8_t* u) {
    const bool base3 = q < quads / 5 * 5;
    const uint8_t* vector = lane + (base3 ? q / 5 : quads / 5) * kVector;
    const int f = base3 ? q % 5 : q - quads / 5 * 5;
    for (int j = 0; j < 4; j++) {
        const int byte = vector[j], low = byte & 63;
        const bool is_long = base3 && byte >= kLongDigits;
        const int fields = !base3 ? byte : is_long ? kDigits.long_fields[low] : kDigits.short_fields[low];
        const int last = is_long ? kDigits.long_last[low] >> 6 : byte >> 6;
        u[j] = (uint8_t)(f == 4 ? last : fields >> 2 * f & 3);
    }
}

void bits_quad(int bits, const uint8_t* lane, int quads, int q, uint8_t* u) {
    int shift = 0;
    memset(u, 0, 4);
    for (int width = 8; width > 0; width /= 2) {
        if ((bits & width) == 0) continue;
        const int fields = 8 / width, mask = (1 << width) - 1;
        for (int j = 0; j < 4; j++) u[j] |= (lane[q / fields * kVector + j] >> q % fields * width & mask) << shift;
        lane += (quads * width + 7) / 8 * kVector;
        shift += width;
    }
}

// u of quad q of a row block's lane.
void row_quad(const Geometry& geometry, const Part& part, const uint8_t* lane, int q, uint8_t* u) {
    const int chunk = chunk_quads(part.bits), begin = q - q % chunk;
    const int quads = std::min(chunk, geometry.quads - begin);
    const uint8_t* w = lane + codes_bytes(part.bits, begin);
    if (part.bits == kTernary) {
        ternary_quad(w, quads, q - begin, u);
    } else {
        bits_quad(part.bits, w, quads, q - begin, u);
    }
}

float half_to_float(uint16_t half) {
    const uint32_t magnitude = half & 0x7fff, bits = (magnitude << 13) + 0x38000000u;
    float value = (float)magnitude * 5.9604644775390625e-8f; // 2^-24, for numbers below the normal ones
    if (magnitude >= 0x0400) memcpy(&value, &bits, 4);
    return half & 0x8000 ? -value : value;
}

} // namespace

const Kernels& edgerazor::kernels_at(int isa) { return *units()[isa].kernels; }

const Floats& edgerazor::floats_at(int isa) { return *units()[isa].floats; }

const Geometry& edgerazor::known(const edgerazor_geometry* geometry) { return *reinterpret_cast<const Geometry*>(geometry); }

Part edgerazor::part_of(const edgerazor_part& part) {
    return {part.codes, part.scales, part.rows, part.count, part.bits, part.lowest};
}

void edgerazor::decode_row(const Geometry& geometry, const Part& part, int64_t row, float* weights) {
    const int64_t block = row / kRows, lane = row % kRows;
    const uint8_t* w = part.codes + block * codes_bytes(part.bits, geometry.quads) + lane * 4;
    const uint16_t* scales = part.scales + block * geometry.groups * kRows + lane;
    int quad = 0;
    for (int group = 0; group < geometry.groups; group++) {
        const int begin = group * geometry.group, end = std::min(begin + geometry.group, geometry.columns);
        const float scale = half_to_float(scales[(int64_t)group * kRows]);
        for (int column = begin; column < end; column += 4, quad++) {
            uint8_t u[4];
            row_quad(geometry, part, w, quad, u);
            for (int j = 0; j < std::min(4, end - column); j++)
                weights[column + j] = 0.5f * (float)(2 * u[j] + part.lowest) * scale;
        }
    }
}

extern "C" {

const char* edgerazor_sources(void) { return EDGERAZOR_SOURCES; }

int edgerazor_isa_count(void) { return (int)units().size(); }

const char* edgerazor_isa_name(int isa) { return kernels_at(isa).name; }

edgerazor_geometry* edgerazor_geometry_new(int32_t columns, int32_t group, int32_t activation_group) {
    Geometry* geometry = new (std::nothrow) Geometry{};
    if (geometry == nullptr || columns < 1 || group < 1 || activation_group < 1) {
        delete geometry;
        return nullptr;
    }
    geometry->columns = columns;
    geometry->group = std::min(group, columns);
    geometry->activation_group = std::min(activation_group, columns);
    std::vector<Segment> segments;
    for (int64_t begin = 0; begin < columns; begin += geometry->group, geometry->groups++)
        cut_group(*geometry, (int)begin, segments);
    geometry->uniform = uniform_quads(segments);
    geometry->count = (int32_t)segments.size();
    geometry->segments = new Segment[segments.size()];
    std::copy(segments.begin(), segments.end(), geometry->segments);
    return reinterpret_cast<edgerazor_geometry*>(geometry);
}

void edgerazor_geometry_free(edgerazor_geometry* opaque) {
    Geometry* geometry = reinterpret_cast<Geometry*>(opaque);
    if (geometry == nullptr) return;
    delete[] geometry->segments;
    delete geometry;
}

int64_t edgerazor_activation_bytes(const edgerazor_geometry* geometry) { return (int64_t)known(geometry).x_quads * 4; }

int64_t edgerazor_segments(const edgerazor_geometry* geometry) { return known(geometry).count; }

int64_t edgerazor_block_bytes(const edgerazor_geometry* geometry, int32_t bits) {
    return codes_bytes(bits, known(geometry).quads);
}

int64_t edgerazor_quantize(const edgerazor_geometry* opaque, int isa, const float* x, int64_t tokens, int32_t bits,
                           float scale, int8_t* codes, float* scales, int32_t* sums) {
    const Geometry& geometry = known(opaque);
    for (int64_t token = 0; token < tokens; token++) {
        const int64_t segment = token * geometry.count;
        if (!kernels_at(isa).quantize(geometry, x + token * geometry.columns, bits, scale,
                                      codes + token * geometry.x_quads * 4, scales + segment, sums + segment))
            return token;
    }
    return -1;
}

void edgerazor_linear(const edgerazor_geometry* geometry, int isa, const edgerazor_part* part, int64_t tokens,
                      const int8_t* codes, const float* scales, const int32_t* sums, const float* bias, float* y,
                      int64_t stride, int64_t first_block, int64_t last_block) {
    kernels_at(isa).linear(known(geometry), part_of(*part), {tokens, codes, scales, sums}, {y, stride, bias},
                           first_block, last_block);
}

void edgerazor_linear_float(const edgerazor_geometry* geometry, int isa, const edgerazor_part* part, int64_t tokens,
                            const float* x, const float* bias, float* y, int64_t stride, int64_t first_block,
                            int64_t last_block) {
    kernels_at(isa).linear_float(known(geometry), part_of(*part), tokens, x, {y, stride, bias}, first_block, last_block);
}

void edgerazor_row(const edgerazor_geometry* geometry, const edgerazor_part* part, int64_t row, float* weights) {
    decode_row(known(geometry), part_of(*part), row, weights);
}

void edgerazor_expand_ternary(const edgerazor_geometry* geometry, int isa, const uint8_t* codes, int64_t blocks,
                              uint8_t* out) {
    kernels_at(isa).expand_ternary(known(geometry), codes, blocks, out);
}

int64_t edgerazor_least_error(int isa, const edgerazor_ladder* ladder, const float* weights, int64_t groups,
                              int64_t size, uint16_t* scales, int8_t* codes) {
    void* workspace = nullptr;
    if (posix_memalign(&workspace, kVector, sizeof(float) * workspace_floats(size)) != 0) return -2;
    const int64_t wrong = units()[isa].scales(*ladder, weights, groups, size, (float*)workspace, scales, codes);
    free(workspace);
    return wrong;
}

const void* edgerazor_floats(int isa) { return &floats_at(isa); }

uint64_t edgerazor_read(int isa, const uint64_t* words, int64_t count) { return kernels_at(isa).read(words, count); }

} // extern "C"
