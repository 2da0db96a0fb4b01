// LayerNorm and the noise behind it in one pass, and the way back: what one warp of a launch does. norm_cuda.cu runs
// these on the GPU; host_walk.cpp runs the same text for every warp of a launch on the CPU.
//
// A warp has a token, of one sample or of all samples of a group, in its registers: eight elements a lane and step. All
// is computed in float32 and rounded once. Rows are whole units of eight elements, so every access is of 16 bytes.
#pragma once

#include "mix_bodies.h"

namespace noisynn {

constexpr uint32_t kWarp = 32;
constexpr int kWidest = 1024;  // elements of a row that fit in a warp's registers four units a lane

// What each lane of a warp has: on the CPU all of them, in turn.
#ifdef __CUDA_ARCH__
struct Team {
    uint32_t own = threadIdx.x % kWarp;

    template <class V>
    struct Each {
        V value;
        __device__ __forceinline__ V& operator[](uint32_t) { return value; }
    };
    template <class Visit>
    __device__ __forceinline__ void each(const Visit& visit) const {
        visit(own);
    }
    __device__ __forceinline__ float sum(Each<float>& part) const {
        float value = part.value;
#pragma unroll
        for (int offset = kWarp / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(~0u, value, offset);
        return value;
    }
};
__device__ __forceinline__ float reciprocal_root(float v) { return rsqrtf(v); }
#else
struct Team {
    template <class V>
    struct Each {
        V values[kWarp];
        V& operator[](uint32_t lane) { return values[lane]; }
    };
    template <class Visit>
    void each(const Visit& visit) const {
        for (uint32_t lane = 0; lane < kWarp; ++lane) visit(lane);
    }
    float sum(Each<float>& part) const {
        for (uint32_t offset = kWarp / 2; offset > 0; offset /= 2) {
            Each<float> before = part;
            for (uint32_t lane = 0; lane < kWarp; ++lane) part[lane] = before[lane] + before[lane ^ offset];
        }
        return part[0];
    }
};
inline float reciprocal_root(float v) { return 1.0f / std::sqrt(v); }
#endif

// One lane's part of a row. Lane l has units l, l + 32, ...
template <int Units>
struct Part {
    float value[Units][kUnit];
};

template <int Units>
using Row = typename Team::template Each<Part<Units>>;

struct Rows {
    uint32_t samples, tokens, width;  // samples * tokens < 2^31
    uint32_t spared;                  // tokens of each sample that get no noise
    float epsilon, share;             // share: 1 / width
    const double* strength;           // 0: LayerNorm alone
};

struct WarpPlace {
    uint32_t warp, warps;
};

// visit(index in the part, place in the row) for each unit of the lane that is in the row.
template <int Units, class Visit>
NN_INLINE void for_parts(uint32_t lane, uint32_t width, const Visit& visit) {
#pragma unroll
    for (int unit = 0; unit < Units; ++unit) {
        const uint32_t at = (unit * kWarp + lane) * kUnit;
        if (at < width) visit(unit, at);
    }
}

template <int Units, class T>
NN_INLINE void read_row(const Team& team, const T* p, uint32_t width, Row<Units>& row) {
    team.each([&](uint32_t lane) {
        for_parts<Units>(lane, width, [&](int unit, uint32_t at) {
            Unit<T> stored;
            stored.read_whole(p + at);
            stored.to_floats(row[lane].value[unit]);
        });
    });
}

template <int Units, class T>
NN_INLINE void write_row(const Team& team, T* p, uint32_t width, Row<Units>& row) {
    team.each([&](uint32_t lane) {
        for_parts<Units>(lane, width, [&](int unit, uint32_t at) {
            Unit<T> stored;
            stored.from_floats(row[lane].value[unit]);
            stored.write_whole(p + at);
        });
    });
}

// visit(element of the row, its place): the sum of what it gives, over the row.
template <int Units, class Visit>
NN_INLINE float sum_of(const Team& team, uint32_t width, const Visit& visit) {
    Team::Each<float> part;
    team.each([&](uint32_t lane) {
        float sum = 0;
        for_parts<Units>(lane, width, [&](int unit, uint32_t at) {
#pragma unroll
            for (int j = 0; j < kUnit; ++j) sum += visit(lane, unit, j, at + j);
        });
        part[lane] = sum;
    });
    return team.sum(part);
}

// visit(value&, lane, unit, index in the unit, place in the row)
template <int Units, class Visit>
NN_INLINE void change(const Team& team, uint32_t width, Row<Units>& row, const Visit& visit) {
    team.each([&](uint32_t lane) {
        for_parts<Units>(lane, width, [&](int unit, uint32_t at) {
#pragma unroll
            for (int j = 0; j < kUnit; ++j) visit(row[lane].value[unit][j], lane, unit, j, at + j);
        });
    });
}

struct Normal {
    float mean, scale;  // scale: 1 / sqrt(variance + epsilon)
};

template <int Units>
NN_INLINE Normal normalise(const Team& team, const Rows& rows, const float* weight, const float* bias,
                           Row<Units>& row) {
    const float mean = rows.share * sum_of<Units>(team, rows.width, [&](uint32_t lane, int unit, int j, uint32_t) {
                           return row[lane].value[unit][j];
                       });
    const float variance = rows.share * sum_of<Units>(team, rows.width, [&](uint32_t lane, int unit, int j, uint32_t) {
                               const float centred = row[lane].value[unit][j] - mean;
                               return centred * centred;
                           });
    const Normal normal = {mean, reciprocal_root(variance + rows.epsilon)};
    team.each([&](uint32_t lane) {
        for_parts<Units>(lane, rows.width, [&](int unit, uint32_t at) {
            Unit<float> w, b;
            w.read_whole(weight + at);
            b.read_whole(bias + at);
#pragma unroll
            for (int j = 0; j < kUnit; ++j) {
                float& value = row[lane].value[unit][j];
                value = fmaf((value - normal.mean) * normal.scale, w.value[j], b.value[j]);
            }
        });
    });
    return normal;
}

template <int Units, class T>
struct NormForward {
    const T* x;
    T* y;
    float *means, *scales;  // (samples, tokens) each, for the way back
    const float *weight, *bias;  // at multiples of 16 bytes
    Rows rows;

