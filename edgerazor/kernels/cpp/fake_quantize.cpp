// The functions of fake_quantize.hpp for the instruction set that the options of this compilation allow; EDGERAZOR_UNIT
// is its name. Products and sums are never fused, and the sixteen lanes of a sum are added up in their order.
#include "fake_quantize.hpp"

#include "f32x16.hpp"
#include "rounding.hpp"

namespace {

using edgerazor::FakeQuantizeKernels;

typedef uint16_t HalfLanes __attribute__((vector_size(2 * kLanes)));
typedef uint16_t UnalignedHalfLanes __attribute__((vector_size(2 * kLanes), aligned(2), may_alias));

// The level that a weight / scale is rounded to: the nearest integer, or the middle of the interval it lies in.
template <bool mid_rise>
EDGERAZOR_INLINE f32x16 level_of(f32x16 ratio, const edgerazor_code_range& range) {
    const f32x16 bounded = clamp(ratio, range.min_code, range.max_code);
    return map_registers(UNROLL(i) {
        const Lanes x = bounded.reg[i.value], nearest = round_lanes(x);
        if constexpr (!mid_rise) return nearest;
        const Lanes above = (Lanes)((IntLanes)(nearest > x) & (int32_t)bits_of(1.0f));
        return (nearest - above) + 0.5f;
    });
}

// A finite number as bfloat16, to nearest, ties to even.
EDGERAZOR_INLINE void store(bfloat16* p, f32x16 x) {
    unroll<0, kRegisters>(UNROLL(i) {
        const UintLanes bits = (UintLanes)x.reg[i.value];
        const UintLanes rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
        *(UnalignedHalfLanes*)(p + i.value * kLanes) = __builtin_convertvector(rounded, HalfLanes);
    });
}

// Calls function(first weight, scale, number of the scale, number of weights) for each group of the row.
template <class Function>
EDGERAZOR_INLINE void each_group(const edgerazor_weight_rows& rows, int64_t row, Function&& function) {
    const int64_t groups = (rows.columns + rows.group - 1) / rows.group;
    for (int64_t group = 0; group < groups; group++) {
        const int64_t first = group * rows.group, left = rows.columns - first, at = row * groups + group;
        function(row * rows.columns + first, rows.scales[at], at, left < rows.group ? left : rows.group);
    }
}

// Up to sixteen numbers, and zeros after them.
EDGERAZOR_INLINE f32x16 load_some(const float* p, int64_t count) {
    if (count >= 16) return load(p);
    float some[16] = {};
    for (int64_t i = 0; i < count; i++) some[i] = p[i];
    return load(some);
}

template <class T>
EDGERAZOR_INLINE void store_some(T* p, f32x16 x, int64_t count) {
    if (count >= 16) return store(p, x);
    T some[16];
    store(some, x);
    for (int64_t i = 0; i < count; i++) p[i] = some[i];
}

// The largest of some magnitudes that are compared as integers, in which order infinity and NaN come last.
struct LargestMagnitude {
    IntLanes lanes[kRegisters] = {};

    EDGERAZOR_INLINE void add(f32x16 x) {
        unroll<0, kRegisters>(UNROLL(i) {
            const IntLanes magnitude = (IntLanes)x.reg[i.value] & (int32_t)kMagnitudeBits;
            lanes[i.value] = magnitude > lanes[i.value] ? magnitude : lanes[i.value];
        });
    }

    EDGERAZOR_INLINE bool finite() const {
        for (int i = 0; i < kRegisters; i++)
            for (int k = 0; k < kLanes; k++)
                if (lanes[i][k] >= (int32_t)kInfinityBits) return false;
        return true;
    }
};

template <bool mid_rise, class T>
int64_t round_rows(const edgerazor_code_range& range, const edgerazor_weight_rows& rows, T* out) {
    for (int64_t i = 0; i < rows.count; i++) {
        const int64_t row = rows.rows[i];
        LargestMagnitude largest;
        each_group(rows, row, [&](int64_t first, float scale, int64_t, int64_t size) {
            const f32x16 divisor = splat(scale == 0 ? float_of(kInfinityBits) : scale), factor = splat(scale);
            for (int64_t k = 0; k < size; k += 16) {
                const f32x16 w = load_some(rows.weights + first + k, size - k);
                largest.add(w);
                store_some(out + first + k, level_of<mid_rise>(w / divisor, range) * factor, size - k);
            }
        });
        if (!largest.finite()) return row;
    }
    return -1;
}

int64_t round_weights(const edgerazor_code_range& range, const edgerazor_weight_rows& rows, void* out,
                      bool to_bfloat16) {
    if (to_bfloat16)
        return range.mid_rise ? round_rows<true>(range, rows, (bfloat16*)out)
                              : round_rows<false>(range, rows, (bfloat16*)out);
    return range.mid_rise ? round_rows<true>(range, rows, (float*)out) : round_rows<false>(range, rows, (float*)out);
}

template <bool mid_rise>
void gradients_of(const edgerazor_code_range& range, const edgerazor_weight_rows& rows, const float* gradient,
                  float* to_weights, float* to_scales) {
    const float largest_level = range.max_code + (mid_rise ? 0.5f : 0.0f);
    const float low = range.min_code, high = 2 * largest_level - range.max_code; // beyond them, weights are clipped
    const Lanes lows = splat_lanes(low), highs = splat_lanes(high), ones = splat_lanes(1);
    for (int64_t i = 0; i < rows.count; i++) {
        const int64_t row = rows.rows[i];
        each_group(rows, row, [&](int64_t first, float scale, int64_t at, int64_t size) {
            const f32x16 divisor = splat(scale);
            f32x16 sums = splat(0);
            for (int64_t k = 0; k < size; k += 16) {
                const f32x16 upstream = load_some(gradient + first + k, size - k);
                const f32x16 ratio = load_some(rows.weights + first + k, size - k) / divisor;
                const f32x16 level = level_of<mid_rise>(ratio, range);
                f32x16 inside, slope;
                unroll<0, kRegisters>(UNROLL(r) {
                    const Lanes x = ratio.reg[r.value];
                    const IntLanes mask = (IntLanes)(x > lows) & (IntLanes)(x < highs);
                    inside.reg[r.value] = (Lanes)((IntLanes)ones & mask);
                    slope.reg[r.value] = level.reg[r.value] - (Lanes)((IntLanes)x & mask);
                });
                store_some(to_weights + first + k, upstream * inside, size - k);
                sums = sums + upstream * slope;
            }
            to_scales[at] = reduce_add(sums) / __builtin_sqrtf((float)size * largest_level);
        });
    }
}

void gradients(const edgerazor_code_range& range, const edgerazor_weight_rows& rows, const float* gradient,
               float* to_weights, float* to_scales) {
    (range.mid_rise ? gradients_of<true> : gradients_of<false>)(range, rows, gradient, to_weights, to_scales);
}

} // namespace

#define EDGERAZOR_JOIN(a, b) a##b
#define EDGERAZOR_TABLE(unit) EDGERAZOR_JOIN(unit, _fake_quantize)

const FakeQuantizeKernels edgerazor::EDGERAZOR_TABLE(EDGERAZOR_UNIT) = {round_weights, gradients};
