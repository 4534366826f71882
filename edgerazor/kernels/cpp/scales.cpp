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

// Of each of some: the sum of 16 lanes of whole numbers, at most 2^24 in a lane.
template <int count>
EDGERAZOR_INLINE void sums_of_whole(const Sixteen (&x)[count], int32_t* sums) {
    IntLanes lanes[count];
    unroll<0, count>(UNROLL(k) {
        lanes[k.value] = __builtin_convertvector(x[k.value].part[0], IntLanes);
        unroll<1, kParts>(UNROLL(i) { lanes[k.value] += __builtin_convertvector(x[k.value].part[i.value], IntLanes); });
    });
#if defined(__AVX2__)
    __m256i eight[count];
    unroll<0, count>(UNROLL(k) {
#if defined(__AVX512F__)
        const __m512i all = (__m512i)lanes[k.value];
        eight[k.value] = _mm256_add_epi32(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
#else
        eight[k.value] = (__m256i)lanes[k.value];
#endif
    });
    unroll<0, count / 2>(UNROLL(k) {
        const __m256i fours = _mm256_hadd_epi32(eight[2 * k.value], eight[2 * k.value + 1]);
        const __m128i twos = _mm_add_epi32(_mm256_castsi256_si128(fours), _mm256_extracti128_si256(fours, 1));
        _mm_storel_epi64((__m128i*)(sums + 2 * k.value), _mm_hadd_epi32(twos, twos));
    });
#elif defined(__aarch64__)
    unroll<0, count>(UNROLL(k) { sums[k.value] = vaddvq_s32((int32x4_t)lanes[k.value]); });
#else
    for (int k = 0; k < count; k++) {
        sums[k] = 0;
        for (int i = 0; i < kLanes; i++) sums[k] += lanes[k][i];
    }
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

// Of the codes at some scales: sums of w * level and of level * level.
struct Sums {
    double products, squares;
};

// At as many scales, which are `factors` of the group's unit.
template <bool middle, int count>
EDGERAZOR_INLINE void sums_at(const float* units, int64_t size, const float* factors, float low, float high,
                              Sums* sums) {
    const int64_t padded = workspace_floats(size);
    double totals[2 * count] = {};
    for (int64_t begin = 0; begin < padded; begin += 16 * kSteps) {
        const int64_t end = padded - begin < 16 * kSteps ? padded : begin + 16 * kSteps;
        Sixteen each[2 * count];
        unroll<0, 2 * count>(UNROLL(k) { each[k.value] = fill(0); });
        for (int64_t i = begin; i < end; i += 16) {
            const Sixteen w = load(units + i);
            unroll<0, count>(UNROLL(k) {
                const Sixteen level = levels<middle>(w * fill(factors[k.value]), low, high);
                each[2 * k.value] = multiply_add(w, level, each[2 * k.value]);
                each[2 * k.value + 1] = multiply_add(level, level, each[2 * k.value + 1]);
            });
        }
        int32_t whole[2 * count];
        sums_of_whole(each, whole);
        for (int k = 0; k < 2 * count; k++) totals[k] += whole[k];
    }
    const double pads = (double)(padded - size); // a weight of 0 has a level between whole numbers, too
    for (int k = 0; k < count; k++) {
        const double products = totals[2 * k], squares = totals[2 * k + 1];
        sums[k] = middle ? Sums{0.5 * products, 0.25 * (squares - pads)} : Sums{products, squares};
    }
}

EDGERAZOR_INLINE float stored(float scale) { return round_to_half(scale < kLargestScale ? scale : kLargestScale); }

EDGERAZOR_INLINE uint16_t half_bits(float half) {
    if (half < 6.103515625e-5f) return (uint16_t)(half * 16777216.0f); // 2^24: below the normal numbers
    return (uint16_t)((bits_of(half) - 0x38000000u) >> 13);
}

// Weights in units, zeros behind them, and the sum of their squares.
double measure(const float* weights, int64_t size, float factor, float* units) {
    const int64_t padded = workspace_floats(size);
    for (int64_t i = size; i < padded; i++) units[i] = 0;
    for (int64_t i = 0; i < size; i++) units[i] = (weights[i] * factor + kShift) - kShift;
    double squares = 0;
    for (int64_t begin = 0; begin < padded; begin += 16 * kSteps) {
        const int64_t end = padded - begin < 16 * kSteps ? padded : begin + 16 * kSteps;
        int32_t sums[16] = {};
        for (int64_t i = begin; i < end; i += 16)
            for (int k = 0; k < 16; k++) sums[k] += (int32_t)(units[i + k] * units[i + k]); // 16 * 2^26
        int64_t sum = 0;
        for (int k = 0; k < 16; k++) sum += sums[k];
        squares += (double)sum;
    }
    return squares;
}

// A group and the best codes so far.
template <bool middle>
struct Search {
    const edgerazor_ladder& ladder;
    const float* units;
    int64_t size;
    float unit;
    Sums best;

    template <int count>
    EDGERAZOR_INLINE void attempt(const float (&scales)[count]) {
        Sums sums[count];
        float factors[count];
        for (int k = 0; k < count; k++) factors[k] = scales[k] > 0 ? unit / scales[k] : 0;
        sums_at<middle, count>(units, size, factors, ladder.lowest, ladder.highest, sums);
        for (int k = 0; k < count; k++) keep(sums[k], scales[k]);
    }

    EDGERAZOR_INLINE void keep(const Sums& sums, float scale) {
        const double products = scale > 0 ? sums.products : 0;
        const bool better = products * products * best.squares > best.products * best.products * sums.squares;
        best.products = better ? products : best.products;
        best.squares = better ? sums.squares : best.squares;
    }

    EDGERAZOR_INLINE float found() const { return stored((float)(best.products / best.squares) * unit); }
};

template <bool middle>
float scale_of(const edgerazor_ladder& ladder, const float* units, int64_t size, float unit, double squares) {
    Search<middle> search{ladder, units, size, unit, {0, 1}};
    const float spread = (float)__builtin_sqrt(squares / (double)size) * ladder.spread;
    const float base = ladder.reaching > 0 && spread > ladder.reaching ? ladder.reaching : spread;
    int i = 0;
    for (; i + 1 < ladder.count; i += 2)
        search.attempt({stored(base * ladder.shares[i] * unit), stored(base * ladder.shares[i + 1] * unit)});
    for (; i < ladder.count; i++) search.attempt({stored(base * ladder.shares[i] * unit)});
    if (ladder.reaching > 0) search.attempt({stored(unit * ladder.reaching)});
    for (i = 0; i < ladder.refinements; i++) search.attempt({search.found()});
    return search.found();
}

// The codes of weights at a scale: levels of quotients, as `Format.choose_` finds them.
template <bool middle>
void write_codes(const float* weights, int64_t size, float scale, float low, float high, int8_t* codes) {
    for (int64_t i = 0; i < size; i++) {
        float ratio = weights[i] / scale;
        ratio = ratio > high ? high : ratio;
        ratio = ratio < low ? low : ratio;
        const float nearest = (ratio + kShift) - kShift;
        codes[i] = (int8_t)((int32_t)nearest - (int32_t)(middle && nearest > ratio));
    }
}

// The scale of one group of finite weights, of which the largest is not too small.
template <bool middle>
float encode_group(const edgerazor_ladder& ladder, const float* weights, int64_t size, float largest, float* workspace,
                   int8_t* codes) {
    const double squares = measure(weights, size, kResolution / largest, workspace);
    const float scale = scale_of<middle>(ladder, workspace, size, largest / kResolution, squares);
    if (codes != nullptr && scale > 0) write_codes<middle>(weights, size, scale, ladder.lowest, ladder.highest, codes);
    return scale;
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
                                                           uint16_t* scales, int8_t* codes) {
    for (int64_t group = 0; group < groups; group++, weights += size) {
        const float largest = largest_weight(weights, size);
        if (!(largest <= 3.40282347e38f)) return group;
        int8_t* own = codes == nullptr ? nullptr : codes + group * size;
        const auto encode = ladder.middle ? encode_group<true> : encode_group<false>;
        const float scale = largest < kSmallest ? 0 : encode(ladder, weights, size, largest, workspace, own);
        if (own != nullptr && scale == 0) memset(own, 0, (size_t)size);
        scales[group] = half_bits(scale);
    }
    return -1;
}
