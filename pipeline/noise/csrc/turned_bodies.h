// What one thread does where memory holds a sample column by column (channels_last): noise is drawn in the logical order,
// row by row (channel by channel), so that the layout changes nothing.
//
// A thread takes eight rows, which are neighbours in memory, of four columns, which are one block of Philox for each row
// where a row begins with a block; elsewhere they are two.
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
};

// change(sample, row, its place in the logical order, which of the unit's rows, four columns' units) for each row.
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
        Unit<T> units[kColumns];
#pragma unroll
        for (int c = 0; c < kColumns; ++c)
            if (c < columns) units[c].read(from + c * turned.x_column, count, turned.aligned);
#pragma unroll
        for (int j = 0; j < kUnit; ++j)
            if (j < count && row + j >= turned.spared_rows)
                change(sample, row + j, int64_t(row + j) * turned.columns + column, j, units);
#pragma unroll
        for (int c = 0; c < kColumns; ++c)
            if (c < columns) units[c].write(to + c * turned.y_column, count, turned.aligned);
    });
}

template <class L, class T>
NN_INLINE void gaussian_turned_thread(const Place& place, const T* x, T* y, const Turned& turned,
                                      const DrawSource& source) {
    const float std = float(*turned.strength);
    for_turned(place, x, y, turned, [&](int64_t sample, uint32_t, int64_t at, int j, Unit<T>(&units)[kColumns]) {
        if (std == 0) return;
        float n[kColumns];
        normals_at<L>(at, source.of(sample), n);
#pragma unroll
        for (int c = 0; c < kColumns; ++c)
            store_one(&units[c].value[j], fmaf(n[c], std, load_one(&units[c].value[j])));
    });
}

// Extremes: of each sample, or of each of its rows.
template <class L, class T>
NN_INLINE void salt_and_pepper_turned_thread(const Place& place, const T* x, T* y, const Turned& turned,
                                             const DrawSource& source, const Extremes& extremes) {
    const Thresholds thresholds = thresholds_of(*turned.strength);
    for_turned(place, x, y, turned, [&](int64_t sample, uint32_t row, int64_t at, int j, Unit<T>(&units)[kColumns]) {
        if (thresholds.either == 0) return;
        uint32_t words[kColumns];
        words_at<L>(at, source.of(sample), words);
        const int64_t entry = sample * extremes.parts + (extremes.parts == 1 ? 0 : row);
        const float low = float(extremes.low[entry]), high = float(extremes.high[entry]);
#pragma unroll
        for (int c = 0; c < kColumns; ++c)
            if (words[c] < thresholds.either)
                store_one(&units[c].value[j], words[c] < thresholds.salt ? high : low);
    });
}

}  // namespace noisynn
