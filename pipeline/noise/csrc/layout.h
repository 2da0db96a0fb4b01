// How x and the result lie in memory, so that neither needs to be copied into the logical order, in which noise is drawn.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>

namespace noisynn {

using torch::stable::Tensor;

// From one sample, row or column to the next, in elements.
struct Strides {
    int64_t sample = 0, row = 0, column = 1;
};

// Elements of each sample before `first_token`, which stay as they are.
inline int64_t spared_of(const Tensor& x, int64_t first_token) {
    STD_TORCH_CHECK(first_token == 0 || x.dim() >= 2, "first_token needs an axis of tokens");
    int64_t spared = x.dim() < 2 ? 0 : first_token < x.size(1) ? first_token : x.size(1);
    for (int64_t axis = 2; axis < x.dim(); ++axis) spared *= x.size(axis);
    return spared;
}

// Two tensors of one shape, (samples, ...): a sample's element r * columns + c lies at r * row + c * column.
struct Layout {
    int64_t samples = 0, size = 1;  // size: elements of a sample, of which the first `spared` stay as they are
    int64_t rows = 1, columns = 1, spared = 0;
    Strides from, to;
    bool fits = true;  // false: a sample has more than two axes of strides of their own

    Layout(const Tensor& x, const Tensor& y, int64_t first_token) {
        STD_TORCH_CHECK(x.dim() >= 1, "noise takes (samples, ...)");
        samples = x.size(0);
        from.sample = x.stride(0), to.sample = y.stride(0);
        int found = 0;  // axes so far, the last of the shape first: columns, then rows
        for (int64_t axis = x.dim() - 1; axis >= 1; --axis) {
            const int64_t length = x.size(axis), step = x.stride(axis), y_step = y.stride(axis);
            size *= length;
            if (length == 1) continue;
            if (found == 0) {
                columns = length, from.column = step, to.column = y_step, found = 1;
            } else if (found == 1 && step == columns * from.column && y_step == columns * to.column) {
                columns *= length;
            } else if (found == 1) {
                rows = length, from.row = step, to.row = y_step, found = 2;
            } else if (step == rows * from.row && y_step == rows * to.row) {
                rows *= length;
            } else {
                fits = false;
            }
        }
        STD_TORCH_CHECK(size >> 34 == 0, "a sample has 2^34 elements at most: blocks of four are counted in 32 bits");
        spared = spared_of(x, first_token);
        if (rows == 1) from.row = columns, to.row = columns;
    }

    // Memory goes through each sample in the logical order, without gaps.
    bool is_flat() const { return rows == 1 && from.column == 1 && to.column == 1; }
    // Rows of neighbouring elements, with gaps between them in x.
    bool is_pitched() const {
        return from.column == 1 && to.column == 1 && to.row == columns;
    }
    // Columns of neighbouring elements: channels_last.
    bool is_turned() const { return from.row == 1 && to.row == 1 && to.column == rows; }

    // Each sample fills one stretch of memory, in the same order in both: what acts place by place may take it as flat.
    bool is_same_order() const {
        const bool ordered = from.row == to.row && from.column == to.column;
        return ordered && (is_pitched() || is_turned());
    }
    Layout as_flat() const {
        Layout flat = *this;
        flat.rows = 1, flat.columns = size;
        flat.from = {from.sample, size, 1}, flat.to = {to.sample, size, 1};
        return flat;
    }
};

}  // namespace noisynn
