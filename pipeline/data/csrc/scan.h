// The one scan of a sequential JPEG, cut down to what a window needs. With restart markers that is the segments under
// it; without them, all from the beginning to the window's last row.
#pragma once

#include <vector>

#include "jpeg_header.h"

namespace noisynn {

// A run of MCUs of the window in one segment.
struct Unit {
    int segment;   // of Scan::segments
    int skipped;   // MCUs before it, from the segment's beginning or from the unit before it in the segment
    int wanted;    // MCUs
    bool first;    // of its segment's
    bool closes;   // a restart marker must follow
};

// The window in whole MCUs, with one more where chroma upsampling looks at a neighbour.
struct Scan {
    struct Segment {
        size_t begin, end;  // of `bytes`
    };

    int left, top, width, height;   // pixels of the picture that its MCUs cover
    std::vector<Unit> units;        // in the order of the window's MCUs
    std::vector<uint32_t> numbers;  // of the segments that are needed
    std::vector<Segment> segments;  // theirs
    bool independent;               // no segment has two units
    bool spared;                    // there are segments that are not needed
    Buffer bytes;                   // of these segments, stuffing taken out; Lane::kReadAhead follow
    Buffer header;                  // a JPEG's of that part alone, up to where its scan begins
    size_t header_size;

    // False for what libjpeg must read by itself: several scans, or markers that are not those that must be there. Up
    // to 64 bytes are read past the data.
    bool set(const uint8_t* data, size_t size, const JpegHeader&, Box window);

    void let_go_of_much() {
        constexpr size_t kMany = 1 << 16;  // a picture of 4 megapixels with a marker after each MCU has 16,000
        bytes.let_go_of_much(), header.let_go_of_much();
        if (units.capacity() <= kMany) return;
        units = std::vector<Unit>();
        numbers = std::vector<uint32_t>();
        segments = std::vector<Segment>();
    }

  private:
    void find_units(int first_column, int last_column, int first_row, int last_row, int columns, int interval);
    bool take_bytes(const uint8_t* data, size_t size, size_t scan, uint32_t count);
    void write_header(const uint8_t* data, const JpegHeader&);
};

}  // namespace noisynn
