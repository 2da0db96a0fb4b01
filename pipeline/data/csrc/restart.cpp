#include "restart.h"

#include <algorithm>
#include <cstring>

namespace noisynn {
namespace {

constexpr int RST0 = 0xD0, EOI = 0xD9;

int divided_up(int value, int by) { return (value + by - 1) / by; }

// How the scan is cut: `across` segments in a row of MCUs, each of `interval` MCUs; or, across = 1, `down` whole rows.
struct Grid {
    int columns, rows;  // MCUs
    int interval, across, down;

    int segments() const { return across * divided_up(rows, down); }
};

bool grid_of(const JpegHeader& header, Grid& grid) {
    if (!header.sequential || header.scan_components != header.components || header.restart_interval == 0)
        return false;
    grid.columns = divided_up(header.width, header.mcu_width);
    grid.rows = divided_up(header.height, header.mcu_height);
    grid.interval = int(header.restart_interval);
    if (grid.columns % grid.interval == 0)
        grid.across = grid.columns / grid.interval, grid.down = 1;
    else if (grid.interval % grid.columns == 0)
        grid.across = 1, grid.down = grid.interval / grid.columns;
    else
        return false;
    return grid.segments() > 1;
}

// Where each segment begins, and two past the last one's end. False unless the markers are those that must be there.
bool find_segments(const uint8_t* data, size_t size, size_t scan, int count, std::vector<uint32_t>& segments) {
    segments.clear();
    if (scan + 2 > size) return false;
    segments.push_back(uint32_t(scan));
    const uint8_t *at = data + scan, *const last = data + size - 1;
    while ((at = static_cast<const uint8_t*>(memchr(at, 0xFF, size_t(last - at)))) != nullptr) {
        const int marker = at[1];
        at += 2;
        if (marker == 0) {
            if (at >= last) return false;
            continue;
        }
        const int found = int(segments.size());
        segments.push_back(uint32_t(at - data));
        if (marker == EOI) return found == count;
        if (found == count || marker != RST0 + (found - 1) % 8 || at >= last) return false;
    }
    return false;
}

// Whole MCUs, or whole segments, that cover a window and one pixel around it: a chroma sample of the neighbour counts
// for the first and last pixel, no further. At the right edge two of them, since libjpeg upsamples in another way where
// chroma is at most two samples wide.
struct Span {
    int first, last;  // [first, last)
};

Span covering(int begin, int end, int length, int unit) {
    const int first = std::max(begin - 1, 0) / unit;
    const int last = divided_up(std::min(end + 1, length), unit);
    const bool narrow = last * unit >= length && length - first * unit <= 4;
    return {std::max(first - narrow, 0), last};
}

size_t copy(uint8_t* out, size_t at, const uint8_t* data, size_t begin, size_t end) {
    std::memcpy(out + at, data + begin, end - begin);
    return at + (end - begin);
}

size_t copy_header(uint8_t* out, const uint8_t* data, const JpegHeader& header, int width, int height) {
    size_t at = copy(out, 0, data, 0, 2);
    for (int i = 0; i < header.pieces; ++i) {
        const auto [begin, end] = header.piece[i];
        if (begin == header.frame) {
            uint8_t* frame = out + at;
            copy(out, at, data, begin, end);
            frame[5] = uint8_t(height >> 8), frame[6] = uint8_t(height);
            frame[7] = uint8_t(width >> 8), frame[8] = uint8_t(width);
            at += end - begin;
        } else {
            at = copy(out, at, data, begin, end);
        }
    }
    return at;
}

}  // namespace

bool splice(const uint8_t* data, size_t size, const JpegHeader& header, Box window, std::vector<uint32_t>& segments,
            Buffer& buffer, Splice& out) {
    Grid grid;
    if (!grid_of(header, grid)) return false;
    const int segment_width = header.mcu_width * (grid.across == 1 ? grid.columns : grid.interval);
    const int segment_height = header.mcu_height * grid.down;
    const Span x = covering(window.left, window.left + window.width, header.width, segment_width);
    const Span y = covering(window.top, window.top + window.height, header.height, segment_height);
    if ((x.last - x.first) * (y.last - y.first) == grid.segments()) return false;
    if (!find_segments(data, size, header.scan, grid.segments(), segments)) return false;

    out.left = x.first * segment_width, out.top = y.first * segment_height;
    out.width = std::min(x.last * segment_width, header.width) - out.left;
    out.height = std::min(y.last * segment_height, header.height) - out.top;
    uint8_t* spliced = buffer.take(size);
    size_t at = copy_header(spliced, data, header, out.width, out.height);
    int number = 0;
    for (int row = y.first; row < y.last; ++row) {
        for (int column = x.first; column < x.last; ++column, ++number) {
            const int segment = row * grid.across + column;
            if (number > 0) spliced[at++] = 0xFF, spliced[at++] = uint8_t(RST0 + (number - 1) % 8);
            at = copy(spliced, at, data, segments[segment], segments[segment + 1] - 2);
        }
    }
    spliced[at++] = 0xFF, spliced[at++] = EOI;
    out.data = spliced, out.size = at;
    return true;
}

}  // namespace noisynn
