// What one thread of a launch does. noise_cuda.cu runs these on the GPU; host_walk.cpp runs the same text for every
// (block, thread) of a launch on the CPU, so that grid, tail and vector code is tested without one.
//
// A sample is cut into units of eight elements, two blocks of Philox, which are 16 bytes of a 16-bit float. A thread
// takes every (grid * threads)-th unit of every grid-th sample: any number of either is reached with 64-bit indices.
#pragma once

#include <cstdint>

#include "formats.h"
#include "noise_math.h"

namespace noisynn {

constexpr int kUnit = 8;

// Where a thread stands: x runs over the tasks on a sample (its units, say), y over samples (or groups of samples).
struct Place {
    uint32_t block_x, block_y, thread, grid_x, grid_y, threads;

    NN_INLINE int64_t first_task() const { return int64_t(block_x) * threads + thread; }
    NN_INLINE int64_t task_step() const { return int64_t(grid_x) * threads; }
};

struct Grid {
    uint32_t x, y;
};

constexpr uint32_t kThreads = 256, kMaxGridY = 65535, kMaxGridX = 1u << 20;
// Of elements, a step of all blocks fits in 32 bits.
static_assert(uint64_t(kMaxGridX) * kThreads * kUnit <= 1ull << 31);
constexpr int64_t kMostTasks = 16, kEnoughBlocks = 4096;

NN_INLINE int64_t whole(int64_t size, int64_t part) { return (size + part - 1) / part; }

// For `tasks` on each of `rows` samples (or groups of samples): several a thread where that leaves blocks for every
// multiprocessor many times over, for what a thread does before its first task costs as much as one.
NN_INLINE Grid grid_of(int64_t rows, int64_t tasks) {
    const uint32_t y = uint32_t(rows < kMaxGridY ? rows : kMaxGridY);
    int64_t several = kMostTasks;
    while (several > 1 && y * whole(tasks, kThreads * several) < kEnoughBlocks) several /= 2;
    const int64_t blocks = whole(tasks, kThreads * several);
    return {uint32_t(blocks < kMaxGridX ? blocks : kMaxGridX), y};
}

// visit(row, task). The last row first: what comes before has just written it, so that it may still be in the cache, and
// what comes after begins with the first.
template <class Visit>
NN_INLINE void for_tasks(const Place& place, int64_t rows, int64_t tasks, const Visit& visit) {
    for (int64_t row = rows - 1 - place.block_y; row >= 0; row -= place.grid_y)
        for (int64_t task = place.first_task(); task < tasks; task += place.task_step()) visit(row, task);
}

// What all noises need. Pointers to numbers: they live where the kernel runs, and nothing is compiled anew.
struct Common {
    int64_t samples, size, spared;   // size: elements of a sample, of which the first `spared` stay
    int64_t x_sample, y_sample;      // from one sample to the next, in elements
    int64_t row, pitch;              // x: rows of `row` elements, `pitch` apart. row == size: one row. y has no gaps
    bool aligned;                    // every row begins at a multiple of 16 bytes, in x and in y
    const double* strength;          // 0: nothing changes

    // A unit lies in one row: where there are several, `row` is a multiple of kUnit.
    NN_INLINE int64_t from(int64_t sample, int64_t at) const {
        if (row != size) at = size >> 32 == 0 ? from_row(uint32_t(at), uint32_t(row)) : from_row(at, row);
        return sample * x_sample + at;
    }
    NN_INLINE int64_t to(int64_t sample, int64_t at) const { return sample * y_sample + at; }

private:
    // A division of 32 bits takes a GPU a third of the time.
    template <class I>
    NN_INLINE int64_t from_row(I at, I length) const {
        return int64_t(at / length) * pitch + at % length;
    }
};

struct DrawSource {
    const int64_t *sample_ids, *epoch;
    uint32_t stream;
    uint32_t first_keys[kRounds];  // of the seed, which the host knows: a GPU takes each from where arguments lie, for nothing

