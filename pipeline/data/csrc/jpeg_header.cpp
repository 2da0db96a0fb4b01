#include "jpeg_header.h"

#include <algorithm>
#include <cstring>

namespace noisynn {
namespace {

enum Marker { SOF0 = 0xC0, SOF1 = 0xC1, SOF2 = 0xC2, DHT = 0xC4, SOI = 0xD8, EOI = 0xD9, SOS = 0xDA, DQT = 0xDB };
enum OtherMarker { DRI = 0xDD, APP0 = 0xE0, APP14 = 0xEE, APP15 = 0xEF, COM = 0xFE };

uint32_t word_at(const uint8_t* data) { return uint32_t(data[0]) << 8 | data[1]; }

bool read_frame(const uint8_t* body, size_t length, JpegHeader& header) {
    if (length < 6 || body[0] != 8) return false;
    header.height = int(word_at(body + 1));
    header.width = int(word_at(body + 3));
    header.components = body[5];
    if (header.width == 0 || header.height == 0) return false;
    if ((header.components != 1 && header.components != 3) || length != 6 + 3 * size_t(header.components)) return false;
    int widest = 0, tallest = 0;
    for (int component = 0; component < header.components; ++component) {
        const int factors = body[7 + 3 * component];
        if (factors >> 4 < 1 || factors >> 4 > 4 || (factors & 15) < 1 || (factors & 15) > 4) return false;
        widest = std::max(widest, factors >> 4);
        tallest = std::max(tallest, factors & 15);
    }
    // The MCU of a single component is one block, whatever its factors say.
    header.mcu_width = header.components == 1 ? 8 : 8 * widest;
    header.mcu_height = header.components == 1 ? 8 : 8 * tallest;
    return true;
}

// JFIF and Adobe say what the colours are; all other APPn and comments can be left out. So can DRI: a part of a scan is
// handed to libjpeg without its markers.
bool is_needed(int marker) { return (marker < APP0 && marker != DRI) || marker == APP0 || marker == APP14; }

}  // namespace

bool read_jpeg_header(const uint8_t* data, size_t size, JpegHeader& header) {
    header = JpegHeader{};
    if (size < 4 || data[0] != 0xFF || data[1] != SOI) return false;
    size_t at = 2;
    while (size - at >= 4 && data[at] == 0xFF) {
        const int marker = data[at + 1];
        if (marker == 0xFF) {
            ++at;
            continue;
        }
        const size_t length = word_at(data + at + 2), end = at + 2 + length;
        if (length < 2 || end > size) return false;
        const uint8_t* body = data + at + 4;
        if (marker == SOF0 || marker == SOF1 || marker == SOF2) {
            if (header.frame != 0 || !read_frame(body, length - 2, header)) return false;
            header.frame = at;
            header.sequential = marker != SOF2;
        } else if (marker == DRI) {
            if (length != 4) return false;
            header.restart_interval = word_at(body);
        } else if (marker != SOS && marker != DHT && marker != DQT && marker != COM &&
                   (marker < APP0 || marker > APP15)) {
            return false;
        }
        if (is_needed(marker)) {
            if (header.pieces == JpegHeader::kMaxPieces) return false;
            header.piece[header.pieces++] = {uint32_t(at), uint32_t(end)};
        }
        at = end;
        if (marker == SOS) {
            header.scan_components = length > 2 ? body[0] : 0;
            header.scan = at;
            return header.frame != 0;
        }
    }
    return false;
}

bool has_end(const uint8_t* data, size_t size, const JpegHeader& header) {
    size_t end = size;
    while (end > header.scan) {
        const void* found = memrchr(data + header.scan, EOI, end - header.scan);
        if (found == nullptr) return false;
        end = size_t(static_cast<const uint8_t*>(found) - data);
        if (end > header.scan && data[end - 1] == 0xFF) return true;
    }
    return false;
}

}  // namespace noisynn
