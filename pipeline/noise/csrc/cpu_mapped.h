// Runs an operator over all of every sample on the CPU, in parallel, whatever the strides.
//
// Where a sample is no single stretch of memory (channels_last, a slice of a wider tensor), a tile of it is brought into
// the logical order in a core's cache, worked on there and brought back: main memory is read once and written once.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu_operators.h"
#include "layout.h"

namespace noisynn {

constexpr int64_t kChunk = 1 << 14;  // elements of one task: some 10 us of work, and a whole number of vectors
constexpr int64_t kTile = 1 << 16;   // elements that are brought into order at a time: 256 KB of floats

// Elements [begin, end) of `samples` samples.
struct Task {
    int64_t first, samples, begin, end;
    const char* x;  // where element 0 of sample `first` is, or would be
    char* y;
    int64_t x_stride, y_stride;  // to the next sample, in elements
    bool streams;                // as in Kernels

    const char* x_of(int64_t sample, int64_t bytes) const { return x + (sample - first) * x_stride * bytes; }
    char* y_of(int64_t sample, int64_t bytes) const { return y + (sample - first) * y_stride * bytes; }
    // Leaves elements before `stop` as they are.
    void copy_until(int64_t stop, int64_t bytes) const {
        for (int64_t i = first; stop > begin && i < first + samples; ++i)
            std::memmove(y_of(i, bytes) + begin * bytes, x_of(i, bytes) + begin * bytes, (stop - begin) * bytes);
    }
};

// A rectangle of a sample's rows and columns.
struct Tile {
    int64_t row, rows, column, columns;
    int64_t size() const { return rows * columns; }
};

// The inner loop runs along what lies together in the strided memory.
template <class E, class Move>
inline void for_places(const Tile& tile, const Strides& strides, E* memory, const Move& move) {
    E* corner = memory + tile.row * strides.row + tile.column * strides.column;
    if (strides.column <= strides.row) {
        for (int64_t r = 0; r < tile.rows; ++r)
            for (int64_t c = 0; c < tile.columns; ++c)
                move(corner[r * strides.row + c * strides.column], r * tile.columns + c);
    } else {
        for (int64_t c = 0; c < tile.columns; ++c)
            for (int64_t r = 0; r < tile.rows; ++r)
                move(corner[r * strides.row + c * strides.column], r * tile.columns + c);
    }
}

template <class Bytes>
inline void with_size(int64_t bytes, const Bytes& run) {
    if (bytes == 2) run(uint16_t{});
    if (bytes == 4) run(uint32_t{});
    if (bytes == 8) run(uint64_t{});
}

template <class Work>
void run_flat(const Layout& layout, int64_t group, int64_t bytes, const char* x, char* y, const Work& work) {
    const int64_t chunks = (layout.size + kChunk - 1) / kChunk, groups = (layout.samples + group - 1) / group;
    const bool streams = layout.samples * layout.size * bytes >= kStreamed;
    torch::stable::parallel_for(0, groups * chunks, 1, [&](int64_t from, int64_t to) {
        for (int64_t number = from; number < to; ++number) {
            const int64_t first = number / chunks * group, begin = number % chunks * kChunk;
            work(Task{first, std::min(group, layout.samples - first), begin, std::min(layout.size, begin + kChunk),
                      x + first * layout.from.sample * bytes, y + first * layout.to.sample * bytes,
                      layout.from.sample, layout.to.sample, streams});
        }
    });
}

template <class Work>
void run_tiled(const Layout& layout, int64_t group, int64_t bytes, const char* x, char* y, const Work& work) {
    const int64_t most = std::max<int64_t>(1, kTile / group);
    // Whole rows, or a part of one: so a tile is a stretch of the logical order.
    const int64_t columns = std::min(layout.columns, most), rows = std::clamp<int64_t>(most / columns, 1, layout.rows);
    const int64_t across = (layout.columns + columns - 1) / columns, down = (layout.rows + rows - 1) / rows;
    const int64_t groups = (layout.samples + group - 1) / group;
    torch::stable::parallel_for(0, groups * down * across, 1, [&](int64_t from, int64_t to) {
        // Where samples are mixed, each is read again after the first was written: the result has a place of its own.
        std::vector<char> memory(group * rows * columns * bytes), mixed(group > 1 ? memory.size() : 0);
        char* const result = group > 1 ? mixed.data() : memory.data();
        for (int64_t number = from; number < to; ++number) {
            const int64_t first = number / (down * across) * group, samples = std::min(group, layout.samples - first);
            const int64_t row = number / across % down * rows, column = number % across * columns;
            const Tile tile = {row, std::min(rows, layout.rows - row), column, std::min(columns, layout.columns - column)};
            const int64_t begin = row * layout.columns + column, size = tile.size();
            with_size(bytes, [&](auto element) {
                using E = decltype(element);
                E* ordered = reinterpret_cast<E*>(memory.data());
                for (int64_t i = 0; i < samples; ++i)
                    for_places(tile, layout.from, reinterpret_cast<const E*>(x) + (first + i) * layout.from.sample,
                               [&](const E& value, int64_t place) { ordered[i * size + place] = value; });
            });
            work(Task{first, samples, begin, begin + size, origin(memory.data(), begin, bytes),
                      origin(result, begin, bytes), size, size, false});
            with_size(bytes, [&](auto element) {
                using E = decltype(element);
                const E* ordered = reinterpret_cast<const E*>(result);
                for (int64_t i = 0; i < samples; ++i)
                    for_places(tile, layout.to, reinterpret_cast<E*>(y) + (first + i) * layout.to.sample,
                               [&](E& value, int64_t place) { value = ordered[i * size + place]; });
            });
        }
    });
}

// work(task) for all of every group of samples. by_place: element by element nothing depends on where in the sample it is.
template <class Work>
Tensor mapped(const Tensor& x, int64_t first_token, int64_t group, bool by_place, const Work& work) {
    Tensor y = torch::stable::empty_like(x);
    Layout layout(x, y, first_token);
    if (layout.samples * layout.size == 0) return y;
    if (!layout.fits) {
        const Tensor ordered = mapped(torch::stable::contiguous(x), first_token, group, by_place, work);
        return torch::stable::copy_(y, ordered);
    }
    if (by_place && layout.spared == 0 && layout.is_same_order()) layout = layout.as_flat();
    const int64_t bytes = x.element_size(), members = std::min(group, layout.samples);
    const char* from = static_cast<const char*>(x.const_data_ptr());
    char* to = static_cast<char*>(y.mutable_data_ptr());
    if (layout.is_flat())
        run_flat(layout, members, bytes, from, to, work);
    else
        run_tiled(layout, members, bytes, from, to, work);
    return y;
}

}  // namespace noisynn
