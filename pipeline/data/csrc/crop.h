// Which part of a picture becomes which pixels: pipeline/data/augment.py is the specification, to the bit.
#pragma once

#include "loader.h"

namespace noisynn {

// The source box is resized as a whole to (width, height), and of that the S x S from (left, top) on are kept.
struct Framing {
    Box source;  // in pixels of the picture
    int width, height, left, top;
    bool flip;
};

// augment.training_crops for one sample.
Framing training_framing(int width, int height, int64_t sample_id, const View& view);

// augment.evaluation_transform: torchvision's Resize and CenterCrop, as timm composes them.
Framing evaluation_framing(int width, int height, const View& view);

inline Framing framing(int width, int height, int64_t sample_id, const View& view) {
    return view.training ? training_framing(width, height, sample_id, view) : evaluation_framing(width, height, view);
}

}  // namespace noisynn
