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

NN_INLINE int64_t whole(int64_t size, int64_t part) { return (size + part - 1) / part; }

// For `tasks` of a thread on each of `rows` samples (or groups of samples).
NN_INLINE Grid grid_of(int64_t rows, int64_t tasks) {
    const int64_t blocks = whole(tasks, kThreads);
    return {uint32_t(blocks < kMaxGridX ? blocks : kMaxGridX), uint32_t(rows < kMaxGridY ? rows : kMaxGridY)};
}

// visit(row, task)
template <class Visit>
NN_INLINE void for_tasks(const Place& place, int64_t rows, int64_t tasks, const Visit& visit) {
    for (int64_t row = place.block_y; row < rows; row += place.grid_y)
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
    uint32_t seed, stream;

    NN_INLINE Draw of(int64_t sample) const {
        return {seed, uint32_t(*epoch), stream, uint64_t(sample_ids[sample])};
    }
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

    // Whole and aligned: by 16 bytes. Otherwise one by one, as many as there are.
    NN_INLINE void read(const T* p, int count, bool aligned) {
        if (aligned && count == kUnit) {
#pragma unroll
            for (int i = 0; i < sixteens; ++i) sixteen[i] = reinterpret_cast<const Sixteen*>(p)[i];
        } else {
#pragma unroll
            for (int i = 0; i < kUnit; ++i)
                if (i < count) value[i] = p[i];
        }
    }
    NN_INLINE void write(T* p, int count, bool aligned) const {
        if (aligned && count == kUnit) {
#pragma unroll
            for (int i = 0; i < sixteens; ++i) store_sixteen(reinterpret_cast<Sixteen*>(p) + i, sixteen[i]);
        } else {
#pragma unroll
            for (int i = 0; i < kUnit; ++i)
                if (i < count) p[i] = value[i];
        }
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
NN_INLINE void unit_words(int64_t at, const Draw& draw, uint32_t (&words)[2][4]) {
    draw_words<L, 2>(uint32_t(at / 4), draw, RoundKeys(draw), words);
}

// What make(one block's words, its four values) gives from place `at` of a sample on: four times Blocks values, wherever
// `at` lies in its block.
template <class L, int Blocks, class V, class Make>
NN_INLINE void from_any_place(int64_t at, const Draw& draw, V (&out)[4 * Blocks], const Make& make) {
    const uint32_t block = uint32_t(at / 4), shift = uint32_t(at % 4);
    V all[4 * Blocks + 4] = {};
#pragma unroll
    for (int b = 0; b <= Blocks; ++b) {
        if (b == Blocks && shift == 0) break;
        uint32_t words[1][4];
        draw_words<L, 1>(block + b, draw, RoundKeys(draw), words);
        make(words[0], all + 4 * b);
    }
    // By constant places, for a GPU's registers have no others.
#pragma unroll
    for (int i = 0; i < 4 * Blocks + 3; ++i)
        if (shift & 1) all[i] = all[i + 1];
#pragma unroll
    for (int i = 0; i < 4 * Blocks; ++i) out[i] = shift & 2 ? all[i + 2] : all[i];
}

template <class L, int Count>
NN_INLINE void normals_at(int64_t at, const Draw& draw, float (&out)[Count]) {
    from_any_place<L, Count / 4>(at, draw, out, [](const uint32_t (&words)[4], float* four) {
        normals<L>(words[0], words[1], four[0], four[1]);
        normals<L>(words[2], words[3], four[2], four[3]);
    });
}

template <class L, int Count>
NN_INLINE void words_at(int64_t at, const Draw& draw, uint32_t (&out)[Count]) {
    from_any_place<L, Count / 4>(at, draw, out, [](const uint32_t (&words)[4], uint32_t* four) {
#pragma unroll
        for (int i = 0; i < 4; ++i) four[i] = words[i];
    });
}

template <class L, class T>
NN_INLINE void gaussian_thread(const Place& place, const T* x, T* y, const Common& common, const DrawSource& source) {
    const float std = float(*common.strength);
    for_units(place, common.samples, common.size, [&](int64_t sample, int64_t at, int count) {
        Unit<T> unit;
        unit.read(x + common.from(sample, at), count, common.aligned);
        if (std != 0 && at + count > common.spared) {
            uint32_t words[2][4];
            unit_words<L>(at, source.of(sample), words);
#pragma unroll
            for (int i = 0; i < kUnit; i += 2) {
                float one, other;
                normals<L>(words[i / 4][i % 4], words[i / 4][i % 4 + 1], one, other);
                if (at + i >= common.spared) store_one(&unit.value[i], fmaf(one, std, load_one(&unit.value[i])));
                if (at + i + 1 >= common.spared)
                    store_one(&unit.value[i + 1], fmaf(other, std, load_one(&unit.value[i + 1])));
            }
        }
        unit.write(y + common.to(sample, at), count, common.aligned);
    });
}

// Of each of `parts` equal parts of each sample (its channels, say): (samples, parts) each. Where there are several, a
// part has at least kUnit elements, and a sample less than 2^32.
struct Extremes {
    const double *low, *high;
    int64_t parts;
    uint32_t part_size;
};

template <class L, class T>
NN_INLINE void salt_and_pepper_thread(const Place& place, const T* x, T* y, const Common& common,
                                      const DrawSource& source, const Extremes& extremes) {
    const Thresholds thresholds = thresholds_of(*common.strength);
    for_units(place, common.samples, common.size, [&](int64_t sample, int64_t at, int count) {
        Unit<T> unit;
        unit.read(x + common.from(sample, at), count, common.aligned);
        if (thresholds.either != 0 && at + count > common.spared) {
            uint32_t words[2][4];
            unit_words<L>(at, source.of(sample), words);
            // A unit lies in one part, or across the border of two.
            const uint32_t part = extremes.parts == 1 ? 0 : uint32_t(at) / extremes.part_size;
            const int64_t border = extremes.parts == 1 ? common.size : (int64_t(part) + 1) * extremes.part_size;
            const int64_t entry = sample * extremes.parts + part, next = border < common.size ? entry + 1 : entry;
            const float low[2] = {float(extremes.low[entry]), float(extremes.low[next])};
            const float high[2] = {float(extremes.high[entry]), float(extremes.high[next])};
#pragma unroll
            for (int i = 0; i < kUnit; ++i) {
                const uint32_t word = words[i / 4][i % 4];
                const bool behind = at + i >= border;
                const float salt = behind ? high[1] : high[0], pepper = behind ? low[1] : low[0];
                if (word < thresholds.either && i < count && at + i >= common.spared)
                    store_one(&unit.value[i], word < thresholds.salt ? salt : pepper);
            }
        }
        unit.write(y + common.to(sample, at), count, common.aligned);
    });
}

struct MixPlan {
    int64_t groups, group_size;
    bool transposed;
    float scale, last_scale;  // 1 / (k + 1), and that of the last group, which may be smaller

    static MixPlan of(int64_t samples, int64_t group_size, bool transposed) {
        const int64_t groups = (samples + group_size - 1) / group_size;
        const int64_t last = samples - (groups - 1) * group_size;
        return {groups, group_size, transposed, 1.0f / float(group_size + 1), 1.0f / float(last + 1)};
    }
};

// visit(first sample of the group, its samples, unit's first element, elements in it, of which spared)
template <class Visit>
NN_INLINE void for_groups(const Place& place, const Common& common, const MixPlan& plan, const Visit& visit) {
    for_units(place, plan.groups, common.size, [&](int64_t group, int64_t at, int count) {
        const int64_t first = group * plan.group_size, left = common.samples - first;
        const int64_t spared = common.spared - at;
        visit(first, left < plan.group_size ? left : plan.group_size, at, count, spared < 0 ? 0 : spared);
    });
}

// Row by row round the ring: each row is read once, whatever the group's size.
template <class T>
NN_INLINE void circular_shift_thread(const Place& place, const T* x, T* y, const Common& common, const MixPlan& plan) {
    const float alpha = float(*common.strength);
    for_groups(place, common, plan, [&](int64_t first, int64_t k, int64_t at, int count, int64_t spared) {
        // The transposed mix takes the sample before: the same walk, from the last sample to the first.
        const int64_t begin = plan.transposed ? first + k - 1 : first, step = plan.transposed ? -1 : 1;
        const T* from = x + common.from(begin, at);
        T* to = y + common.to(begin, at);
        Unit<T> head, row, next;
        head.read(from, count, common.aligned);
        row = head;
#pragma unroll 2
        for (int64_t i = 0; i < k; ++i) {
            from += step * common.x_sample;
            if (i + 1 < k)
                next.read(from, count, common.aligned);
            else
                next = head;
            Unit<T> out = row;
            if (k > 1 && alpha != 0) {
#pragma unroll
                for (int j = 0; j < kUnit; ++j) {
                    const float own = load_one(&row.value[j]), difference = load_one(&next.value[j]) - own;
                    if (j >= spared) store_one(&out.value[j], fmaf(alpha, difference, own));
                }
            }
            out.write(to, count, common.aligned);
            to += step * common.y_sample;
            row = next;
        }
    });
}

// (x + the sum over its group) * scale, but for what is spared.
template <class T>
NN_INLINE void mix_optimally(Unit<T>& row, const float (&sums)[kUnit], float scale, int count, int64_t spared) {
#pragma unroll
    for (int j = 0; j < kUnit; ++j)
        if (j >= spared && j < count) store_one(&row.value[j], (load_one(&row.value[j]) + sums[j]) * scale);
}

template <class T>
NN_INLINE void add_row(float (&sums)[kUnit], const Unit<T>& row, bool is_first, int count) {
#pragma unroll
    for (int j = 0; j < kUnit; ++j)
        if (j < count) sums[j] = is_first ? load_one(&row.value[j]) : sums[j] + load_one(&row.value[j]);
}

// Rows that a thread holds in registers: more of them do not fit beside their sums in 128.
template <class T>
constexpr int kHeld = sizeof(T) == 4 ? 8 : 12;

// Groups of kHeld samples at most: each row is read once, all of them at the same time.
template <class T>
NN_INLINE void optimal_q_held_thread(const Place& place, const T* x, T* y, const Common& common, const MixPlan& plan) {
    const bool on = *common.strength != 0;
    for_groups(place, common, plan, [&](int64_t first, int64_t k, int64_t at, int count, int64_t spared) {
        const T* from = x + common.from(first, at);
        T* to = y + common.to(first, at);
        const float scale = k == plan.group_size ? plan.scale : plan.last_scale;
        Unit<T> rows[kHeld<T>];
        float sums[kUnit] = {};
#pragma unroll
        for (int i = 0; i < kHeld<T>; ++i)
            if (i < k) rows[i].read(from + i * common.x_sample, count, common.aligned);
#pragma unroll
        for (int i = 0; i < kHeld<T>; ++i)
            if (i < k) add_row(sums, rows[i], i == 0, count);
#pragma unroll
        for (int i = 0; i < kHeld<T>; ++i)
            if (i < k) {
                if (k > 1 && on) mix_optimally(rows[i], sums, scale, count, spared);
                rows[i].write(to + i * common.y_sample, count, common.aligned);
            }
    });
}

// Larger groups: the sum first, then each row anew, from a cache as far as the rows of all blocks at work fit in one.
template <class T>
NN_INLINE void optimal_q_thread(const Place& place, const T* x, T* y, const Common& common, const MixPlan& plan) {
    const bool on = *common.strength != 0;
    for_groups(place, common, plan, [&](int64_t first, int64_t k, int64_t at, int count, int64_t spared) {
        const T* from = x + common.from(first, at);
        T* to = y + common.to(first, at);
        const float scale = k == plan.group_size ? plan.scale : plan.last_scale;
        float sums[kUnit] = {};
        Unit<T> row;
        if (k > 1 && on) {
#pragma unroll 4
            for (int64_t i = 0; i < k; ++i) {
                row.read(from + i * common.x_sample, count, common.aligned);
                add_row(sums, row, i == 0, count);
            }
        }
#pragma unroll 4
        for (int64_t i = 0; i < k; ++i) {
            row.read(from + i * common.x_sample, count, common.aligned);
            if (k > 1 && on) mix_optimally(row, sums, scale, count, spared);
            row.write(to + i * common.y_sample, count, common.aligned);
        }
    });
}

}  // namespace noisynn