    NN_INLINE Draw of(int64_t sample) const {
        return {first_keys[0], uint32_t(*epoch), stream, uint64_t(sample_ids[sample])};
    }
    // The same for all samples.
    NN_INLINE RoundKeys keys() const { return RoundKeys(first_keys, uint32_t(*epoch)); }
};

// Sixteen bytes at a time, which a GPU moves in one instruction.
struct alignas(16) Sixteen {
    uint32_t word[4];
};

// In PTX: nvcc takes an assignment to pieces where the words come from several branches, and then stores four times. It
// may move reads over it: nothing that a kernel writes is read by it.
NN_INLINE void store_sixteen(Sixteen* p, const Sixteen& v) {
#ifdef __CUDA_ARCH__
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};"
                 :
                 : "l"(__cvta_generic_to_global(p)), "r"(v.word[0]), "r"(v.word[1]), "r"(v.word[2]), "r"(v.word[3]));
#else
    *p = v;
#endif
}

template <class T>
struct Unit {
    static constexpr int sixteens = kUnit * sizeof(T) / 16;
    union {
        T value[kUnit];
        Sixteen sixteen[sixteens];
    };

    NN_INLINE void read_whole(const T* p) {
#pragma unroll
        for (int i = 0; i < sixteens; ++i) sixteen[i] = reinterpret_cast<const Sixteen*>(p)[i];
    }
    NN_INLINE void write_whole(T* p) const {
#pragma unroll
        for (int i = 0; i < sixteens; ++i) store_sixteen(reinterpret_cast<Sixteen*>(p) + i, sixteen[i]);
    }
    // Whole and aligned: by 16 bytes. Otherwise one by one, as many as there are; the rest are zeros.
    NN_INLINE void read(const T* p, int count, bool aligned) {
        if (aligned && count == kUnit) return read_whole(p);
#pragma unroll
        for (int i = 0; i < kUnit; ++i) value[i] = i < count ? p[i] : T{};
    }
    NN_INLINE void write(T* p, int count, bool aligned) const {
        if (aligned && count == kUnit) return write_whole(p);
#pragma unroll
        for (int i = 0; i < kUnit; ++i)
            if (i < count) p[i] = value[i];
    }
    NN_INLINE void to_floats(float (&out)[kUnit]) const {
#pragma unroll
        for (int i = 0; i < kUnit; i += 2) load_two(&value[i], out[i], out[i + 1]);
    }
    NN_INLINE void from_floats(const float (&values)[kUnit]) {
#pragma unroll
        for (int i = 0; i < kUnit; i += 2) store_two(&value[i], values[i], values[i + 1]);
    }
    // All but the first `spared`.
    NN_INLINE void change(const float (&values)[kUnit], int64_t spared) {
        if (spared == 0) return from_floats(values);
#pragma unroll
        for (int i = 0; i < kUnit; ++i)
            if (i >= spared) store_one(&value[i], values[i]);
    }
};

// visit(row, unit's first element, elements in it)
template <class Visit>
NN_INLINE void for_units(const Place& place, int64_t rows, int64_t size, const Visit& visit) {
    for_tasks(place, rows, whole(size, kUnit), [&](int64_t row, int64_t unit) {
        const int64_t at = unit * kUnit, left = size - at;
        visit(row, at, int(left < kUnit ? left : kUnit));
    });
}

template <class L>
NN_INLINE void unit_words(uint32_t unit, const Draw& draw, const RoundKeys& keys, uint32_t (&words)[2][4]) {
    draw_words<L, 2>(2 * unit, draw, keys, words);
}

template <class L>
NN_INLINE void add_unit_normals(uint32_t unit, const Draw& draw, const RoundKeys& keys, float spread, float* x) {
    uint32_t words[2][4];
    unit_words<L>(unit, draw, keys, words);
#pragma unroll
    for (int i = 0; i < kUnit; i += 2)
        add_normals<L>(words[i / 4][i % 4], words[i / 4][i % 4 + 1], spread, x[i], x[i + 1]);
}

// make(a block's words, its four values) for Count blocks.
template <class L, int Count, class V, class Make>
NN_INLINE void draw_blocks(uint32_t block, const Draw& draw, const RoundKeys& keys, V* values, const Make& make) {
#pragma unroll
    for (int b = 0; b < Count; ++b) {
        uint32_t words[1][4];
        draw_words<L, 1>(block + b, draw, keys, words);
        make(words[0], values + 4 * b);
    }
}

