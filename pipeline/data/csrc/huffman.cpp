#include "huffman.h"

#include <algorithm>
#include <cstring>

namespace noisynn {
namespace {

constexpr uint8_t kNatural[kBlock + 16] = {
    0,  1,  8,  16, 9,  2,  3,  10, 17, 24, 32, 25, 18, 11, 4,  5,  12, 19, 26, 33, 40, 48, 41, 34, 27, 20, 13,
    6,  7,  14, 21, 28, 35, 42, 49, 56, 57, 50, 43, 36, 29, 22, 15, 23, 30, 37, 44, 51, 58, 59, 52, 45, 38, 31,
    39, 46, 53, 60, 61, 54, 47, 55, 62, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63};

constexpr uint32_t kSlow = 128;
constexpr Entry kUnknown = kSlow | unknown << 16;
constexpr uint32_t kMaxDcBits = 11, kMaxAcBits = 10;  // of a value, where samples have 8 bits

// Symbols that libjpeg lets be, but that no coefficient of 8 bits' samples needs, count as no code.
Code code_of(int symbol, int length, bool is_dc) {
    const uint32_t run = is_dc ? 0 : uint32_t(symbol) >> 4, value_bits = uint32_t(symbol) & (is_dc ? 255 : 15);
    if (value_bits > (is_dc ? kMaxDcBits : kMaxAcBits)) return {};
    if (!is_dc && value_bits == 0 && run != 0 && run != 15) return {};
    return {uint8_t(length), uint8_t(symbol), value_bits, run};
}

// `bits`: code, which is `code.length` long, and what may follow it; kLookBits in all.
Entry entry_of(const Code& code, uint32_t bits, bool is_dc) {
    const uint32_t total = code.length + code.value_bits, fields = total | (code.run + 1) << 8;
    if (code.length == 0) return kUnknown;
    const uint32_t number = bits >> (kLookBits - code.length) << code.value_bits;
    if (code.value_bits == 0 && is_dc) return fields | (0 - number) << 16;
    if (code.value_bits == 0) return fields | kSlow | (code.run == 0 ? end_of_block : sixteen_zeros) << 16;
    if (code.length == kLookBits || total > kMaxSymbolBits) return kUnknown;
    const bool positive = bits >> (kLookBits - code.length - 1) & 1;
    return fields | (0 - number - (positive ? 0 : (1u << code.value_bits) - 1)) << 16;
}

}  // namespace

bool HuffmanTable::set(const uint8_t* new_counts, const uint8_t* new_symbols, bool new_is_dc) {
    if (is_set && is_dc == new_is_dc && std::memcmp(counts, new_counts, sizeof(counts)) == 0 &&
        std::memcmp(symbols, new_symbols, sizeof(symbols)) == 0)
        return true;
    std::memcpy(counts, new_counts, sizeof(counts));
    std::memcpy(symbols, new_symbols, sizeof(symbols));
    is_dc = new_is_dc;
    is_set = fill();
    return is_set;
}

bool HuffmanTable::fill() {
    std::memcpy(natural, kNatural, sizeof(natural));
    std::fill_n(look, 1 << kLookBits, kUnknown);
    uint32_t code = 0;
    int place = 0;
    for (int length = 1; length <= kMaxCodeBits; ++length, code <<= 1) {
        offset[length] = place - int(code);
        // The code of all ones is none: padding looks like it.
        if (place + counts[length] > 256 || code + counts[length] >= (1u << length)) return false;
        for (int i = 0; i < counts[length]; ++i, ++code, ++place) {
            if (length > kLookBits) continue;
            const Code its = code_of(symbols[place], length, is_dc);
            const uint32_t first = code << (kLookBits - length), half = (1u << (kLookBits - length)) / 2;
            if (half == 0) {
                look[first] = entry_of(its, first, is_dc);
            } else {
                std::fill_n(look + first, half, entry_of(its, first, is_dc));
                std::fill_n(look + first + half, half, entry_of(its, first + half, is_dc));
            }
        }
        limit[length] = code << (kMaxCodeBits - length);
    }
    return true;
}

Code HuffmanTable::search(uint64_t bits) const {
    const uint32_t next = uint32_t(bits >> (64 - kMaxCodeBits));
    // Most that is searched for is too long to be looked up.
    int length = next < limit[kLookBits - 1] ? 1 : kLookBits;
    while (length <= kMaxCodeBits && next >= limit[length]) ++length;
    if (length > kMaxCodeBits) return {};
    return code_of(symbols[(offset[length] + int(next >> (kMaxCodeBits - length))) & 255], length, is_dc);
}

void SkipTable::set(const HuffmanTable& table) {
    if (is_set && std::memcmp(counts, table.counts, sizeof(counts)) == 0 &&
        std::memcmp(symbols, table.symbols, sizeof(symbols)) == 0)
        return;
    std::memcpy(counts, table.counts, sizeof(counts));
    std::memcpy(symbols, table.symbols, sizeof(symbols));
    is_set = true;
    Code first[1 << kSkipBits];
    for (uint32_t bits = 0; bits < 1 << kSkipBits; ++bits)
        first[bits] = table.search(uint64_t(bits) << (64 - kSkipBits));
    for (uint32_t bits = 0; bits < 1 << kSkipBits; ++bits) {
        uint32_t used = 0, advance = 0, ends = 0;
        while (used < kSkipBits && ends == 0 && advance < 64) {
            const Code& code = first[bits << used & ((1 << kSkipBits) - 1)];
            // The bits of a value need not be there: only their number counts. Those of the code must.
            if (code.length == 0 || used + code.length > kSkipBits) break;
            used += code.length + code.value_bits;
            ends = code.symbol == 0;
            if (!ends) advance += code.run + 1;
        }
        look[bits] = uint16_t(used | advance << 8 | ends << 15);
    }
}

}  // namespace noisynn
