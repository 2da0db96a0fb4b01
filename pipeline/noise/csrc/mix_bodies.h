// The linear noises: what one thread does to a unit of all samples of a group.
#pragma once

#include "thread_bodies.h"

namespace noisynn {

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

// (1 - alpha) row + alpha next, but for what is spared.
template <class T>
NN_INLINE Unit<T> shifted(const Unit<T>& row, const Unit<T>& next, float alpha, int64_t spared) {
    float own[kUnit], other[kUnit];
    row.to_floats(own), next.to_floats(other);
#pragma unroll
    for (int j = 0; j < kUnit; ++j) own[j] = fmaf(alpha, other[j] - own[j], own[j]);
    Unit<T> out = row;
    out.change(own, spared);
    return out;
}

// Of a group the sample whose successor on the walk is the one that is added, and the way to go. The transposed mix adds
// the sample before: the same walk, from the last sample to the first.
struct Ring {
    int64_t begin, step;

    NN_INLINE Ring(int64_t first, int64_t k, bool transposed)
        : begin(transposed ? first + k - 1 : first), step(transposed ? -1 : 1) {}
};

// Rows that a thread holds in registers: more of them do not fit in 128 beside their sums, or the first once more.
template <class T>
constexpr int kHeld = sizeof(T) == 4 ? 8 : 12;

// Groups of kHeld samples at most: each row is read once, all of them at the same time.
template <class T>
NN_INLINE void circular_shift_held_thread(const Place& place, const T* x, T* y, const Common& common,
                                          const MixPlan& plan) {
    const float alpha = float(*common.strength);
    for_groups(place, common, plan, [&](int64_t first, int64_t k, int64_t at, int count, int64_t spared) {
        const Ring ring(first, k, plan.transposed);
        const T* from = x + common.from(ring.begin, at);
        T* to = y + common.to(ring.begin, at);
        Unit<T> rows[kHeld<T> + 1];
#pragma unroll
        for (int i = 0; i < kHeld<T>; ++i)
            if (i < k) rows[i].read(from + i * ring.step * common.x_sample, count, common.aligned);
#pragma unroll
        for (int i = 1; i <= kHeld<T>; ++i)
            if (i == k) rows[i] = rows[0];
#pragma unroll
        for (int i = 0; i < kHeld<T>; ++i)
            if (i < k) {
                if (k > 1 && alpha != 0) rows[i] = shifted(rows[i], rows[i + 1], alpha, spared);
                rows[i].write(to + i * ring.step * common.y_sample, count, common.aligned);
            }
    });
}

// Larger groups, row by row round the ring: each row is read once, whatever the group's size.
template <class T>
NN_INLINE void circular_shift_thread(const Place& place, const T* x, T* y, const Common& common, const MixPlan& plan) {
    const float alpha = float(*common.strength);
    for_groups(place, common, plan, [&](int64_t first, int64_t k, int64_t at, int count, int64_t spared) {
        const Ring ring(first, k, plan.transposed);
        const T* from = x + common.from(ring.begin, at);
        T* to = y + common.to(ring.begin, at);
        Unit<T> head, row, next;
        head.read(from, count, common.aligned);
        row = head;
#pragma unroll 2
        for (int64_t i = 0; i < k; ++i) {
            from += ring.step * common.x_sample;
            if (i + 1 < k)
                next.read(from, count, common.aligned);
            else
                next = head;
            const Unit<T> out = k > 1 && alpha != 0 ? shifted(row, next, alpha, spared) : row;
            out.write(to, count, common.aligned);
            to += ring.step * common.y_sample;
            row = next;
        }
    });
}

// (x + the sum over its group) * scale, but for what is spared.
template <class T>
NN_INLINE void mix_optimally(Unit<T>& row, const float (&sums)[kUnit], float scale, int64_t spared) {
    float values[kUnit];
    row.to_floats(values);
#pragma unroll
    for (int j = 0; j < kUnit; ++j) values[j] = (values[j] + sums[j]) * scale;
    row.change(values, spared);
}

template <class T>
NN_INLINE void add_row(float (&sums)[kUnit], const Unit<T>& row) {
#pragma unroll
    for (int j = 0; j < kUnit; j += 2) {
        float one, other;
        load_two(&row.value[j], one, other);
        sums[j] += one;
        sums[j + 1] += other;
    }
}

// Groups of kHeld samples at most, as above.
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
            if (i < k) add_row(sums, rows[i]);
#pragma unroll
        for (int i = 0; i < kHeld<T>; ++i)
            if (i < k) {
                if (k > 1 && on) mix_optimally(rows[i], sums, scale, spared);
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
                add_row(sums, row);
            }
        }
#pragma unroll 4
        for (int64_t i = 0; i < k; ++i) {
            row.read(from + i * common.x_sample, count, common.aligned);
            if (k > 1 && on) mix_optimally(row, sums, scale, spared);
            row.write(to + i * common.y_sample, count, common.aligned);
        }
    });
}

}  // namespace noisynn
