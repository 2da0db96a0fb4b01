// The resize's passes without vector instructions.
#include <algorithm>

#include "resize.h"

namespace noisynn {
namespace {

constexpr int32_t kHalf = 1 << (kWeightBits - 1);

uint8_t clip(int32_t sum) { return uint8_t(std::clamp(sum >> kWeightBits, 0, 255)); }

void horizontal(const uint8_t* in, size_t in_stride, int rows, const Axis& axis, uint8_t* out, size_t out_stride) {
    for (int row = 0; row < rows; ++row, in += in_stride, out += out_stride) {
        for (int x = 0; x < axis.count; ++x) {
            const uint8_t* pixel = in + 4 * size_t(axis.start[x]);
            const int32_t* weights = &axis.weights[size_t(x) * axis.taps];
            int32_t red = kHalf, green = kHalf, blue = kHalf;
            for (int tap = 0; tap < axis.taps; ++tap, pixel += 4) {
                red += weights[tap] * pixel[0];
                green += weights[tap] * pixel[1];
                blue += weights[tap] * pixel[2];
            }
            out[3 * x] = clip(red), out[3 * x + 1] = clip(green), out[3 * x + 2] = clip(blue);
        }
    }
}

void vertical(const uint8_t* in, size_t in_stride, const Axis& axis, uint8_t* out, int columns) {
    constexpr int kBlock = 64;
    for (int y = 0; y < axis.count; ++y, out += columns) {
        const uint8_t* rows = in + axis.start[y] * in_stride;
        const int32_t* weights = &axis.weights[size_t(y) * axis.taps];
        for (int first = 0; first < columns; first += kBlock) {
            const int width = std::min(kBlock, columns - first);
            int32_t sums[kBlock];
            std::fill_n(sums, width, kHalf);
            for (int tap = 0; tap < axis.taps; ++tap) {
                const uint8_t* row = rows + tap * in_stride + first;
                for (int x = 0; x < width; ++x) sums[x] += weights[tap] * row[x];
            }
            for (int x = 0; x < width; ++x) out[first + x] = clip(sums[x]);
        }
    }
}

}  // namespace

const ResizeKernels resize_scalar = {"one lane", [](Axis&) {}, horizontal, vertical};

}  // namespace noisynn
