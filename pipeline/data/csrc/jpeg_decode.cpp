#include "jpeg_decode.h"

#include <algorithm>
#include <csetjmp>
#include <cstdio>
#include <cstring>
#include <memory>

#include <jpeglib.h>
// libjpeg's own header: of what it tells, only that the entropy decoder begins with start_pass and decode_mcu is used.
#include <jpegint.h>

#include "mcu_source.h"

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

// All rows of MCUs but those that the window, or the upsampling of its first row, needs.
void skip_rows(jpeg_decompress_struct& info, Box window) {
    const int unit = info.max_v_samp_factor * DCTSIZE, above = std::max(window.top - 1, 0) / unit * unit;
    if (above > 0) jpeg_skip_scanlines(&info, JDIMENSION(above));
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

boolean next_mcu(j_decompress_ptr info, JBLOCKROW* blocks) {
    if (!static_cast<McuSource*>(info->client_data)->next(blocks)) give_up(reinterpret_cast<j_common_ptr>(info));
    return TRUE;
}

bool set_tables(const jpeg_decompress_struct& info, bool skips, McuSource& source) {
    McuPlan& plan = source.plan_room;
    plan.blocks = info.blocks_in_MCU;
    for (int block = 0; block < plan.blocks; ++block) {
        const int component = info.MCU_membership[block];
        const jpeg_component_info& its = *info.cur_comp_info[component];
        const JHUFF_TBL &dc = *info.dc_huff_tbl_ptrs[its.dc_tbl_no], &ac = *info.ac_huff_tbl_ptrs[its.ac_tbl_no];
        plan.block[block] = {&source.dc[its.dc_tbl_no], &source.ac[its.ac_tbl_no], &source.skip[its.ac_tbl_no],
                             &plan.block[(block + 1) % plan.blocks], component};
        if (block > 0 && component == plan.block[block - 1].component) continue;
        if (!source.dc[its.dc_tbl_no].set(dc.bits, dc.huffval, true)) return false;
        if (!source.ac[its.ac_tbl_no].set(ac.bits, ac.huffval, false)) return false;
        if (skips) source.skip[its.ac_tbl_no].set(source.ac[its.ac_tbl_no]);
    }
    return true;
}

// From here on libjpeg, which has read the header, gets its coefficients from `source`.
bool replace_entropy_decoder(jpeg_decompress_struct& info, const Scan& scan, McuSource& source) {
    if (info.progressive_mode || jpeg_has_multiple_scans(&info)) return false;
    size_t wanted = 0;
    for (const Unit& unit : scan.units) wanted += size_t(unit.wanted);
    if (size_t(info.MCUs_per_row) * info.MCU_rows_in_scan != wanted) return false;
    if (!set_tables(info, !scan.independent, source)) return false;
    source.begin(source.plan_room, scan);
    info.client_data = &source;
    info.entropy->decode_mcu = next_mcu;
    return true;
}

bool decode(const uint8_t* data, size_t size, Decoder* part, Box window, Buffer& strip, TakeRows take, void* context) {
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
    if (part != nullptr && !replace_entropy_decoder(info, part->scan, part->source))
        give_up(reinterpret_cast<j_common_ptr>(&info));
    int left = 0;
    if (part == nullptr) {
        left = crop_columns(info, window);
        skip_rows(info, window);
    }
    if (int(info.output_width) > window.width + kMargin) give_up(reinterpret_cast<j_common_ptr>(&info));
    read_rows(info, window, left, room, take, context);
    jpeg_destroy_decompress(&info);
    return true;
}

// False where nothing was tried; `decoded` says how it ended.
bool decode_part(const uint8_t* data, size_t size, const JpegHeader& header, Box window, Decoder& decoder,
                 bool& decoded, TakeRows take, void* context) {
    Scan& scan = decoder.scan;
    if (!scan.set(data, size, header, window)) return false;
    decoder.source.make_room(scan);  // where no longjmp passes, nor an exception libjpeg
    window.left -= scan.left, window.top -= scan.top;
    decoded = decode(scan.header.data(), scan.header_size, &decoder, window, decoder.strip, take, context);
    return true;
}

// A small JPEG of three components with restart markers; its length, or 0.
size_t write_probe(uint8_t* room, size_t bytes) {
    constexpr int kWidth = 72, kHeight = 40;
    jpeg_compress_struct info{};
    Errors errors;
    info.err = jpeg_std_error(&errors.base);
    errors.base.error_exit = give_up;
    uint8_t* out = room;
    unsigned long size = bytes;
    if (setjmp(errors.place)) {
        jpeg_destroy_compress(&info);
        return 0;
    }
    jpeg_create_compress(&info);
    jpeg_mem_dest(&info, &out, &size);
    info.image_width = kWidth, info.image_height = kHeight, info.input_components = 3, info.in_color_space = JCS_RGB;
    jpeg_set_defaults(&info);
    info.restart_interval = 1;
    jpeg_start_compress(&info, TRUE);
    uint8_t pixels[3 * kWidth];
    for (int y = 0; y < kHeight; ++y) {
        for (int i = 0; i < 3 * kWidth; ++i) pixels[i] = uint8_t(i * i * (y + 3) >> 4);
        JSAMPROW row = pixels;
        jpeg_write_scanlines(&info, &row, 1);
    }
    jpeg_finish_compress(&info);
    jpeg_destroy_compress(&info);
    return out == room ? size : 0;
}

// Whether libjpeg's entropy decoder can be replaced: by a picture, since it does not tell how it looks inside.
bool part_is_as_whole() {
    static constexpr Box kWindow{20, 18, 40, 20};
    constexpr size_t kRoom = 4096;
    uint8_t probe[kRoom + Buffer::kSlack];
    struct Pixels {
        uint8_t rgbx[4 * kWindow.width * kWindow.height] = {};
        size_t done = 0;

        static void take(void* context, const uint8_t* rows, size_t stride, int count) {
            auto& to = *static_cast<Pixels*>(context);
            for (int row = 0; row < count; ++row, rows += stride, to.done += 4 * kWindow.width)
                std::memcpy(to.rgbx + to.done, rows, 4 * kWindow.width);
        }
    };
    const auto decoder = std::make_unique<Decoder>();
    Pixels whole, part;
    JpegHeader header;
    const size_t size = write_probe(probe, kRoom);
    bool decoded = false;
    return read_jpeg_header(probe, size, header) &&
           decode(probe, size, nullptr, kWindow, decoder->strip, Pixels::take, &whole) &&
           decode_part(probe, size, header, kWindow, *decoder, decoded, Pixels::take, &part) && decoded &&
           whole.done == part.done && std::memcmp(whole.rgbx, part.rgbx, sizeof(part.rgbx)) == 0;
}

}  // namespace

bool replaces_entropy_decoder() {
    static const bool works = part_is_as_whole();
    return works;
}

bool decode_window(const uint8_t* data, size_t size, const JpegHeader& header, Box window, Decoder& decoder,
                   bool& spared, TakeRows take, void* context) {
    bool decoded = false;
    spared = false;
    if (!replaces_entropy_decoder() || !decode_part(data, size, header, window, decoder, decoded, take, context))
        return decode(data, size, nullptr, window, decoder.strip, take, context);
    spared = decoder.scan.spared;
    return decoded;
}

}  // namespace noisynn
