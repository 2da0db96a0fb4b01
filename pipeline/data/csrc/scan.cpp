#include "scan.h"

#include <algorithm>
#include <cstring>

#include "entropy.h"

namespace noisynn {
namespace {

constexpr uint32_t RST0 = 0xD0, EOI = 0xD9;

int divided_up(int value, int by) { return (value + by - 1) / by; }

// Whole MCUs that cover a window and one pixel around it: a chroma sample of the neighbour counts for the first and
// last pixel, no further.
struct Span {
    int first, last;  // [first, last)
};

Span covering(int begin, int end, int length, int unit) {
    return {std::max(begin - 1, 0) / unit, divided_up(std::min(end + 1, length), unit)};
}

}  // namespace

bool Scan::set(const uint8_t* data, size_t size, const JpegHeader& of, Box window) {
    if (!of.sequential || of.scan_components != of.components) return false;
    const int columns = divided_up(of.width, of.mcu_width), rows = divided_up(of.height, of.mcu_height);
    const int interval = of.restart_interval != 0 ? int(of.restart_interval) : columns * rows;
    Span x = covering(window.left, window.left + window.width, of.width, of.mcu_width);
    // Where chroma is at most two samples wide, libjpeg upsamples in another way.
    if (x.last == columns && of.width - x.first * of.mcu_width <= 4) x.first = std::max(x.first - 1, 0);
    const Span y = covering(window.top, window.top + window.height, of.height, of.mcu_height);
    left = x.first * of.mcu_width, top = y.first * of.mcu_height;
    width = std::min(x.last * of.mcu_width, of.width) - left;
    height = std::min(y.last * of.mcu_height, of.height) - top;
    find_units(x.first, x.last, y.first, y.last, columns, interval);
    const int count = divided_up(columns * rows, interval);
    spared = numbers.size() < size_t(count);
    if (!take_bytes(data, size, of.scan, uint32_t(count))) return false;
    for (Unit& unit : units) unit.closes = unit.closes && numbers[unit.segment] + 1 < uint32_t(count);
    write_header(data, of);
    return true;
}

void Scan::find_units(int first_column, int last_column, int first_row, int last_row, int columns, int interval) {
    units.clear(), numbers.clear();
    independent = true;
    int position = 0;
    for (int row = first_row; row < last_row; ++row) {
        const int behind = row * columns + last_column;
        for (int mcu = row * columns + first_column; mcu < behind;) {
            const int number = mcu / interval, end = std::min((number + 1) * interval, behind);
            const bool first = numbers.empty() || int(numbers.back()) != number;
            if (first)
                numbers.push_back(uint32_t(number)), position = number * interval;
            else
                independent = false;
            units.push_back({int(numbers.size()) - 1, mcu - position, end - mcu, first, end % interval == 0});
            position = mcu = end;
        }
    }
}

bool Scan::take_bytes(const uint8_t* data, size_t size, size_t scan, uint32_t count) {
    uint8_t* const room = bytes.take(size - scan + Lane::kReadAhead);
    const uint8_t *at = data + scan, *const last = data + size - 1;
    uint8_t* out = room;
    segments.clear();
    // What comes after the last that is needed changes nothing.
    for (uint32_t number = 0; segments.size() < numbers.size(); ++number) {
        const bool needed = numbers[segments.size()] == number;
        uint8_t* const begin = out;
        at = entropy_kernels().to_marker(at, last, needed ? &out : nullptr);
        if (at == nullptr || at[1] != (number + 1 == count ? EOI : RST0 + number % 8)) return false;
        if (needed) segments.push_back({size_t(begin - room), size_t(out - room)});
        at += 2;
    }
    std::memset(out, 0, Lane::kReadAhead);
    return true;
}

void Scan::write_header(const uint8_t* data, const JpegHeader& of) {
    uint8_t* const room = header.take(of.scan);
    uint8_t* out = room;
    const auto copy = [&](size_t begin, size_t end) {
        std::memcpy(out, data + begin, end - begin);
        out += end - begin;
    };
    copy(0, 2);
    for (int i = 0; i < of.pieces; ++i) {
        const auto [begin, end] = of.piece[i];
        uint8_t* const frame = out;
        copy(begin, end);
        if (begin != of.frame) continue;
        frame[5] = uint8_t(height >> 8), frame[6] = uint8_t(height);
        frame[7] = uint8_t(width >> 8), frame[8] = uint8_t(width);
    }
    header_size = size_t(out - room);
}

}  // namespace noisynn