    NN_INLINE int64_t offset(uint32_t row) const { return int64_t(row) * rows.width; }
    NN_INLINE void read(const Team& team, uint32_t number, bool keep, Row<Units>& row) const {
        read_row<Units>(team, x + offset(number), rows.width, row);
        const Normal normal = normalise<Units>(team, rows, weight, bias, row);
        if (keep)
            team.each([&](uint32_t lane) {
                if (lane == 0) means[number] = normal.mean, scales[number] = normal.scale;
            });
    }
    NN_INLINE void write(const Team& team, uint32_t number, Row<Units>& row) const {
        write_row<Units>(team, y + offset(number), rows.width, row);
    }
};

template <class L, int Units, class T>
NN_INLINE void norm_gaussian_warp(const WarpPlace& place, const NormForward<Units, T>& work, const DrawSource& source) {
    const Team team;
    const Rows& rows = work.rows;
    const float std = float(*rows.strength), spread = spread_of<L>(std);
    const RoundKeys keys = source.keys();
    for (uint32_t number = place.warp; number < rows.samples * rows.tokens; number += place.warps) {
        const uint32_t sample = number / rows.tokens, token = number - sample * rows.tokens;
        Row<Units> row;
        work.read(team, number, true, row);
        if (std != 0 && token >= rows.spared) {
            const Draw draw = source.of(sample);
            const int64_t start = int64_t(token) * rows.width;
            team.each([&](uint32_t lane) {
                for_parts<Units>(lane, rows.width, [&](int unit, uint32_t at) {
                    add_unit_normals<L>(uint32_t((start + at) / kUnit), draw, keys, spread, row[lane].value[unit]);
                });
            });
        }
        work.write(team, number, row);
    }
}

// One token of the samples of a group, which a linear noise mixes.
struct Mixed {
    uint32_t first, step, count;  // number of the first row, from one sample's to the next's, samples
    bool mixes;
    float scale;  // 1 / (samples + 1)