// What make(one block's words, its four values) gives from place `at` of a sample on: four times Blocks values, wherever
// `at` lies in its block, or, where `fits` says so, at its beginning.
template <class L, bool fits, int Blocks, class V, class Make>
NN_INLINE void from_place(int64_t at, const Draw& draw, const RoundKeys& keys, V (&out)[4 * Blocks], const Make& make) {
    const uint32_t block = uint32_t(at / 4);
    if constexpr (fits) {
        draw_blocks<L, Blocks>(block, draw, keys, out, make);
    } else {
        const uint32_t shift = uint32_t(at % 4);
        V all[4 * Blocks + 4];
        draw_blocks<L, Blocks + 1>(block, draw, keys, all, make);
        // By constant places, for a GPU's registers have no others.
#pragma unroll
        for (int i = 0; i < 4 * Blocks + 3; ++i)
            if (shift & 1) all[i] = all[i + 1];
#pragma unroll
        for (int i = 0; i < 4 * Blocks; ++i) out[i] = shift & 2 ? all[i + 2] : all[i];
    }
}

// std times normals, added to the values: the same bits as in add_unit_normals, whatever the layout.
template <class L, bool fits, int Count>
NN_INLINE void add_normals_at(int64_t at, const Draw& draw, const RoundKeys& keys, float spread, float (&values)[Count]) {
    Product<L> products[Count];
    from_place<L, fits, Count / 4>(at, draw, keys, products, [&](const uint32_t (&words)[4], Product<L>* four) {
        normal_products<L>(words[0], words[1], spread, four[0], four[1]);
        normal_products<L>(words[2], words[3], spread, four[2], four[3]);
    });
#pragma unroll
    for (int i = 0; i < Count; ++i) values[i] = products[i].added_to(values[i]);
}

template <class L, bool fits, int Count>
NN_INLINE void words_at(int64_t at, const Draw& draw, const RoundKeys& keys, uint32_t (&out)[Count]) {
    from_place<L, fits, Count / 4>(at, draw, keys, out, [](const uint32_t (&words)[4], uint32_t* four) {
#pragma unroll
        for (int i = 0; i < 4; ++i) four[i] = words[i];
    });
}

// Units of a sample that lie in memory as they are counted, are whole, aligned and not spared in part: nearly all. Of
// them nothing is asked but their number.
struct WholeUnits {
    uint32_t first, count;

    NN_INLINE WholeUnits(const Common& common, bool any) {
        const int64_t begin = whole(common.spared, kUnit), end = common.size / kUnit;
        first = uint32_t(begin);
        count = any && common.aligned && common.row == common.size && end > begin ? uint32_t(end - begin) : 0;
    }
    NN_INLINE bool has(uint32_t unit) const { return unit - first < count; }
};

// whole_of(sample, draw) gives what takes the floats and the number of each of its WholeUnits; change(unit, its first
// element, sample, draw) for others.
// Whole units have a loop of their own, in which pointers are moved on: a GPU would multiply anew for each address, on the
// pipe that Philox's products need.
template <class T, class WholeOf, class Careful>
NN_INLINE void for_drawn_units(const Place& place, const T* x, T* y, const Common& common, const DrawSource& source,
                               const WholeUnits& easy, const WholeOf& whole_of, const Careful& change) {
    const uint32_t units = uint32_t(whole(common.size, kUnit));  // up to 2^31
    const uint32_t step = uint32_t(place.task_step());
    for (int64_t sample = common.samples - 1 - place.block_y; sample >= 0; sample -= place.grid_y) {
        const Draw draw = source.of(sample);
        const auto change_whole = whole_of(sample, draw);
        for (uint32_t unit = uint32_t(place.first_task()); unit < units;) {
            const int64_t at = int64_t(unit) * kUnit;
            Unit<T> own;
            if (easy.has(unit)) {
                const T* from = x + sample * common.x_sample + at;
                T* to = y + sample * common.y_sample + at;
                do {
                    own.read_whole(from);
                    float values[kUnit];
                    own.to_floats(values);
                    change_whole(values, unit);
                    own.from_floats(values);
                    own.write_whole(to);
                    from += step * kUnit, to += step * kUnit, unit += step;
                } while (easy.has(unit));
            } else {
                const int64_t left = common.size - at;
                const int count = int(left < kUnit ? left : kUnit);
                own.read(x + common.from(sample, at), count, common.aligned);
                if (at + count > common.spared) change(own, at, sample, draw);
                own.write(y + common.to(sample, at), count, common.aligned);
                unit += step;
            }
        }
    }
}

