// Pillow's antialiased resize, to the bit: two passes with weights of 22 bits, uint8 in between.
#pragma once

#include <vector>

#include "loader.h"

namespace noisynn {

constexpr int kWeightBits = 22;

// Which source pixels make each output along one axis, and with what weights (sum: 2^22).
class Axis {
  public:
    // `count` outputs from `first` on, of the `resized` that `length` source pixels become; mirrored: last one first.
    void set(int length, int resized, int first, int count, Interpolation, bool mirrored);

    int begin = 0, end = 0;          // the source pixels that are used: [begin, end)
    int count = 0;                   // outputs
    int taps = 0;                    // weights of each output, zeros at the end: a multiple of 4
    int overrun = 0;                 // pixels past `end` that the zeros fall on
    std::vector<int32_t> start;      // first source pixel of each output, from `begin`
    std::vector<int32_t> weights;    // count x taps
    Buffer packed;                   // the weights as a kernel's horizontal pass wants them
    std::vector<double> exact;       // scratch
};

// The passes, once for each instruction set; all give the same bits.
struct ResizeKernels {
    const char* name;
    // Fills axis.packed.
    void (*pack)(Axis& axis);
    // RGBX rows -> RGB rows of axis.count pixels. Reads axis.overrun pixels and 64 bytes past the last that is used,
    // and writes up to 16 bytes past a row: out_stride has room for them.
    void (*horizontal)(const uint8_t* in, size_t in_stride, int rows, const Axis& axis, uint8_t* out,
                       size_t out_stride);
    // Rows of `columns` bytes -> axis.count rows, packed. Reads axis.overrun rows and 64 bytes past the last.
    void (*vertical)(const uint8_t* in, size_t in_stride, const Axis& axis, uint8_t* out, int columns);
};

extern const ResizeKernels resize_scalar, resize_avx2, resize_avx512;

// The widest that this processor has, or what NOISYNN_LANES names (for tests); nullptr where that is not to be had.
const ResizeKernels* resize_kernels();

}  // namespace noisynn
