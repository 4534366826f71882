// Linear layers of the decoder that share their input, and which row blocks of them each thread computes.
#pragma once
#include <stdint.h>

#include <algorithm>
#include <vector>

#include "aligned_buffer.hpp"
#include "decoder.h"
#include "packed_layout.hpp"

namespace edgerazor {

struct PackedMatrix {
    const RowLayout* layout;
    std::vector<FormatRows> parts; // one for each format of rows
    int64_t rows;
    const float* bias;
    float scale; // static scale of the activations; 0: computed for each group
    int block;   // of the rotation; 0: none
    const uint8_t* signs;

    explicit PackedMatrix(const edgerazor_matrix& from)
        : layout(&layout_of(from.layout)), rows(from.rows), bias(from.bias), scale(from.scale),
          block(from.block), signs(from.signs) {
        for (int i = 0; i < from.part_count; i++) parts.push_back(format_rows_of(from.parts[i]));
    }

    // Whether both quantize their input to the same codes.
    bool quantizes_like(const PackedMatrix& other) const {
        const RowLayout &a = *layout, &b = *other.layout;
        return a.columns == b.columns && a.group_size == b.group_size &&
               a.activation_group_size == b.activation_group_size && scale == other.scale;
    }
};

// The quantized input of a linear layer, of some tokens.
struct QuantizedInput {
    GrowBuffer<int8_t> codes;
    GrowBuffer<float> scales;
    GrowBuffer<int32_t> sums;

    void reserve(const RowLayout& layout, int64_t tokens) {
        codes.reserve(tokens * layout.x_quads * 4);
        scales.reserve(tokens * layout.segment_count);
        sums.reserve(tokens * layout.segment_count);
    }
};

// Linear layers with one input, such as q, k and v: they are computed in one step, with one barrier after it.
struct LinearGroup {
    // The row blocks [first, last) of one part of a matrix.
    struct RowSlice {
        const PackedMatrix* matrix;
        const FormatRows* rows;
        int output; // number of the matrix in the group
        int input;  // number of its quantized input
        int64_t first, last;
    };

    std::vector<PackedMatrix> matrices;
    std::vector<const PackedMatrix*> inputs; // one matrix for each way in which the input is quantized
    std::vector<std::vector<RowSlice>> thread_slices;

    // Those of the matrices that are there. With no threads, nothing is computed with the group but its inputs.
    LinearGroup(const std::vector<const edgerazor_matrix*>& from, int threads) {
        for (const edgerazor_matrix* matrix : from)
            if (matrix->part_count > 0) matrices.emplace_back(*matrix);
        std::vector<RowSlice> slices;
        double bytes = 0;
        for (size_t m = 0; m < matrices.size(); m++) {
            const int input = input_of(matrices[m]);
            for (const FormatRows& rows : matrices[m].parts) {
                slices.push_back({&matrices[m], &rows, (int)m, input, 0, row_blocks(rows.count)});
                bytes += block_bytes(slices.back()) * (double)slices.back().last;
            }
        }
        share_out(slices, bytes, threads);
    }

    LinearGroup(const LinearGroup&) = delete; // slices point into it
    LinearGroup(LinearGroup&&) = default;

    bool empty() const { return matrices.empty(); }
    int64_t columns() const { return matrices[0].layout->columns; }
    int block() const { return matrices[0].block; } // of the rotation of the input; 0: none
    const uint8_t* signs() const { return matrices[0].signs; }

    // The number of the input that a matrix, of this group or of another one, gets; as many as there are: none of them.
    int find_input(const PackedMatrix& matrix) const {
        int number = 0;
        while (number < (int)inputs.size() && !inputs[number]->quantizes_like(matrix)) number++;
        return number;
    }

  private:
    static constexpr int64_t kTileBlocks = 4; // row blocks that the largest tile of a GEMM computes side by side

    // Bytes of a row block, which is what it costs: the products wait for memory.
    static double block_bytes(const RowSlice& slice) {
        const RowLayout& layout = *slice.matrix->layout;
        return (double)(codes_bytes(slice.rows->bits, layout.quads) + 2 * kBlockRows * (int64_t)layout.groups);
    }

    int input_of(const PackedMatrix& matrix) {
        const int number = find_input(matrix);
        if (number == (int)inputs.size()) inputs.push_back(&matrix);
        return number;
    }

    // Gives each thread equally many bytes, cut between whole tiles.
    void share_out(const std::vector<RowSlice>& slices, double bytes, int threads) {
        thread_slices.resize(threads);
        double before = 0; // bytes of the slices before this one
        for (const RowSlice& slice : slices) {
            const double block = block_bytes(slice);
            int64_t first = 0;
            for (int thread = 0; thread < threads; thread++) {
                const double end = (bytes * (thread + 1) / threads - before) / block;
                int64_t last = (int64_t)(end / kTileBlocks + 0.5) * kTileBlocks;
                last = thread + 1 == threads ? slice.last : std::min(std::max(last, first), slice.last);
                if (last > first)
                    thread_slices[thread].push_back({slice.matrix, slice.rows, slice.output, slice.input, first, last});
                first = last;
            }
            before += block * (double)slice.last;
        }
    }
};

} // namespace edgerazor
