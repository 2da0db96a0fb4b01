#include "jpeg_decode.h"

#include <algorithm>
#include <csetjmp>
#include <cstdio>

#include <jpeglib.h>

namespace noisynn {
namespace {

constexpr int kMargin = 4 * 32;  // columns beside the window: MCUs are at most 32 wide

struct Errors {
    jpeg_error_mgr base;
    std::jmp_buf place;
};

[[noreturn]] void give_up(j_common_ptr info) { std::longjmp(reinterpret_cast<Errors*>(info->err)->place, 1); }

// Level -1 is a warning: the data are corrupt, and libjpeg goes on with a guess.
void on_message(j_common_ptr info, int level) {
    if (level < 0) give_up(info);
}

// All of the data are there from the start: to be asked for more means that the file breaks off.
boolean no_more(j_decompress_ptr info) { give_up(reinterpret_cast<j_common_ptr>(info)); }

void skip(j_decompress_ptr info, long count) {
    if (count <= 0) return;
    if (size_t(count) > info->src->bytes_in_buffer) give_up(reinterpret_cast<j_common_ptr>(info));
    info->src->next_input_byte += count;
    info->src->bytes_in_buffer -= size_t(count);
}

bool is_plain(const jpeg_decompress_struct& info) {
    if (info.arith_code || info.data_precision != 8) return false;
    return info.jpeg_color_space == JCS_GRAYSCALE || info.jpeg_color_space == JCS_YCbCr ||
           info.jpeg_color_space == JCS_RGB;
}

// A progressive file that never sends some bits is smoothed, by rules that differ between versions of libjpeg.
bool is_complete(const jpeg_decompress_struct& info) {
    if (info.coef_bits == nullptr) return true;
    for (int component = 0; component < info.num_components; ++component)
        for (int coefficient = 0; coefficient < DCTSIZE2; ++coefficient)
            if (info.coef_bits[component][coefficient] != 0) return false;
    return true;
}

// Cuts the output to whole MCUs around the window; returns the first column that comes out.
int crop_columns(jpeg_decompress_struct& info, Box window) {
    const int unit = info.max_h_samp_factor * DCTSIZE, width = int(info.output_width);
    int left = std::max(window.left - 1, 0) / unit * unit;
    const int right = std::min((window.left + window.width + unit) / unit * unit, width);
    // Where chroma is at most two samples wide, libjpeg upsamples in another way.
    if (right == width && width - left <= 4) left = std::max(left - unit, 0);
    if (left == 0 && right == width) return 0;
    JDIMENSION first = JDIMENSION(left), count = JDIMENSION(right - left);
    jpeg_crop_scanline(&info, &first, &count);
    return int(first);
}

// Comes here with rows above the window left to read, at most some rows of MCUs.
void read_rows(jpeg_decompress_struct& info, Box window, int left, uint8_t* strip, TakeRows take, void* context) {
    const size_t stride = 4 * size_t(info.output_width);
    const int bottom = window.top + window.height;
    int held = 0;
    while (int(info.output_scanline) < bottom) {
        JSAMPROW rows[kStripRows];
        const int next = int(info.output_scanline);
        const int wanted = next < window.top ? std::min(window.top - next, kStripRows)
                                             : std::min(bottom - next, kStripRows - held);
        for (int row = 0; row < wanted; ++row) rows[row] = strip + (held + row) * stride;
        const int got = int(jpeg_read_scanlines(&info, rows, JDIMENSION(wanted)));
        if (next < window.top) continue;
        held += got;
        if (held == kStripRows || next + got == bottom) {
            take(context, strip + 4 * size_t(window.left - left), stride, held);
            held = 0;
        }
    }
}

}  // namespace

bool decode_window(const uint8_t* data, size_t size, Box window, Buffer& strip, TakeRows take, void* context) {
    uint8_t* const room = strip.take(4 * size_t(window.width + kMargin) * kStripRows);
    jpeg_decompress_struct info{};
    Errors errors;
    info.err = jpeg_std_error(&errors.base);
    errors.base.error_exit = give_up;
    errors.base.emit_message = on_message;
    jpeg_source_mgr source{};
    source.init_source = [](j_decompress_ptr) {};
    source.fill_input_buffer = no_more;
    source.skip_input_data = skip;
    source.resync_to_restart = jpeg_resync_to_restart;
    source.term_source = [](j_decompress_ptr) {};
    source.next_input_byte = data;
    source.bytes_in_buffer = size;
    // Made anew for each picture (1 us): tables of one must not decode another that lacks its own.
    if (setjmp(errors.place)) {
        jpeg_destroy_decompress(&info);
        return false;
    }
    jpeg_create_decompress(&info);
    info.src = &source;
    jpeg_read_header(&info, TRUE);
    if (!is_plain(info)) give_up(reinterpret_cast<j_common_ptr>(&info));
    info.out_color_space = JCS_EXT_RGBX;
    jpeg_start_decompress(&info);
    if (!is_complete(info)) give_up(reinterpret_cast<j_common_ptr>(&info));
    const int left = crop_columns(info, window);
    if (int(info.output_width) > window.width + kMargin) give_up(reinterpret_cast<j_common_ptr>(&info));
    const int mcu_height = info.max_v_samp_factor * DCTSIZE;
    const int above = std::max(window.top - 1, 0) / mcu_height * mcu_height;
    if (above > 0) jpeg_skip_scanlines(&info, JDIMENSION(above));
    read_rows(info, window, left, room, take, context);
    jpeg_destroy_decompress(&info);
    return true;
}

}  // namespace noisynn
