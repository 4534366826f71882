// Tables for a byte of five base-3 digits: with r = t0 + 3 t1 + 9 t2 + 27 t3, the byte is 64 t4 + r where r < 64 (so it
// is below 192), else 192 + 17 t4 + (r - 64).
#pragma once
#include <stdint.h>

namespace {

constexpr int kLongDigits = 192; // bytes from here on have r >= 64
constexpr int kLongCount = 17;   // of them for each t4

// t0 to t3 as 2-bit fields, low bits first.
constexpr uint8_t four_fields(int r) { return (uint8_t)(r % 3 | r / 3 % 3 << 2 | r / 9 % 3 << 4 | r / 27 << 6); }

// Looked up by the low six bits of a byte: the fields of short and of long bytes, and t4 of long ones in the top bits.
struct DigitTables {
    alignas(64) uint8_t short_fields[64], long_fields[64], long_last[64];
    constexpr DigitTables() : short_fields(), long_fields(), long_last() {
        for (int i = 0; i < 64; i++) short_fields[i] = four_fields(i);
        for (int i = 0; i < 3 * kLongCount; i++) {
            long_fields[i] = four_fields(64 + i % kLongCount);
            long_last[i] = (uint8_t)(i / kLongCount << 6);
        }
    }
};

constexpr DigitTables kDigits;

} // namespace
