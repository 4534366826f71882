// Look-up tables that unpack a byte of five ternary codes, t0 to t4. With r = t0 + 3 t1 + 9 t2 + 27 t3, a byte is
// "short", 64 t4 + r, where r < 64 (so it is below 192), else "long", 192 + 17 t4 + (r - 64).
#pragma once
#include <stdint.h>

namespace {

constexpr int kLongBytes = 192;   // bytes from here on are long
constexpr int kLongPerDigit = 17; // long bytes of each t4

// t0 to t3 as four 2-bit fields, t0 in the low bits.
constexpr uint8_t pack_2bit_fields(int r) { return (uint8_t)(r % 3 | r / 3 % 3 << 2 | r / 9 % 3 << 4 | r / 27 << 6); }

// Indexed by the low six bits of a byte: t0 to t3 of short and of long bytes, and t4 of long bytes in the top two bits.
struct Base3Tables {
    alignas(64) uint8_t short_fields[64], long_fields[64], long_last[64];
    constexpr Base3Tables() : short_fields(), long_fields(), long_last() {
        for (int i = 0; i < 64; i++) short_fields[i] = pack_2bit_fields(i);
        for (int i = 0; i < 3 * kLongPerDigit; i++) {
            long_fields[i] = pack_2bit_fields(64 + i % kLongPerDigit);
            long_last[i] = (uint8_t)(i / kLongPerDigit << 6);
        }
    }
};

constexpr Base3Tables kBase3;

} // namespace
