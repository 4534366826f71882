// Cutting the rows of a matrix into segments, and dequantizing one row by the definition of the layout.
#include "packed_layout.hpp"

#include <string.h>

#include <algorithm>
#include <new>
#include <vector>

#include "base3_tables.hpp"

using namespace edgerazor;

namespace {

// Segments ------------------------------------------------------------------------------------------------------------

int quads_of(int columns) { return (columns + 3) / 4; }

// Adds the segments of the group of weights that begins at column `begin`: it is cut where a group of activations ends.
void cut_group(RowLayout& layout, int begin, std::vector<Segment>& segments) {
    const int end = std::min(begin + layout.group_size, layout.columns);
    const int base = layout.quads; // of the groups before this one
    for (int column = begin; column < end;) {
        const int activation_group = column / layout.activation_group_size;
        const int64_t cut = std::min<int64_t>((int64_t)(activation_group + 1) * layout.activation_group_size,
                                              (int64_t)column - column % kMaxSegmentColumns + kMaxSegmentColumns);
        const int stop = (int)std::min<int64_t>(end, cut);
        Segment segment;
        segment.column = column;
        segment.width = stop - column;
        segment.lead_bytes = (column - begin) % 4;
        segment.first_quad = base + (column - begin) / 4;
        segment.quads = base + quads_of(stop - begin) - segment.first_quad;
        segment.x_quad = layout.x_quads;
        segment.group = begin / layout.group_size;
        segment.activation_group = activation_group;
        layout.x_quads += segment.quads;
        segments.push_back(segment);
        column = stop;
    }
    layout.quads += quads_of(end - begin);
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

// One row -------------------------------------------------------------------------------------------------------------

// The four u of quad q of a ternary chunk of `quads` quads, for one lane.
void unpack_ternary_lane(const uint8_t* lane, int quads, int q, uint8_t* u) {
    const bool base3 = q < quads / 5 * 5;
    const uint8_t* vector = lane + (base3 ? q / 5 : quads / 5) * kVectorBytes;
    const int f = base3 ? q % 5 : q - quads / 5 * 5;
    for (int j = 0; j < 4; j++) {
        const int byte = vector[j], low = byte & 63;
        const bool is_long = base3 && byte >= kLongBytes;
        const int fields = !base3 ? byte : is_long ? kBase3.long_fields[low] : kBase3.short_fields[low];
        const int last = is_long ? kBase3.long_last[low] >> 6 : byte >> 6;
        u[j] = (uint8_t)(f == 4 ? last : fields >> 2 * f & 3);
    }
}

// The four u of quad q of a chunk of bit planes, for one lane.
void unpack_bits_lane(int bits, const uint8_t* lane, int quads, int q, uint8_t* u) {
    int shift = 0;
    memset(u, 0, 4);
    for (int width = 8; width > 0; width /= 2) {
        if ((bits & width) == 0) continue;
        const int fields = 8 / width, mask = (1 << width) - 1;
        for (int j = 0; j < 4; j++) u[j] |= (lane[q / fields * kVectorBytes + j] >> q % fields * width & mask) << shift;
        lane += (quads * width + 7) / 8 * kVectorBytes;
        shift += width;
    }
}

// The four u of quad q of a row, whose lane of the row block is given.
void unpack_row_quad(const RowLayout& layout, const FormatRows& rows, const uint8_t* lane, int q, uint8_t* u) {
    const int chunk = chunk_quads(rows.bits), begin = q - q % chunk;
    const int quads = std::min(chunk, layout.quads - begin);
    const uint8_t* w = lane + codes_bytes(rows.bits, begin);
    if (rows.bits == kTernary) {
        unpack_ternary_lane(w, quads, q - begin, u);
    } else {
        unpack_bits_lane(rows.bits, w, quads, q - begin, u);
    }
}

float f16_to_f32(uint16_t half) {
    const uint32_t magnitude = half & 0x7fff, bits = (magnitude << 13) + 0x38000000u;
    float value = (float)magnitude * 5.9604644775390625e-8f; // 2^-24: numbers below the normal ones
    if (magnitude >= 0x0400) memcpy(&value, &bits, 4);
    return half & 0x8000 ? -value : value;
}

} // namespace

const RowLayout& edgerazor::layout_of(const edgerazor_row_layout* handle) {
    return *reinterpret_cast<const RowLayout*>(handle);
}

FormatRows edgerazor::format_rows_of(const edgerazor_format_rows& rows) {
    return {rows.codes, rows.scales, rows.rows, rows.count, rows.bits, rows.min_level_x2};
}

void edgerazor::dequantize_row(const RowLayout& layout, const FormatRows& rows, int64_t row, float* weights) {
    const int64_t block = row / kBlockRows, lane = row % kBlockRows;
    const uint8_t* w = rows.codes + block * codes_bytes(rows.bits, layout.quads) + lane * 4;
    const uint16_t* scales = rows.scales + block * layout.groups * kBlockRows + lane;
    int quad = 0;
    for (int group = 0; group < layout.groups; group++) {
        const int begin = group * layout.group_size, end = std::min(begin + layout.group_size, layout.columns);
        const float scale = f16_to_f32(scales[(int64_t)group * kBlockRows]);
        for (int column = begin; column < end; column += 4, quad++) {
            uint8_t u[4];
            unpack_row_quad(layout, rows, w, quad, u);
            for (int j = 0; j < std::min(4, end - column); j++)
                weights[column + j] = 0.5f * (float)(2 * u[j] + rows.min_level_x2) * scale;
        }
    }
}

extern "C" {

edgerazor_row_layout* edgerazor_row_layout_new(int32_t columns, int32_t group_size, int32_t activation_group_size) {
    RowLayout* layout = new (std::nothrow) RowLayout{};
    if (layout == nullptr || columns < 1 || group_size < 1 || activation_group_size < 1) {
        delete layout;
        return nullptr;
    }
    layout->columns = columns;
    layout->group_size = std::min(group_size, columns);
    layout->activation_group_size = std::min(activation_group_size, columns);
    std::vector<Segment> segments;
    for (int64_t begin = 0; begin < columns; begin += layout->group_size, layout->groups++)
        cut_group(*layout, (int)begin, segments);
    layout->uniform_quads = uniform_quads(segments);
    layout->segment_count = (int32_t)segments.size();
    layout->segments = new Segment[segments.size()];
    std::copy(segments.begin(), segments.end(), layout->segments);
    return reinterpret_cast<edgerazor_row_layout*>(layout);
}

void edgerazor_row_layout_free(edgerazor_row_layout* handle) {
    RowLayout* layout = reinterpret_cast<RowLayout*>(handle);
    if (layout == nullptr) return;
    delete[] layout->segments;
    delete layout;
}

int64_t edgerazor_activation_bytes(const edgerazor_row_layout* layout) {
    return (int64_t)layout_of(layout).x_quads * 4;
}

int64_t edgerazor_segments(const edgerazor_row_layout* layout) { return layout_of(layout).segment_count; }

int64_t edgerazor_block_bytes(const edgerazor_row_layout* layout, int32_t bits) {
    return codes_bytes(bits, layout_of(layout).quads);
}

} // extern "C"