    NN_INLINE uint32_t row(uint32_t i) const { return first + i * step; }
};

struct Groups {
    uint32_t count, size;
    float scale, last_scale;  // 1 / (k + 1), and that of the last group, which may be smaller

    static Groups of(int64_t samples, int64_t size) {
        const MixPlan plan = MixPlan::of(samples, size, false);
        return {uint32_t(plan.groups), uint32_t(plan.group_size), plan.scale, plan.last_scale};
    }

    NN_INLINE uint32_t tasks(const Rows& rows) const { return count * rows.tokens; }
    NN_INLINE Mixed at(uint32_t task, const Rows& rows) const {
        const uint32_t group = task / rows.tokens, token = task - group * rows.tokens, begin = group * size;
        const uint32_t members = rows.samples - begin < size ? rows.samples - begin : size;
        const bool mixes = members > 1 && token >= rows.spared && *rows.strength != 0;
        return {begin * rows.tokens + token, rows.tokens, members, mixes, members == size ? scale : last_scale};
    }
};

// Each row is normalised once, but the first of a group twice: it follows upon the last.
template <int Units, class T>
NN_INLINE void norm_shift_warp(const WarpPlace& place, const NormForward<Units, T>& work, const Groups& groups) {
    const Team team;
    const float alpha = float(*work.rows.strength);
    for (uint32_t task = place.warp; task < groups.tasks(work.rows); task += place.warps) {
        const Mixed mixed = groups.at(task, work.rows);
        Row<Units> row, next;
        work.read(team, mixed.row(0), true, row);
        for (uint32_t i = 0; i < mixed.count; ++i) {
            const bool last = i + 1 == mixed.count;
            if (!last || mixed.mixes) work.read(team, mixed.row(last ? 0 : i + 1), !last, next);
            if (mixed.mixes)
                change<Units>(team, work.rows.width, row, [&](float& value, uint32_t lane, int unit, int j, uint32_t) {
                    value = fmaf(alpha, next[lane].value[unit][j] - value, value);
                });
            work.write(team, mixed.row(i), row);
            row = next;
        }
    }
}

// The sum over the group first, then each row anew, from the cache.
template <int Units, class T>
NN_INLINE void norm_optimal_q_warp(const WarpPlace& place, const NormForward<Units, T>& work, const Groups& groups) {
    const Team team;
    for (uint32_t task = place.warp; task < groups.tasks(work.rows); task += place.warps) {
        const Mixed mixed = groups.at(task, work.rows);
        Row<Units> row, sums;
        if (mixed.mixes) {
            work.read(team, mixed.row(0), true, sums);
            for (uint32_t i = 1; i < mixed.count; ++i) {
                work.read(team, mixed.row(i), true, row);
                change<Units>(team, work.rows.width, sums, [&](float& sum, uint32_t lane, int unit, int j, uint32_t) {
                    sum += row[lane].value[unit][j];
                });
            }
        }
        for (uint32_t i = 0; i < mixed.count; ++i) {
            work.read(team, mixed.row(i), !mixed.mixes, row);
            if (mixed.mixes)
                change<Units>(team, work.rows.width, row, [&](float& value, uint32_t lane, int unit, int j, uint32_t) {
                    value = (value + sums[lane].value[unit][j]) * mixed.scale;
                });
            work.write(team, mixed.row(i), row);
        }
    }
}

// How a gradient comes to LayerNorm: as it is, or through a linear noise's transpose.
enum class Way { plain, shift, optimal };

template <int Units, class T>
struct NormBackward {
    const T *gradient, *x;
    T* dx;
    const float *means, *scales, *weight;
    float *dweight, *dbias;  // (warps, width) each: every warp adds up its rows, in their order
    Rows rows;
    Groups groups;

