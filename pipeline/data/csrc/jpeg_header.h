// What must be known of a JPEG before libjpeg sees it: its size, and where its restart markers may lie.
#pragma once

#include "loader.h"

namespace noisynn {

struct JpegHeader {
    struct Piece {
        uint32_t begin, end;
    };
    static constexpr int kMaxPieces = 64;

    int width, height, components;
    int mcu_width, mcu_height;  // pixels
    bool sequential;            // SOF0 or SOF1: one scan may hold everything
    int scan_components;        // of the first scan
    uint32_t restart_interval;  // MCUs; 0: no restart markers
    size_t frame;               // where the SOF marker stands
    size_t scan;                // where the first scan's data begin
    int pieces;                 // segments that decoding a part needs, up to SOS
    Piece piece[kMaxPieces];
};

// False for what is no JPEG of 8 bits and Huffman codes, of one or three components, or is odd in any other way.
bool read_jpeg_header(const uint8_t* data, size_t size, JpegHeader& header);

// Whether the data of the scans are followed by an end. Pillow refuses a file that was cut off, even below the crop.
bool has_end(const uint8_t* data, size_t size, const JpegHeader& header);

}  // namespace noisynn
