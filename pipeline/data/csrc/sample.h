// One sample: from its place in a file to a row of the batch.
#pragma once

#include <vector>

#include "crop.h"
#include "jpeg_decode.h"
#include "jpeg_header.h"
#include "resize.h"

namespace noisynn {

// What a thread keeps from picture to picture, so that nothing is allocated in the long run.
struct Workspace {
    Buffer file, rows, low;
    Decoder decoder;
    Axis x, y;

    void let_go_of_much() {
        for (Buffer* buffer : {&file, &rows, &low}) buffer->let_go_of_much();
        decoder.let_go_of_much();
    }
};

// Fills out (S, S, 3), with zeros for every status but ok; crop: left, top, width, height, flip of the source box.
Status make_sample(const Item& item, const View& view, Workspace& workspace, uint8_t* out, int32_t* crop);

// The picture that `bytes` hold, which are item.size and right: what make_sample does once they are read and checked.
Status make_picture(const uint8_t* bytes, const Item& item, const View& view, Workspace& workspace, uint8_t* out,
                    int32_t* crop);

// The pixels of a window, given to `take` by strips. bytes: as encoded, or raw RGB of item.width x item.height.
bool window_of(const uint8_t* bytes, const Item& item, const JpegHeader& header, Box window,
               Workspace& workspace, TakeRows take, void* context);

}  // namespace noisynn