    NN_INLINE void read(const Team& team, uint32_t number, Row<Units>& row) const {
        read_row<Units>(team, gradient + int64_t(number) * rows.width, rows.width, row);
    }
};

// With n = (x - mean) * scale and g the gradient times weight: dx = scale * (g - mean(g) - n * mean(g n)).
template <int Units, class T>
NN_INLINE void norm_row_back(const Team& team, const NormBackward<Units, T>& work, uint32_t number,
                             Row<Units>& gradient, Row<Units>& dweight, Row<Units>& dbias) {
    const uint32_t width = work.rows.width;
    const float mean = work.means[number], scale = work.scales[number];
    Row<Units> row;
    read_row<Units>(team, work.x + int64_t(number) * width, width, row);
    team.each([&](uint32_t lane) {
        for_parts<Units>(lane, width, [&](int unit, uint32_t at) {
            Unit<float> w;
            w.read_whole(work.weight + at);
#pragma unroll
            for (int j = 0; j < kUnit; ++j) {
                float &value = row[lane].value[unit][j], &g = gradient[lane].value[unit][j];
                value = (value - mean) * scale;
                dweight[lane].value[unit][j] = fmaf(g, value, dweight[lane].value[unit][j]);
                dbias[lane].value[unit][j] += g;
                g *= w.value[j];
            }
        });
    });
    const float mean_g = work.rows.share * sum_of<Units>(team, width, [&](uint32_t lane, int unit, int j, uint32_t) {
                             return gradient[lane].value[unit][j];
                         });
    const float mean_gn = work.rows.share * sum_of<Units>(team, width, [&](uint32_t lane, int unit, int j, uint32_t) {
                              return gradient[lane].value[unit][j] * row[lane].value[unit][j];
                          });
    change<Units>(team, width, row, [&](float& n, uint32_t lane, int unit, int j, uint32_t) {
        n = scale * (gradient[lane].value[unit][j] - mean_g - n * mean_gn);
    });
    write_row<Units>(team, work.dx + int64_t(number) * width, width, row);
}

template <Way way, int Units, class T>
NN_INLINE void norm_backward_warp(const WarpPlace& place, const NormBackward<Units, T>& work) {
    const Team team;
    const uint32_t width = work.rows.width;
    const float alpha = float(*work.rows.strength);
    Row<Units> dweight, dbias;
    team.each([&](uint32_t lane) { dweight[lane] = {}, dbias[lane] = {}; });
    for (uint32_t task = place.warp; task < work.groups.tasks(work.rows); task += place.warps) {
        const Mixed mixed = work.groups.at(task, work.rows);
        Row<Units> gradient, other;  // other: the sum over the group, or the sample's before in the ring
        if (way == Way::optimal && mixed.mixes) {
            work.read(team, mixed.row(0), other);
            for (uint32_t i = 1; i < mixed.count; ++i) {
                work.read(team, mixed.row(i), gradient);
                change<Units>(team, width, other, [&](float& sum, uint32_t lane, int unit, int j, uint32_t) {
                    sum += gradient[lane].value[unit][j];
                });
            }
        }
        for (uint32_t i = 0; i < mixed.count; ++i) {
            work.read(team, mixed.row(i), gradient);
            if (way == Way::shift && mixed.mixes)
                work.read(team, mixed.row(i == 0 ? mixed.count - 1 : i - 1), other);
            if (way != Way::plain && mixed.mixes)
                change<Units>(team, width, gradient, [&](float& g, uint32_t lane, int unit, int j, uint32_t) {
                    const float o = other[lane].value[unit][j];
                    g = way == Way::shift ? fmaf(alpha, o - g, g) : (g + o) * mixed.scale;
                });
            norm_row_back<Units>(team, work, mixed.row(i), gradient, dweight, dbias);
        }
    }
    write_row<Units>(team, work.dweight + int64_t(place.warp) * width, width, dweight);
    write_row<Units>(team, work.dbias + int64_t(place.warp) * width, width, dbias);
}

}  // namespace noisynn
