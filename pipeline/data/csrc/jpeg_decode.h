// The pixels of a part of a JPEG, by libjpeg-turbo: the same as Pillow's, which decodes the whole.
#pragma once

#include "mcu_source.h"

namespace noisynn {

// Is given rows from the window's top on; `rows` points to the window's first column, RGBX.
using TakeRows = void (*)(void* context, const uint8_t* rows, size_t stride, int count);

constexpr int kStripRows = 16;  // the most that TakeRows gets: they stay in the first cache

// What a thread keeps from picture to picture.
struct Decoder {
    Scan scan;
    McuSource source;
    Buffer strip;

    void let_go_of_much() { scan.let_go_of_much(), source.let_go_of_much(), strip.let_go_of_much(); }
};

// False for whatever libjpeg warns of, and for what Pillow does in another way. window lies inside the picture.
// spared: whether restart markers allowed to leave something out.
bool decode_window(const uint8_t* data, size_t size, const JpegHeader&, Box window, Decoder&, bool& spared,
                   TakeRows take, void* context);

// Whether parts are decoded by entropy.h; else libjpeg here is another than it was built for, and does all by itself.
bool replaces_entropy_decoder();

}  // namespace noisynn
