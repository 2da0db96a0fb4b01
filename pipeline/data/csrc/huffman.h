// Huffman tables of a sequential JPEG, in the form in which entropy_core.h reads them.
#pragma once

#include <cstdint>

namespace noisynn {

constexpr int kBlock = 64;  // coefficients

// One more than the longest code that is looked up: an entry must know its value's first bit, which is its sign.
constexpr int kLookBits = 10;
constexpr int kMaxCodeBits = 16;
// What a looked up code and its value may take: three of them then fit the 56 bits that are there after a refill.
constexpr int kMaxSymbolBits = 18;

// What the next bits say, as one word: where the fields lie spares masks. Entries can be summed up, and what overflows
// at the top is not missed.
//   bits 0-5    code and value together
//   bit 7       whether the fast loop leaves it to the slow one
//   bits 8-14   coefficients to go on by: the run of zeros and 1
//   bits 16-31  what is to be added to code and value, read as one number, to make the value, modulo 2^16
//               of a slow entry: Meaning
using Entry = uint32_t;
enum Meaning : uint32_t { end_of_block, sixteen_zeros, unknown };  // unknown: a longer code, or none at all

constexpr uint32_t bits_of(Entry entry) { return entry & 63; }
constexpr uint32_t advance_of(Entry entry) { return entry >> 8 & 127; }
constexpr bool is_slow(Entry entry) { return (entry & 128) != 0; }
constexpr Meaning meaning_of(Entry entry) { return Meaning(entry >> 16); }

// A code by itself. length 0: none.
struct Code {
    uint8_t length, symbol;
    uint32_t value_bits, run;
};

struct HuffmanTable {
    Entry look[1 << kLookBits];
    // Zigzag order to rows; what is past the end falls on the last, and is found afterwards. It stands here, the same
    // in every table, since that spares the inner loop a register.
    uint8_t natural[kBlock + 16];
    // For longer codes: of each length the first code that is too long, left-aligned, and where its symbols lie.
    uint32_t limit[kMaxCodeBits + 2];
    int32_t offset[kMaxCodeBits + 1];
    uint8_t counts[kMaxCodeBits + 1], symbols[256];
    bool is_dc, is_set = false;

    // counts[1..16]: codes of each length; symbols: theirs. False where these are no Huffman code, or none of a
    // sequential JPEG of 8 bits. Nothing is done where the table holds the same already.
    bool set(const uint8_t* counts, const uint8_t* symbols, bool is_dc);

    // The code that `bits` begin with.
    Code search(uint64_t bits) const;

  private:
    bool fill();
};

// To pass over coefficients several at a time: what is needed of them is where they end.
//   bits 0-5    bits of whole symbols; 0: none has a code of at most kSkipBits
//   bits 8-14   coefficients to go on by
//   bit 15      whether the last symbol ends the block
struct SkipTable {
    static constexpr int kSkipBits = 10;
    uint16_t look[1 << kSkipBits];
    uint8_t counts[kMaxCodeBits + 1], symbols[256];
    bool is_set = false;

    void set(const HuffmanTable& table);
};

}  // namespace noisynn
