#include "crop.h"

#include <algorithm>
#include <cmath>

#include "../../noise/csrc/lanes_scalar.h"

namespace noisynn {
namespace {

constexpr int kAttempts = 10;

struct Attempt {
    double area, ratio, left, top;  // each in (0, 1]
};

// reference.uniforms in float64: exact, so the same in any language.
double unit(uint32_t word) { return word * 0x1p-32 + 0x1p-33; }

Attempt draw(uint32_t block, uint32_t stream, int64_t sample_id, const View& view) {
    const Draw key{view.seed, view.epoch, stream, uint64_t(sample_id)};
    uint32_t words[1][4];
    draw_words<Scalar>(block, key, RoundKeys(key), words);
    return {unit(words[0][0]), unit(words[0][1]), unit(words[0][2]), unit(words[0][3])};
}

// Python's round(): half to even, which is the processor's default mode.
double python_round(double value) { return std::nearbyint(value); }

// augment._box, in its order of operations.
Box training_box(int width, int height, int64_t sample_id, const View& view) {
    const double low = view.scale[0], high = view.scale[1];
    const double log_low = std::log(view.ratio[0]), log_high = std::log(view.ratio[1]);
    for (int attempt = 0; attempt < kAttempts; ++attempt) {
        const Attempt drawn = draw(attempt, view.crop_stream, sample_id, view);
        const double area = double(int64_t(width) * height) * (low + (high - low) * drawn.area);
        const double ratio = std::exp(log_low + (log_high - log_low) * drawn.ratio);
        const double w = python_round(std::sqrt(area * ratio)), h = python_round(std::sqrt(area / ratio));
        if (0 < w && w <= width && 0 < h && h <= height) {
            const int free_x = width - int(w), free_y = height - int(h);
            return {std::min(int(drawn.left * (free_x + 1)), free_x), std::min(int(drawn.top * (free_y + 1)), free_y),
                    int(w), int(h)};
        }
    }
    const int w = int(std::min(double(width), std::max(1.0, python_round(height * view.ratio[1]))));
    const int h = int(std::min(double(height), std::max(1.0, python_round(width / view.ratio[0]))));
    return {(width - w) / 2, (height - h) / 2, w, h};
}

}  // namespace

Framing training_framing(int width, int height, int64_t sample_id, const View& view) {
    const bool flip = draw(0, view.flip_stream, sample_id, view).area <= view.flip;
    return {training_box(width, height, sample_id, view), view.size, view.size, 0, 0, flip};
}

Framing evaluation_framing(int width, int height, const View& view) {
    const Box whole{0, 0, width, height};
    if (view.squash) return {whole, view.size, view.size, 0, 0, false};
    const auto side = int64_t(std::floor(view.size / view.eval_crop_share));
    const bool wide = width > height;
    const int longer = int(side * (wide ? width : height) / (wide ? height : width));
    const int w = wide ? longer : int(side), h = wide ? int(side) : longer;
    const int left = int(python_round((w - view.size) / 2.0)), top = int(python_round((h - view.size) / 2.0));
    return {whole, w, h, left, top, false};
}

}  // namespace noisynn
