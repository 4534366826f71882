// The function of `scales.hpp`, for the instruction set that the options of this compilation allow; EDGERAZOR_UNIT
// names it. What is compared are sums of integers, exact in float as long as there are 16 of them in a lane, so that
// neither the order nor fused operations show.
#include "scales.hpp"

#include "quantize.hpp"
#include "sixteen.hpp"

namespace {

constexpr float kResolution = 8192.0f;                    // units in the largest weight of a group
constexpr float kSmallest = 1.490116119384765625e-8f;     // 2^-26; smaller groups have the scale 0
constexpr float kLargestScale = 65504.0f;                 // fp16
constexpr float kShift = 12582912.0f;                     // 1.5 * 2^23: added to a small number, it rounds it
constexpr int kSteps = 16;                                // of a lane: 16 * 8192 * 128 = 2^24

// Sums of 16 lanes of whole numbers, at most 2^24 in a lane.
EDGERAZOR_INLINE int32_t sum_of_whole(Sixteen x) {
    IntLanes lanes = __builtin_convertvector(x.part[0], IntLanes);
    unroll<1, kParts>(UNROLL(i) { lanes += __builtin_convertvector(x.part[i.value], IntLanes); });
#if defined(__AVX512F__)
    return _mm512_reduce_add_epi32((__m512i)lanes);
#elif defined(__AVX2__)
    const __m256i eight = (__m256i)lanes;
    const __m128i four = _mm_add_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
    const __m128i two = _mm_add_epi32(four, _mm_unpackhi_epi64(four, four));
    return _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32(two, 1)));
#elif defined(__aarch64__)
    return vaddvq_s32((int32x4_t)lanes);
#else
    int32_t sum = 0;
    for (int i = 0; i < kLanes; i++) sum += lanes[i];
    return sum;
#endif
}

EDGERAZOR_INLINE Lanes round_lanes(Lanes x) { return (x + kShift) - kShift; }

// The levels of ratios: the nearest whole number from low to high, or, doubled, the middle of the interval.
template <bool middle>
EDGERAZOR_INLINE Sixteen levels(Sixteen ratios, float low, float high) {
    const Sixteen bounded = clamp(ratios, low, high);
    return in_parts(UNROLL(i) {
        const Lanes x = bounded.part[i.value], nearest = round_lanes(x);
        if constexpr (!middle) return nearest;
        const Lanes above = (Lanes)((IntLanes)(nearest > x) & (int32_t)bits_of(1.0f));
        return (nearest - above) * 2.0f + 1.0f;
    });
}

// Of the codes at a scale: sum of w * level and of level * level.
struct Sums {
    double products, squares;
};

template <bool middle>
Sums sums_of(const float* units, int64_t size, float factor, float low, float high) {
    const int64_t padded = workspace_floats(size);
    double products = 0, squares = 0;
    for (int64_t begin = 0; begin < padded; begin += 16 * kSteps) {
        const int64_t end = padded - begin < 16 * kSteps ? padded : begin + 16 * kSteps;
        Sixteen p = fill(0), s = fill(0);
        for (int64_t i = begin; i < end; i += 16) {
            const Sixteen w = load(units + i), level = levels<middle>(w * fill(factor), low, high);
            p = multiply_add(w, level, p);
            s = multiply_add(level, level, s);
        }
        products += sum_of_whole(p);
        squares += sum_of_whole(s);
    }
    if (!middle) return {products, squares};
    return {0.5 * products, 0.25 * (squares - (double)(padded - size))}; // a weight of 0 has a level, too
}

EDGERAZOR_INLINE float stored(float scale) { return round_to_half(scale < kLargestScale ? scale : kLargestScale); }

EDGERAZOR_INLINE uint16_t half_bits(float half) {
    if (half < 6.103515625e-5f) return (uint16_t)(half * 16777216.0f); // 2^24: below the normal numbers
    return (uint16_t)((bits_of(half) - 0x38000000u) >> 13);
}

// Weights in units, zeros behind them, and the sum of their squares.
double measure(const float* weights, int64_t size, float factor, float* units) {
    double squares = 0;
    const int64_t padded = workspace_floats(size);
    for (int64_t i = size; i < padded; i++) units[i] = 0;
    for (int64_t i = 0; i < size; i++) units[i] = (weights[i] * factor + kShift) - kShift;
    for (int64_t begin = 0; begin < padded; begin += 16) {
        int32_t sum = 0;
        for (int64_t i = begin; i < begin + 16; i++) sum += (int32_t)(units[i] * units[i]); // 16 * 2^26
        squares += sum;
    }
    return squares;
}

// The scales of a ladder for one group, the best one kept.
template <bool middle>
struct Search {
    const edgerazor_ladder& ladder;
    const float* units;
    int64_t size;
    float unit;
    Sums best = {0, 1};

    EDGERAZOR_INLINE void attempt(float scale) {
        if (scale == 0) return;
        const Sums sums = sums_of<middle>(units, size, unit / scale, ladder.lowest, ladder.highest);
        if (sums.products * sums.products * best.squares > best.products * best.products * sums.squares) best = sums;
    }

    EDGERAZOR_INLINE float found() const { return stored((float)(best.products / best.squares) * unit); }
};

template <bool middle>
float scale_of(const edgerazor_ladder& ladder, const float* units, int64_t size, float unit, double squares) {
    Search<middle> search{ladder, units, size, unit};
    float base = (float)__builtin_sqrt(squares / (double)size) * ladder.spread;
    if (ladder.reaching > 0 && base > ladder.reaching) base = ladder.reaching;
    for (int i = 0; i < ladder.count; i++) search.attempt(stored(base * ladder.shares[i] * unit));
    if (ladder.reaching > 0) search.attempt(stored(unit * ladder.reaching));
    for (int i = 0; i < ladder.refinements; i++) search.attempt(search.found());
    return search.found();
}

// As `largest_magnitude`, of any number of weights.
float largest_weight(const float* weights, int64_t size) {
    constexpr int64_t kMost = 1 << 30;
    uint32_t largest = 0;
    for (int64_t i = 0; i < size; i += kMost) {
        const uint32_t some = largest_magnitude(weights + i, (int)(size - i < kMost ? size - i : kMost));
        largest = some > largest ? some : largest;
    }
    return float_of(largest);
}

} // namespace

#define EDGERAZOR_JOIN(a, b) a##b
#define EDGERAZOR_NAME(unit, name) EDGERAZOR_JOIN(unit, name)

int64_t edgerazor::EDGERAZOR_NAME(EDGERAZOR_UNIT, _scales)(const edgerazor_ladder& ladder, const float* weights,
                                                           int64_t groups, int64_t size, float* workspace,
                                                           uint16_t* scales) {
    for (int64_t group = 0; group < groups; group++, weights += size) {
        const float largest = largest_weight(weights, size), unit = largest / kResolution;
        if (!(largest <= 3.40282347e38f)) return group;
        if (largest < kSmallest) {
            scales[group] = 0;
            continue;
        }
        const double squares = measure(weights, size, kResolution / largest, workspace);
        scales[group] = half_bits(ladder.middle ? scale_of<true>(ladder, workspace, size, unit, squares)
                                                : scale_of<false>(ladder, workspace, size, unit, squares));
    }
    return -1;
}
