// What one thread does where memory holds a sample column by column (channels_last): noise is drawn in the logical order,
// row by row (channel by channel), so that the layout changes nothing.
//
// A thread takes eight rows, which are neighbours in memory, of four columns: one block of Philox for each row where all
// rows begin with a block, else two.
#pragma once

#include "thread_bodies.h"

namespace noisynn {

constexpr int kColumns = 4;

struct Turned {
    int64_t samples;
    uint32_t rows, columns, spared_rows;  // rows * columns < 2^32
    int64_t x_sample, x_column;           // from one sample, and one column, to the next, in elements
    int64_t y_sample, y_column;
    bool aligned;  // every column begins at a multiple of 16 bytes, in x and in y
    const double* strength;

    NN_INLINE uint32_t row_units() const { return uint32_t(whole(rows, kUnit)); }
    NN_INLINE int64_t tasks() const { return int64_t(row_units()) * whole(columns, kColumns); }
    // Every row begins with a block: `fits` of what a thread does.
    NN_INLINE bool fits_blocks() const { return columns % 4 == 0; }
};

// change(sample, row, its place in the logical order, its values in the four columns) for each row.
template <class T, class Change>
NN_INLINE void for_turned(const Place& place, const T* x, T* y, const Turned& turned, const Change& change) {
    for_tasks(place, turned.samples, turned.tasks(), [&](int64_t sample, int64_t task) {
        const uint32_t across = uint32_t(task) / turned.row_units();
        const uint32_t row = (uint32_t(task) - across * turned.row_units()) * kUnit, column = across * kColumns;
        const uint32_t rows_left = turned.rows - row, columns_left = turned.columns - column;
        const int count = rows_left < kUnit ? int(rows_left) : kUnit;
        const int columns = columns_left < kColumns ? int(columns_left) : kColumns;
        const T* from = x + sample * turned.x_sample + column * turned.x_column + row;
        T* to = y + sample * turned.y_sample + column * turned.y_column + row;
        Unit<T> units[kColumns] = {};
#pragma unroll
        for (int c = 0; c < kColumns; ++c)
            if (c < columns) units[c].read(from + c * turned.x_column, count, turned.aligned);
        // Two rows at once, which a GPU rounds and packs in one instruction.
#pragma unroll
        for (int j = 0; j < kUnit; j += 2) {
            float values[2][kColumns];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
#pragma unroll
                for (int c = 0; c < kColumns; ++c) values[i][c] = load_one(&units[c].value[j + i]);
                if (j + i < count && row + j + i >= turned.spared_rows)
                    change(sample, row + j + i, int64_t(row + j + i) * turned.columns + column, values[i]);
            }
#pragma unroll
            for (int c = 0; c < kColumns; ++c) store_two(&units[c].value[j], values[0][c], values[1][c]);
        }
#pragma unroll
        for (int c = 0; c < kColumns; ++c)
            if (c < columns) units[c].write(to + c * turned.y_column, count, turned.aligned);
    });
}

template <class L, bool fits, class T>
NN_INLINE void gaussian_turned_thread(const Place& place, const T* x, T* y, const Turned& turned,
                                      const DrawSource& source) {
    const float std = float(*turned.strength), spread = spread_of<L>(std);
    const RoundKeys keys = source.keys();
    for_turned(place, x, y, turned, [&](int64_t sample, uint32_t, int64_t at, float (&values)[kColumns]) {
        if (std != 0) add_normals_at<L, fits>(at, source.of(sample), keys, spread, values);
    });
}

// Extremes: of each sample, or of each of its rows.
template <class L, bool fits, class T>
NN_INLINE void salt_and_pepper_turned_thread(const Place& place, const T* x, T* y, const Turned& turned,
                                             const DrawSource& source, const Extremes& extremes) {
    const Thresholds thresholds = thresholds_of(*turned.strength);
    const Replaced replaced(thresholds);
    const RoundKeys keys = source.keys();
    for_turned(place, x, y, turned, [&](int64_t sample, uint32_t row, int64_t at, float (&values)[kColumns]) {
        if (thresholds.either == 0) return;
        uint32_t words[kColumns];
        words_at<L, fits>(at, source.of(sample), keys, words);
        const int64_t entry = sample * extremes.parts + (extremes.parts == 1 ? 0 : row);
        const float low = float(extremes.low[entry]), high = float(extremes.high[entry]);
#pragma unroll
        for (int c = 0; c < kColumns; ++c) values[c] = replaced.of(words[c], values[c], low, high);
    });
}

}  // namespace noisynn
