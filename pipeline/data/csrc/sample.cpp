#include "sample.h"

#include <algorithm>
#include <cerrno>
#include <cstring>

#include <libdeflate.h>
#include <unistd.h>

namespace noisynn {
namespace {

Status read_checked(const Item& item, bool verify, uint8_t* bytes) {
    size_t done = 0;
    while (done < item.size) {
        const ssize_t got = pread(item.fd, bytes + done, item.size - done, off_t(item.offset + done));
        if (got < 0 && errno == EINTR) continue;
        if (got < 0) return read_failed;
        if (got == 0) return wrong_bytes;
        done += size_t(got);
    }
    return !verify || libdeflate_crc32(0, bytes, item.size) == item.crc32 ? ok : wrong_bytes;
}

// Raw rows as RGBX; X is whatever follows. The pixel after the last is read: Buffer's slack.
void expand(const uint8_t* rgb, size_t stride, Box window, uint8_t* strip, TakeRows take, void* context) {
    const size_t out_stride = 4 * size_t(window.width);
    for (int done = 0; done < window.height;) {
        const int rows = std::min(kStripRows, window.height - done);
        for (int row = 0; row < rows; ++row) {
            const uint8_t* from = rgb + size_t(window.top + done + row) * stride + 3 * size_t(window.left);
            uint8_t* to = strip + row * out_stride;
            for (int x = 0; x < window.width; ++x) std::memcpy(to + 4 * size_t(x), from + 3 * size_t(x), 4);
        }
        take(context, strip, out_stride, rows);
        done += rows;
    }
}

// Whether Pillow (13.0) resizes the height first: where that drops rows, and more than two for each column that the
// other pass drops. Found by comparing both orders with its own over 4,000 sizes; older versions began with the width.
bool height_first(const Framing& framing) {
    const int rows = framing.source.height - framing.height, columns = framing.source.width - framing.width;
    return rows > 0 && rows > 2 * columns;
}

// Rows of pixels as they come from the decoder, and what becomes of them.
struct Rows {
    const Axis& axis;
    uint8_t* out;
    size_t stride;

    static void narrow(void* context, const uint8_t* rows, size_t stride, int count) {
        auto& to = *static_cast<Rows*>(context);
        resize_kernels()->horizontal(rows, stride, count, to.axis, to.out, to.stride);
        to.out += count * to.stride;
    }

    static void keep(void* context, const uint8_t* rows, size_t stride, int count) {
        auto& to = *static_cast<Rows*>(context);
        for (int row = 0; row < count; ++row, rows += stride, to.out += to.stride) std::memcpy(to.out, rows, to.stride);
    }
};

Status header_of(const uint8_t* bytes, const Item& item, JpegHeader& header) {
    if (item.kind == raw) {
        header.width = int(item.width), header.height = int(item.height);
        if (int64_t(item.width) * item.height > kMaxPixels) return too_large;
        return 3 * size_t(item.width) * item.height == item.size && item.size > 0 ? ok : ask_reference;
    }
    if (!read_jpeg_header(bytes, item.size, header)) return ask_reference;
    if (int64_t(header.width) * header.height > kMaxPixels) return too_large;
    if (item.width != 0 && (int(item.width) != header.width || int(item.height) != header.height)) return ask_reference;
    return has_end(bytes, item.size, header) ? ok : ask_reference;
}

}  // namespace

bool window_of(const uint8_t* bytes, const Item& item, const JpegHeader& header, Box window, Workspace& workspace,
               TakeRows take, void* context) {
    if (item.kind == raw) {
        uint8_t* strip = workspace.decoder.strip.take(4 * size_t(window.width) * kStripRows);
        expand(bytes, 3 * size_t(item.width), window, strip, take, context);
        return true;
    }
    bool spared;
    return decode_window(bytes, item.size, header, window, workspace.decoder, spared, take, context);
}

Status make_picture(const uint8_t* bytes, const Item& item, const View& view, Workspace& workspace, uint8_t* out,
                    int32_t* crop) {
    JpegHeader header{};
    if (const Status status = header_of(bytes, item, header); status != ok) return status;
    const Framing framing = noisynn::framing(header.width, header.height, item.sample_id, view);
    const Box source = framing.source;
    const int32_t used[5] = {source.left, source.top, source.width, source.height, framing.flip};
    std::memcpy(crop, used, sizeof(used));

    Axis &x = workspace.x, &y = workspace.y;
    const auto interpolation = Interpolation(view.interpolation);
    x.set(source.width, framing.width, framing.left, view.size, interpolation, framing.flip);
    y.set(source.height, framing.height, framing.top, view.size, interpolation, false);
    resize_kernels()->pack(x);
    const Box window{source.left + x.begin, source.top + y.begin, x.end - x.begin, y.end - y.begin};
    const size_t wide = 4 * size_t(window.width), packed = 3 * size_t(view.size), padded = (packed + 16 + 63) / 64 * 64;
    if (!height_first(framing)) {
        uint8_t* rows = workspace.rows.take(size_t(window.height + y.overrun) * padded);
        Rows narrow{x, rows, padded};
        if (!window_of(bytes, item, header, window, workspace, Rows::narrow, &narrow)) return ask_reference;
        resize_kernels()->vertical(rows, padded, y, out, int(packed));
        return ok;
    }
    uint8_t* rows = workspace.rows.take(size_t(window.height + y.overrun) * wide);
    Rows keep{x, rows, wide};
    if (!window_of(bytes, item, header, window, workspace, Rows::keep, &keep)) return ask_reference;
    uint8_t* low = workspace.low.take(size_t(view.size) * (wide + padded));
    resize_kernels()->vertical(rows, wide, y, low, int(wide));
    uint8_t* last = low + size_t(view.size) * wide;
    resize_kernels()->horizontal(low, wide, view.size, x, last, padded);
    for (int row = 0; row < view.size; ++row) std::memcpy(out + row * packed, last + row * padded, packed);
    return ok;
}

Status make_sample(const Item& item, const View& view, Workspace& workspace, uint8_t* out, int32_t* crop) {
    Status status = ask_reference;
    try {
        uint8_t* bytes = workspace.file.take(item.size);
        status = read_checked(item, view.verify != 0, bytes);
        if (status == ok) status = make_picture(bytes, item, view, workspace, out, crop);
    } catch (const std::bad_alloc&) {  // Python says so if it has none either
    }
    workspace.let_go_of_much();
    if (status != ok) {
        std::memset(out, 0, 3 * size_t(view.size) * view.size);
        std::memset(crop, 0, 5 * sizeof(int32_t));
    }
    return status;
}

}  // namespace noisynn
