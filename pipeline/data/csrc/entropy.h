// The coefficients of sequential JPEGs from their Huffman codes: half of a picture's time. libjpeg-turbo decodes all of
// the scan up to the window's end; with restart markers it even takes its slower way ("usefast" in jdhuff.c).
// Here the bytes are freed of stuffing first, so that the inner loop looks at nothing but codes; what lies beside the
// window is passed over several codes at a time; and where restart markers allow it, two segments are decoded at once:
// each code begins where the one before it ends, and while that is found out, the other segment is worked on.
//
// RandomResizedCrop(224) of 250 ImageNet pictures, all that a picture takes on one core of Zen 4, in microseconds:
//
//                                        plain   with data_prep's markers
//   libjpeg-turbo 2.1.5's own decoder    1,035   808
//   this one                               788   562
//   this one, one segment at a time        788   644
#pragma once

#include <cstddef>

#include "huffman.h"

namespace noisynn {

constexpr int kMaxMcuBlocks = 10;  // D_MAX_BLOCKS_IN_MCU

// The blocks of an MCU, in a ring.
struct BlockPlan {
    const HuffmanTable *dc, *ac;
    const SkipTable* skip;
    const BlockPlan* next;
    int component;
};

struct McuPlan {
    int blocks;
    BlockPlan block[kMaxMcuBlocks];
};

// One segment (or scan without restart markers) that is being read. Its bytes have no stuffing any more, and
// kReadAhead may be read behind them.
struct Lane {
    static constexpr size_t kReadAhead = 512;
    enum State { idle, reading, done, bad };

    // Of `bits`, `count` are counted as there, from the top; those behind them are right as well, or zeros.
    uint64_t bits;
    uint32_t count;
    uint32_t index;  // in the block, in zigzag order, of the coefficient that came last
    const uint8_t *at, *end;
    int16_t* block;  // of zeros; a DC coefficient is stored as its difference to the one before
    const BlockPlan* plan;
    int blocks;  // still to come
    State state;

    void start(const McuPlan& whose, const uint8_t* first, const uint8_t* behind) {
        *this = Lane{};
        plan = whose.block, at = first, end = behind;
    }

    // Bits of the segment that are left; below 0 where it was read past its end.
    int64_t left() const { return 8 * (end - at) + count; }
};

struct EntropyKernels {
    const char* name;
    // From `at` to the next marker: where its FF stands, or nullptr where none begins before `last`. With an `out`,
    // what lies before it is copied there, with a single FF for each FF 00, and *out moved behind it. Up to 32 bytes
    // are read past `last` and written past *out.
    const uint8_t* (*to_marker)(const uint8_t* at, const uint8_t* last, uint8_t** out);
    // Reads lane.blocks blocks to lane.block and on. Returns with state done or bad.
    void (*one)(Lane& lane);
    // Two lanes at once, until one of them is done or bad; the other can go on later.
    void (*pair)(Lane& a, Lane& b);
    // Sets a lane to read so many blocks to `block`; its state may be bad at once.
    void (*aim)(Lane& lane, int blocks, int16_t* block);
    // Passes over blocks, and adds their DC differences up for each component; false where the data are bad.
    bool (*skip)(Lane& lane, int blocks, uint32_t* last_dc);
    // Moves the blocks of an MCU, and leaves zeros; of DC differences it makes sums.
    void (*move)(const McuPlan& plan, int16_t* from, int16_t (*const* to)[kBlock], uint32_t* last_dc);
};

extern const EntropyKernels entropy_any, entropy_bmi2;

const EntropyKernels& entropy_kernels();

}  // namespace noisynn
