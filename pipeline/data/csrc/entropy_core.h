// The loops of entropy.h, compiled once for each instruction set: shifts by a register's count take one operation with
// BMI2 and three without.
#pragma once

#include <bit>
#include <cstring>

#include "entropy.h"

namespace noisynn {
namespace {

#define NN_INLINE inline __attribute__((always_inline))

// A lane's hot part, in registers.
struct Reader {
    uint64_t bits;
    uint32_t count;
    uint32_t sum;  // of entries, since the last refill, upon the index
    const uint8_t* at;
    int16_t* block;
    const HuffmanTable* ac;

    NN_INLINE explicit Reader(const Lane& lane)
        : bits(lane.bits), count(lane.count), sum(lane.index << 8), at(lane.at), block(lane.block),
          ac(lane.plan->ac) {}

    NN_INLINE void settle() {
        count -= sum & 63;
        sum &= 0x7F00;
    }

    NN_INLINE void put_back(Lane& lane) {
        settle();
        lane.bits = bits, lane.count = count, lane.index = sum >> 8, lane.at = at, lane.block = block;
    }
};

// At least 56 bits are there then.
template <class Bits>
NN_INLINE void refill(Bits& from) {
    uint64_t next;
    std::memcpy(&next, from.at, sizeof(next));
    if constexpr (std::endian::native == std::endian::little) next = __builtin_bswap64(next);
    from.bits |= next >> from.count;
    from.at += (from.count ^ 63) >> 3;
    from.count |= 56;
}

template <class Bits>
NN_INLINE void drop(Bits& from, uint32_t count) {
    from.bits <<= count;
    from.count -= count;
}

// A value that begins with 0 is negative, and one less than its ones' complement.
NN_INLINE int32_t take_value(Lane& lane, const Code& code) {
    drop(lane, code.length);
    if (code.value_bits == 0) return 0;
    const int32_t value = int32_t(lane.bits >> (64 - code.value_bits));
    const bool negative = lane.bits >> 63 == 0;
    drop(lane, code.value_bits);
    return negative ? value + 1 - (1 << code.value_bits) : value;
}

// Code and value as one number.
NN_INLINE uint32_t number_of(uint64_t bits, Entry entry) { return uint32_t(bits >> ((0 - entry) & 63)); }

NN_INLINE bool fail(Lane& lane) {
    lane.state = Lane::bad;
    return false;
}

// A DC coefficient; false where there is none. At least 56 bits are there before it.
NN_INLINE bool take_dc(Lane& lane, int32_t& value) {
    const Entry entry = lane.plan->dc->look[lane.bits >> (64 - kLookBits)];
    if (!is_slow(entry)) [[likely]] {
        value = int16_t(number_of(lane.bits, entry) + (entry >> 16));
        drop(lane, bits_of(entry));
        return true;
    }
    const Code code = lane.plan->dc->search(lane.bits);
    value = take_value(lane, code);
    return code.length != 0;
}

// Goes on to the next block, and takes its DC coefficient; false where the lane's work has ended. Once a block it is
// seen whether the segment is over: no more than Lane::kReadAhead can be read behind it until then.
bool begin_block(Lane& lane) {
    refill(lane);
    int32_t value;
    if (!take_dc(lane, value) || lane.left() < 0) return fail(lane);
    lane.block[0] = int16_t(value);
    lane.index = 0;
    refill(lane);
    return true;
}

__attribute__((noinline)) bool end_block(Lane& lane) {
    if (--lane.blocks == 0) {
        lane.state = lane.left() < 0 ? Lane::bad : Lane::done;
        lane.plan = lane.plan->next;
        return false;
    }
    lane.plan = lane.plan->next;
    lane.block += kBlock;
    return begin_block(lane);
}

// What the fast loop leaves because it is rare: long codes, runs of zeros, and all that is wrong.
__attribute__((noinline)) bool handle(Lane& lane, Entry entry) {
    if (!is_slow(entry)) return fail(lane);
    refill(lane);
    const Code code = lane.plan->ac->search(lane.bits);
    if (code.length == 0) return fail(lane);
    const int32_t value = take_value(lane, code);
    if (code.symbol == 0) return end_block(lane);
    lane.index += code.run + 1;
    refill(lane);
    if (code.value_bits == 0) return lane.index < kBlock - 1 || fail(lane);  // a coefficient comes after sixteen zeros
    if (lane.index >= kBlock) return fail(lane);
    lane.block[lane.plan->ac->natural[lane.index]] = int16_t(value);
    return lane.index < kBlock - 1 || end_block(lane);
}

// As end_block, in registers; leaves at least 38 bits, enough for two symbols.
NN_INLINE bool next_block(Reader& reader, Lane& lane) {
    reader.count -= reader.sum & 63;
    reader.sum = 0;
    refill(reader);
    const BlockPlan* const plan = lane.plan->next;
    const Entry entry = plan->dc->look[reader.bits >> (64 - kLookBits)];
    if (lane.blocks == 1 || is_slow(entry) || reader.at > lane.end + 8) [[unlikely]] {
        reader.put_back(lane);
        const bool goes_on = end_block(lane);
        reader = Reader(lane);
        return goes_on;
    }
    --lane.blocks;
    lane.plan = plan;
    reader.block += kBlock;
    reader.block[0] = int16_t(number_of(reader.bits, entry) + (entry >> 16));
    reader.bits <<= bits_of(entry);
    reader.sum = bits_of(entry);
    reader.ac = plan->ac;
    return true;
}

// One symbol; false where the lane's work has ended.
NN_INLINE bool step(Reader& reader, Lane& lane) {
    const Entry entry = reader.ac->look[reader.bits >> (64 - kLookBits)];
    uint32_t index = kBlock;
    if (!is_slow(entry)) [[likely]] {
        const uint32_t value = number_of(reader.bits, entry) + (entry >> 16);
        reader.bits <<= bits_of(entry);
        reader.sum += entry;
        index = uint8_t(reader.sum >> 8);
        reader.block[reader.ac->natural[index]] = int16_t(value);
        if (index < kBlock - 1) [[likely]] return true;
    } else if (entry >> 16 == end_of_block) {
        reader.bits <<= bits_of(entry);
        reader.sum += bits_of(entry);
        index = kBlock - 1;
    }
    if (index == kBlock - 1) [[likely]] return next_block(reader, lane);
    reader.put_back(lane);
    const bool goes_on = handle(lane, entry);
    reader = Reader(lane);
    return goes_on;
}

// Before three steps.
NN_INLINE void prepare(Reader& reader) {
    reader.settle();
    refill(reader);
}

void one(Lane& lane) {
    Reader reader(lane);
    do prepare(reader);
    while (step(reader, lane) && step(reader, lane) && step(reader, lane));
    reader.put_back(lane);
}

void pair(Lane& lane_a, Lane& lane_b) {
    Reader a(lane_a), b(lane_b);
    while (true) {
        prepare(a);
        prepare(b);
        if (!step(a, lane_a) || !step(b, lane_b) || !step(a, lane_a) || !step(b, lane_b) || !step(a, lane_a) ||
            !step(b, lane_b))
            break;
    }
    a.put_back(lane_a);
    b.put_back(lane_b);
}

void aim(Lane& lane, int blocks, int16_t* block) {
    lane.blocks = blocks, lane.block = block, lane.state = Lane::reading;
    begin_block(lane);
}

// One symbol of an AC table by itself; whether the block goes on.
__attribute__((noinline)) bool skip_symbol(Lane& lane) {
    refill(lane);
    const Code code = lane.plan->ac->search(lane.bits);
    if (code.length == 0) return fail(lane);
    drop(lane, code.length + code.value_bits);
    if (code.symbol == 0) return false;
    lane.index += code.run + 1;
    if (lane.index >= kBlock) return fail(lane);
    return lane.index < kBlock - 1;
}

NN_INLINE void skip_coefficients(Lane& lane) {
    const uint16_t* look = lane.plan->skip->look;
    while (true) {
        refill(lane);
        for (int i = 0; i < 2; ++i) {
            const uint32_t some = look[lane.bits >> (64 - SkipTable::kSkipBits)];
            const uint32_t index = lane.index + (some >> 8 & 127);
            // At the block's last coefficient there is no end_of_block: what looks like one belongs to the next.
            if ((some & 63) != 0 && (index < kBlock - 1 || (index == kBlock - 1 && some >> 15 == 0))) [[likely]] {
                drop(lane, some & 63);
                lane.index = index;
                if (some >> 15 != 0 || index == kBlock - 1) return;
            } else {
                if (!skip_symbol(lane)) return;
                break;
            }
        }
    }
}

bool skip(Lane& given, int blocks, uint32_t* last_dc) {
    Lane lane = given;
    for (; blocks > 0; --blocks, lane.plan = lane.plan->next) {
        int32_t value;
        refill(lane);
        if (!take_dc(lane, value) || lane.left() < 0) return false;
        last_dc[lane.plan->component] += uint32_t(value);
        lane.index = 0;
        skip_coefficients(lane);
        if (lane.state == Lane::bad) return false;
    }
    given = lane;
    return given.left() >= 0;
}

// memset and memcpy of a known size become string operations here, which take six times as long.
typedef int64_t Row __attribute__((vector_size(32), aligned(2), may_alias));

void move(const McuPlan& plan, int16_t* from, int16_t (*const* to)[kBlock], uint32_t* last_dc) {
    constexpr int kRows = kBlock * sizeof(int16_t) / sizeof(Row);
    for (int i = 0; i < plan.blocks; ++i, from += kBlock) {
        int16_t* const block = *to[i];
        const uint32_t dc = last_dc[plan.block[i].component] += uint32_t(int32_t(from[0]));
        Row rows[kRows];
        for (int row = 0; row < kRows; ++row) rows[row] = reinterpret_cast<const Row*>(from)[row];
        for (int row = 0; row < kRows; ++row) reinterpret_cast<Row*>(from)[row] = Row{};
        for (int row = 0; row < kRows; ++row) reinterpret_cast<Row*>(block)[row] = rows[row];
        block[0] = int16_t(dc);  // as libjpeg: of a sum that is too large, the low 16 bits
    }
}

}  // namespace
}  // namespace noisynn
