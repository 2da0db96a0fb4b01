// The pixels of a part of a JPEG, by libjpeg-turbo: the same as Pillow's, which decodes the whole.
#pragma once

#include "loader.h"

namespace noisynn {

// Is given rows from the window's top on; `rows` points to the window's first column, RGBX.
using TakeRows = void (*)(void* context, const uint8_t* rows, size_t stride, int count);

constexpr int kStripRows = 16;  // the most that TakeRows gets: they stay in the first cache

// False for whatever libjpeg warns of, and for what Pillow does in another way. window lies inside the picture.
bool decode_window(const uint8_t* data, size_t size, Box window, Buffer& strip, TakeRows take, void* context);

}  // namespace noisynn