template <class L, class T>
NN_INLINE void gaussian_thread(const Place& place, const T* x, T* y, const Common& common, const DrawSource& source) {
    const float std = float(*common.strength), spread = spread_of<L>(std);
    const RoundKeys keys = source.keys();
    for_drawn_units(
        place, x, y, common, source, WholeUnits(common, std != 0),
        [&](int64_t, const Draw& draw) {
            return [&](float (&values)[kUnit], uint32_t unit) { add_unit_normals<L>(unit, draw, keys, spread, values); };
        },
        [&](Unit<T>& unit, int64_t at, int64_t, const Draw& draw) {
            if (std == 0) return;
            float values[kUnit];
            unit.to_floats(values);
            add_unit_normals<L>(uint32_t(at / kUnit), draw, keys, spread, values);
            unit.change(values, at < common.spared ? common.spared - at : 0);
        });
}

// Of each of `parts` equal parts of each sample (its channels, say): (samples, parts) each. Where there are several, a
// part has at least kUnit elements, and a sample less than 2^32.
struct Extremes {
    const double *low, *high;
    int64_t parts;
    uint32_t part_size;
};

// The thresholds in 32 bits, where something is replaced at all: what is replaced is up to `last`, and of it salt what is
// below `salt`.
struct Replaced {
    uint32_t salt, last;

    explicit NN_INLINE Replaced(const Thresholds& thresholds)
        : salt(uint32_t(thresholds.salt)), last(uint32_t(thresholds.either - 1)) {}
    NN_INLINE float of(uint32_t word, float x, float low, float high) const {
        return word > last ? x : word < salt ? high : low;
    }
};

template <class L, class T>
NN_INLINE void salt_and_pepper_thread(const Place& place, const T* x, T* y, const Common& common,
                                      const DrawSource& source, const Extremes& extremes) {
    const Thresholds thresholds = thresholds_of(*common.strength);
    const Replaced replaced(thresholds);
    const RoundKeys keys = source.keys();
    for_drawn_units(
        place, x, y, common, source, WholeUnits(common, thresholds.either != 0 && extremes.parts == 1),
        [&](int64_t sample, const Draw& draw) {
            const int64_t entry = extremes.parts == 1 ? sample : 0;  // others have no whole units
            const float low = float(extremes.low[entry]), high = float(extremes.high[entry]);
            return [&, low, high](float (&values)[kUnit], uint32_t unit) {
                uint32_t words[2][4];
                unit_words<L>(unit, draw, keys, words);
#pragma unroll
                for (int i = 0; i < kUnit; ++i) values[i] = replaced.of(words[i / 4][i % 4], values[i], low, high);
            };
        },
        [&](Unit<T>& unit, int64_t at, int64_t sample, const Draw& draw) {
            if (thresholds.either == 0) return;
            uint32_t words[2][4];
            unit_words<L>(uint32_t(at / kUnit), draw, keys, words);
            // A unit lies in one part, or across the border of two.
            const uint32_t part = extremes.parts == 1 ? 0 : uint32_t(at) / extremes.part_size;
            const int64_t border = extremes.parts == 1 ? common.size : (int64_t(part) + 1) * extremes.part_size;
            const int64_t entry = sample * extremes.parts + part, next = border < common.size ? entry + 1 : entry;
            const float low[2] = {float(extremes.low[entry]), float(extremes.low[next])};
            const float high[2] = {float(extremes.high[entry]), float(extremes.high[next])};
            float values[kUnit];
            unit.to_floats(values);
#pragma unroll
            for (int i = 0; i < kUnit; ++i) {
                const bool behind = at + i >= border;
                values[i] = replaced.of(words[i / 4][i % 4], values[i], behind ? low[1] : low[0],
                                        behind ? high[1] : high[0]);
            }
            unit.change(values, at < common.spared ? common.spared - at : 0);
        });
}

}  // namespace noisynn
