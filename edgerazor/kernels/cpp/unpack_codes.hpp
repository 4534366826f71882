// Packed codes to quads of bytes: one chunk of bit planes or base-3 digits at a time. Included by `matmul.hpp`.
#pragma once
#include <string.h>

namespace {

constexpr int smaller(int a, int b) { return a < b ? a : b; }
constexpr int larger(int a, int b) { return a > b ? a : b; }

// The largest u of a format's codes, as its accumulator is chosen by it.
constexpr int max_code_of(int bits) { return accumulator_bound(bits == kTernary ? 2 : (1 << bits) - 1); }

// Quad q of the whole chunk of b-bit codes at w.
template <int bits, int q, int width = 8, int offset = 0>
EDGERAZOR_INLINE u8x64 unpack_bits_quad(const uint8_t* w) {
    if constexpr ((bits & width) == 0) {
        return unpack_bits_quad<bits, q, width / 2, offset>(w);
    } else {
        constexpr int fields = 8 / width;
        const u8x64 low = extract_bits<(q % fields) * width, width>(load(w + offset + q / fields * kVectorBytes));
        if constexpr ((bits & (width - 1)) == 0) {
            return low;
        } else {
            return combine_bits<width>(low, unpack_bits_quad<bits, q, width / 2, offset + width * kVectorBytes>(w));
        }
    }
}

// The last chunk of b-bit codes, which has fewer quads, one byte at a time.
inline void unpack_bits_tail(int bits, const uint8_t* w, int quads, uint8_t* out, int stride) {
    for (int q = 0; q < quads; q++) memset(out + q * stride, 0, kVectorBytes);
    int shift = 0;
    for (int width = 8; width > 0; width /= 2) {
        if ((bits & width) == 0) continue;
        const int fields = 8 / width, mask = (1 << width) - 1;
        for (int q = 0; q < quads; q++)
            for (int i = 0; i < kVectorBytes; i++)
                out[q * stride + i] |= (w[q / fields * kVectorBytes + i] >> (q % fields * width) & mask) << shift;
        w += (quads * width + 7) / 8 * kVectorBytes;
        shift += width;
    }
}

// A chunk of at most 64 quads of ternary codes.
inline void unpack_ternary(const uint8_t* w, int quads, uint8_t* out, int stride) {
    for (; quads >= 5; quads -= 5, w += kVectorBytes, out += 5 * stride) {
        const Trits five = unpack_trits(load(w));
        unroll<0, 5>(UNROLL(f) { store(out + f.value * stride, digit<f.value>(five)); });
    }
    if (quads > 0) unpack_bits_tail(2, w, quads, out, stride);
}

// Quads [first, last) of a row block, where `first` begins a chunk, to out + (quad - first) * stride.
template <int bits>
void unpack(const uint8_t* block, int first, int last, uint8_t* out, int stride) {
    constexpr int chunk = chunk_quads(bits), bytes = chunk_vectors(bits, chunk) * kVectorBytes;
    const uint8_t* w = block + (int64_t)(first / chunk) * bytes;
    for (int q = first; q < last; q += chunk, w += bytes, out += (int64_t)chunk * stride) {
        const int quads = smaller(chunk, last - q);
        if constexpr (bits == kTernary) {
            unpack_ternary(w, quads, out, stride);
        } else if (quads == chunk) {
            unroll<0, chunk>(UNROLL(i) { store(out + i.value * stride, unpack_bits_quad<bits, i.value>(w)); });
        } else {
            unpack_bits_tail(bits, w, quads, out, stride);
        }
    }
}

// Row blocks of base-3 codes as row blocks of 2-bit codes, for machines on which it takes longer to unpack base-3
// digits than to read the additional bytes.
void expand_ternary(const RowLayout& layout, const uint8_t* codes, int64_t blocks, uint8_t* out) {
    const int64_t block_bytes = codes_bytes(kTernary, layout.quads);
    alignas(kVectorBytes) uint8_t slab[kSlabQuads * kVectorBytes];
    for (int64_t block = 0; block < blocks; block++, codes += block_bytes)
        for (int begin = 0; begin < layout.quads; begin += kSlabQuads) {
            const int end = smaller(begin + kSlabQuads, layout.quads);
            memset(slab, 0, sizeof slab);
            unpack<kTernary>(codes, begin, end, slab, kVectorBytes);
            for (int q = 0; q < end - begin; q += 4, out += kVectorBytes) {
                const uint8_t* u = slab + q * kVectorBytes;
                const u8x64 high = combine_bits<2>(load(u + 2 * kVectorBytes), load(u + 3 * kVectorBytes));
                const u8x64 fields = combine_bits<2>(load(u), combine_bits<2>(load(u + kVectorBytes), high));
                alignas(kVectorBytes) uint8_t vector[kVectorBytes];
                store(vector, fields);
                memcpy(out, vector, kVectorBytes);
            }
        }
}

} // namespace
