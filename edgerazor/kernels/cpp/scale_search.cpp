// The function of scale_search.hpp for the instruction set that the options of this compilation allow; EDGERAZOR_UNIT
// is its name. Candidates are compared by sums of integers, which are exact in a float lane as long as it adds up no
// more than 16 of them, so that neither the order of summation nor fused operations change the result.
#include "scale_search.hpp"

#include "f32x16.hpp"
#include "rounding.hpp"

namespace {

using edgerazor::search_workspace_floats;

constexpr float kResolution = 8192.0f;                // integer units of the largest weight of a group
constexpr float kSmallest = 1.490116119384765625e-8f; // 2^-26; a group of smaller weights has the scale 0
constexpr float kMaxF16 = 65504.0f;
constexpr int kLaneSteps = 16;                        // products that a lane adds up: 16 * 8192 * 128 = 2^24

// For each of `count` vectors of integers, at most 2^24 in a lane: the sum of its 16 lanes.
template <int count>
EDGERAZOR_INLINE void integer_sums(const f32x16 (&x)[count], int32_t* sums) {
    IntLanes lanes[count];
    unroll<0, count>(UNROLL(k) {
        lanes[k.value] = __builtin_convertvector(x[k.value].reg[0], IntLanes);
        unroll<1, kRegisters>(UNROLL(i) {
            lanes[k.value] += __builtin_convertvector(x[k.value].reg[i.value], IntLanes);
        });
    });
#if defined(__AVX2__)
    __m256i eight[count];
    unroll<0, count>(UNROLL(k) {
#if defined(__AVX512F__)
        const __m512i sixteen = (__m512i)lanes[k.value];
        eight[k.value] = _mm256_add_epi32(_mm512_castsi512_si256(sixteen), _mm512_extracti64x4_epi64(sixteen, 1));
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

// The levels that quantize ratios: the nearest integer from low to high or, of a mid-rise quantizer, the middle of the
// interval between two integers, doubled.
template <bool mid_rise>
EDGERAZOR_INLINE f32x16 levels(f32x16 ratios, float low, float high) {
    const f32x16 bounded = clamp(ratios, low, high);
    return map_registers(UNROLL(i) {
        const Lanes x = bounded.reg[i.value], nearest = round_lanes(x);
        if constexpr (!mid_rise) return nearest;
        const Lanes above = (Lanes)((IntLanes)(nearest > x) & (int32_t)bits_of(1.0f));
        return (nearest - above) * 2.0f + 1.0f;
    });
}

// The sums of weight * level and of level * level at one scale. Its squared error is least where products^2 / squares
// is largest.
struct LevelSums {
    double products, squares;
};

// The sums at `count` scales, given as factors from units of the group to units of the scale.
template <bool mid_rise, int count>
EDGERAZOR_INLINE void sums_at(const float* units, int64_t size, const float* factors, float low, float high,
                              LevelSums* sums) {
    const int64_t padded = search_workspace_floats(size);
    double totals[2 * count] = {};
    for (int64_t begin = 0; begin < padded; begin += 16 * kLaneSteps) {
        const int64_t end = padded - begin < 16 * kLaneSteps ? padded : begin + 16 * kLaneSteps;
        f32x16 lane_sums[2 * count];
        unroll<0, 2 * count>(UNROLL(k) { lane_sums[k.value] = splat(0); });
        for (int64_t i = begin; i < end; i += 16) {
            const f32x16 w = load(units + i);
            unroll<0, count>(UNROLL(k) {
                const f32x16 level = levels<mid_rise>(w * splat(factors[k.value]), low, high);
                lane_sums[2 * k.value] = fmadd(w, level, lane_sums[2 * k.value]);
                lane_sums[2 * k.value + 1] = fmadd(level, level, lane_sums[2 * k.value + 1]);
            });
        }
        int32_t integers[2 * count];
        integer_sums(lane_sums, integers);
        for (int k = 0; k < 2 * count; k++) totals[k] += integers[k];
    }
    const double padding = (double)(padded - size); // a mid-rise quantizer gives the zeros of the padding a level, too
    for (int k = 0; k < count; k++) {
        const double products = totals[2 * k], squares = totals[2 * k + 1];
        sums[k] = mid_rise ? LevelSums{0.5 * products, 0.25 * (squares - padding)} : LevelSums{products, squares};
    }
}

// A scale as it is stored: rounded to fp16.
EDGERAZOR_INLINE float stored(float scale) { return round_to_f16(scale < kMaxF16 ? scale : kMaxF16); }

EDGERAZOR_INLINE uint16_t f16_bits(float half) {
    if (half < 6.103515625e-5f) return (uint16_t)(half * 16777216.0f); // 2^24: fp16 numbers below the normal ones
    return (uint16_t)((bits_of(half) - 0x38000000u) >> 13);
}

// Writes the weights in integer units, with zeros after them, and returns the sum of their squares.
double to_units(const float* weights, int64_t size, float factor, float* units) {
    const int64_t padded = search_workspace_floats(size);
    for (int64_t i = size; i < padded; i++) units[i] = 0;
    for (int64_t i = 0; i < size; i++) units[i] = (weights[i] * factor + kRoundShift) - kRoundShift;
    double squares = 0;
    for (int64_t begin = 0; begin < padded; begin += 16 * kLaneSteps) {
        const int64_t end = padded - begin < 16 * kLaneSteps ? padded : begin + 16 * kLaneSteps;
        int32_t sums[16] = {};
        for (int64_t i = begin; i < end; i += 16)
            for (int k = 0; k < 16; k++) sums[k] += (int32_t)(units[i + k] * units[i + k]); // at most 16 * 2^26
        int64_t sum = 0;
        for (int k = 0; k < 16; k++) sum += sums[k];
        squares += (double)sum;
    }
    return squares;
}

// The search of one group: its weights in units, and the sums at the best scale so far.
template <bool mid_rise>
struct GroupSearch {
    const edgerazor_scale_search& settings;
    const float* units;
    int64_t size;
    float unit;
    LevelSums best;

    template <int count>
    EDGERAZOR_INLINE void try_scales(const float (&scales)[count]) {
        LevelSums sums[count];
        float factors[count];
        for (int k = 0; k < count; k++) factors[k] = scales[k] > 0 ? unit / scales[k] : 0;
        sums_at<mid_rise, count>(units, size, factors, settings.min_code, settings.max_code, sums);
        for (int k = 0; k < count; k++) keep_better(sums[k], scales[k]);
    }

    EDGERAZOR_INLINE void keep_better(const LevelSums& sums, float scale) {
        const double products = scale > 0 ? sums.products : 0;
        const bool better = products * products * best.squares > best.products * best.products * sums.squares;
        best.products = better ? products : best.products;
        best.squares = better ? sums.squares : best.squares;
    }

    // The scale of least squared error for the best codes so far.
    EDGERAZOR_INLINE float best_scale() const { return stored((float)(best.products / best.squares) * unit); }
};

template <bool mid_rise>
float search_group(const edgerazor_scale_search& settings, const float* units, int64_t size, float unit,
                   double squares) {
    GroupSearch<mid_rise> search{settings, units, size, unit, {0, 1}};
    const float spread = (float)__builtin_sqrt(squares / (double)size) * settings.rms_factor;
    const float base = settings.absmax_units > 0 && spread > settings.absmax_units ? settings.absmax_units : spread;
    int i = 0;
    for (; i + 1 < settings.count; i += 2)
        search.try_scales({stored(base * settings.ratios[i] * unit), stored(base * settings.ratios[i + 1] * unit)});
    for (; i < settings.count; i++) search.try_scales({stored(base * settings.ratios[i] * unit)});
    if (settings.absmax_units > 0) search.try_scales({stored(unit * settings.absmax_units)});
    for (i = 0; i < settings.refinements; i++) search.try_scales({search.best_scale()});
    return search.best_scale();
}

// Writes the codes of weights at a scale, as `formats` chooses them.
template <bool mid_rise>
void write_codes(const float* weights, int64_t size, float scale, float low, float high, int8_t* codes) {
    for (int64_t i = 0; i < size; i++) {
        float ratio = weights[i] / scale;
        ratio = ratio > high ? high : ratio;
        ratio = ratio < low ? low : ratio;
        const float nearest = (ratio + kRoundShift) - kRoundShift;
        codes[i] = (int8_t)((int32_t)nearest - (int32_t)(mid_rise && nearest > ratio));
    }
}

// The scale of a group of finite weights whose largest magnitude is at least kSmallest.
template <bool mid_rise>
float encode_group(const edgerazor_scale_search& settings, const float* weights, int64_t size, float largest,
                   float* workspace, int8_t* codes) {
    const double squares = to_units(weights, size, kResolution / largest, workspace);
    const float scale = search_group<mid_rise>(settings, workspace, size, largest / kResolution, squares);
    if (codes != nullptr && scale > 0)
        write_codes<mid_rise>(weights, size, scale, settings.min_code, settings.max_code, codes);
    return scale;
}

// Like `largest_magnitude`, but of more weights than an int can count.
float absmax(const float* weights, int64_t size) {
    constexpr int64_t kStep = 1 << 30;
    uint32_t largest = 0;
    for (int64_t i = 0; i < size; i += kStep) {
        const uint32_t magnitude = largest_magnitude(weights + i, (int)(size - i < kStep ? size - i : kStep));
        largest = magnitude > largest ? magnitude : largest;
    }
    return float_of(largest);
}

} // namespace

#define EDGERAZOR_JOIN(a, b) a##b
#define EDGERAZOR_NAME(unit, name) EDGERAZOR_JOIN(unit, name)

int64_t edgerazor::EDGERAZOR_NAME(EDGERAZOR_UNIT, _scale_search)(const edgerazor_scale_search& settings,
                                                                 const float* weights, int64_t groups, int64_t size,
                                                                 float* workspace, uint16_t* scales, int8_t* codes) {
    for (int64_t group = 0; group < groups; group++, weights += size) {
        const float largest = absmax(weights, size);
        if (!(largest <= 3.40282347e38f)) return group; // infinity or NaN
        int8_t* group_codes = codes == nullptr ? nullptr : codes + group * size;
        const auto encode = settings.mid_rise ? encode_group<true> : encode_group<false>;
        const float scale = largest < kSmallest ? 0 : encode(settings, weights, size, largest, workspace, group_codes);
        if (group_codes != nullptr && scale == 0) memset(group_codes, 0, (size_t)size);
        scales[group] = f16_bits(scale);
    }
    return -1;
}
