// image_noise: what one thread does for sixteen pixels of a picture's row: uint8 -> flip -> normalise -> noise -> the
// float format. Sixteen pixels are 48 bytes, which a GPU reads in three instructions where a row is whole sixteens.
#pragma once

#include "mix_bodies.h"

namespace noisynn {

constexpr int kChannels = 3, kStretch = 16;

// The order of pipeline/noise/operators.py.
enum class ImageKind : int64_t { none, gaussian, salt_and_pepper, circular_shift, optimal_q };

struct Pictures {
    const uint8_t* pixels;    // (samples, height, width, 3)
    const bool* flip;         // (samples,); null: none is
    const float *mean, *std;  // (3,)
    int64_t samples, height, width;  // fewer than 2^32 stretches
    bool aligned;        // every stretch begins at a multiple of 16 bytes, in x and in y
    bool channels_last;  // of y
    const double* strength;

    NN_INLINE int64_t plane() const { return height * width; }
    NN_INLINE int64_t stretches() const { return whole(width, kStretch); }
    NN_INLINE int64_t tasks() const { return height * stretches(); }
    // Every stretch begins with a block of Philox: `fits` of what a thread does.
    NN_INLINE bool fits_blocks() const { return width % 4 == 0; }
};

// A level's normalised value is level * scale + bias.
struct Normalise {
    float scale[kChannels], bias[kChannels];

    explicit NN_INLINE Normalise(const Pictures& pictures) {
#pragma unroll
        for (int c = 0; c < kChannels; ++c) {
            scale[c] = 1.0f / (255.0f * pictures.std[c]);
            bias[c] = -pictures.mean[c] / pictures.std[c];
        }
    }
    NN_INLINE float of(int channel, float level) const { return fmaf(level, scale[channel], bias[channel]); }
};

// Where a stretch stands in every picture.
struct Stretch {
    int64_t row, column;
    int count;  // pixels

    NN_INLINE int64_t pixel(const Pictures& pictures) const { return row * pictures.width + column; }
};

// The bytes of a stretch, in the order of the result.
struct Bytes {
    union {
        uint8_t level[kStretch * kChannels];
        Sixteen sixteen[kChannels];
    };

    NN_INLINE void read(const Pictures& pictures, int64_t sample, const Stretch& at) {
        const bool mirrored = pictures.flip != nullptr && pictures.flip[sample];
        const int64_t column = mirrored ? pictures.width - at.column - at.count : at.column;
        const uint8_t* from =
            pictures.pixels + ((sample * pictures.height + at.row) * pictures.width + column) * kChannels;
        if (pictures.aligned && at.count == kStretch) {
#pragma unroll
            for (int i = 0; i < kChannels; ++i) sixteen[i] = reinterpret_cast<const Sixteen*>(from)[i];
            if (mirrored) reverse();
            return;
        }
#pragma unroll
        for (int i = 0; i < kStretch; ++i)
#pragma unroll
            for (int c = 0; c < kChannels; ++c)
                level[i * kChannels + c] = i < at.count ? from[(mirrored ? at.count - 1 - i : i) * kChannels + c] : 0;
    }
    NN_INLINE void reverse() {
        const Bytes forwards = *this;
#pragma unroll
        for (int i = 0; i < kStretch; ++i)
#pragma unroll
            for (int c = 0; c < kChannels; ++c)
                level[i * kChannels + c] = forwards.level[(kStretch - 1 - i) * kChannels + c];
    }
    NN_INLINE float of(int pixel, int channel) const { return float(level[pixel * kChannels + channel]); }
};

// Eight pixels' values, channel by channel.
using Values = float[kChannels][kUnit];

template <class T>
NN_INLINE void write_pixels(const Pictures& pictures, T* sample, int64_t pixel, int count, const Values& values) {
    if (pictures.channels_last) {
        T* to = sample + pixel * kChannels;
#pragma unroll
        for (int u = 0; u < kChannels; ++u) {
            float in_order[kUnit];
#pragma unroll
            for (int i = 0; i < kUnit; ++i) {
                const int place = u * kUnit + i;
                in_order[i] = values[place % kChannels][place / kChannels];
            }
            Unit<T> unit;
            unit.from_floats(in_order);
            const int left = count * kChannels - u * kUnit;
            unit.write(to + u * kUnit, left < kUnit ? left : kUnit, pictures.aligned);
        }
        return;
    }
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
        Unit<T> unit;
        unit.from_floats(values[c]);
        unit.write(sample + c * pictures.plane() + pixel, count, pictures.aligned);
    }
}

// visit(half of the stretch, pixels in it), for the halves that have any
template <class Visit>
NN_INLINE void for_halves(int count, const Visit& visit) {
#pragma unroll
    for (int half = 0; half < kStretch / kUnit; ++half) {
        const int left = count - half * kUnit;
        if (left > 0) visit(half, left < kUnit ? left : kUnit);
    }
}

template <class Visit>
NN_INLINE void for_values(const Visit& visit) {
#pragma unroll
    for (int c = 0; c < kChannels; ++c)
#pragma unroll
        for (int i = 0; i < kUnit; ++i) visit(c, i);
}

// visit(row of samples or groups, stretch)
template <class Visit>
NN_INLINE void for_stretches(const Place& place, const Pictures& pictures, int64_t rows, const Visit& visit) {
    const uint32_t stretches = uint32_t(pictures.stretches());
    for_tasks(place, rows, pictures.tasks(), [&](int64_t number, int64_t task) {
        const uint32_t row = uint32_t(task) / stretches, column = (uint32_t(task) - row * stretches) * kStretch;
        const int64_t left = pictures.width - column;
        visit(number, Stretch{row, column, int(left < kStretch ? left : kStretch)});
    });
}

template <ImageKind kind, bool fits, class L>
NN_INLINE void add_to_pixels(const Pictures& pictures, const Normalise& normalise, float std, const Replaced& replaced,
                             const Draw& draw, const RoundKeys& keys, int64_t pixel, Values& values) {
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
        const int64_t at = c * pictures.plane() + pixel;
        if constexpr (kind == ImageKind::gaussian) {
            float n[kUnit];
            normals_at<L, fits>(at, draw, keys, n);
#pragma unroll
            for (int i = 0; i < kUnit; ++i) values[c][i] = fmaf(n[i], std, values[c][i]);
        } else {
            uint32_t words[kUnit];
            words_at<L, fits>(at, draw, keys, words);
            const float pepper = normalise.of(c, 0), salt = normalise.of(c, 255);
#pragma unroll
            for (int i = 0; i < kUnit; ++i) values[c][i] = replaced.of(words[i], values[c][i], pepper, salt);
        }
    }
}

// Each sample on its own: none, Gaussian, salt-and-pepper.
template <ImageKind kind, bool fits, class L, class T>
NN_INLINE void image_thread(const Place& place, const Pictures& pictures, T* y, const DrawSource& source) {
    const Normalise normalise(pictures);
    const float std = float(*pictures.strength);
    const Thresholds thresholds = thresholds_of(*pictures.strength);
    const bool on = kind == ImageKind::gaussian ? std != 0 : thresholds.either != 0;
    const Replaced replaced(thresholds);
    const RoundKeys keys = source.keys();
    for_stretches(place, pictures, pictures.samples, [&](int64_t sample, const Stretch& at) {
        Bytes bytes;
        bytes.read(pictures, sample, at);
        T* to = y + sample * kChannels * pictures.plane();
        for_halves(at.count, [&](int half, int count) {
            Values values;
            for_values([&](int c, int i) { values[c][i] = normalise.of(c, bytes.of(half * kUnit + i, c)); });
            const int64_t pixel = at.pixel(pictures) + half * kUnit;
            if constexpr (kind != ImageKind::none)
                if (on)
                    add_to_pixels<kind, fits, L>(pictures, normalise, std, replaced, source.of(sample), keys, pixel,
                                                 values);
            write_pixels(pictures, to, pixel, count, values);
        });
    });
}

// visit(first sample, samples, stretch)
template <class Visit>
NN_INLINE void for_picture_groups(const Place& place, const Pictures& pictures, const MixPlan& plan,
                                  const Visit& visit) {
    for_stretches(place, pictures, plan.groups, [&](int64_t group, const Stretch& at) {
        const int64_t first = group * plan.group_size, left = pictures.samples - first;
        visit(first, left < plan.group_size ? left : plan.group_size, at);
    });
}

template <class T>
NN_INLINE void image_shift_thread(const Place& place, const Pictures& pictures, T* y, const MixPlan& plan) {
    const Normalise normalise(pictures);
    const float alpha = float(*pictures.strength);
    for_picture_groups(place, pictures, plan, [&](int64_t first, int64_t k, const Stretch& at) {
        Bytes row, next;
        row.read(pictures, first, at);
        for (int64_t i = 0; i < k; ++i) {
            next.read(pictures, first + (i + 1 < k ? i + 1 : 0), at);
            T* to = y + (first + i) * kChannels * pictures.plane();
            for_halves(at.count, [&](int half, int count) {
                Values values;
                for_values([&](int c, int j) {
                    const float own = normalise.of(c, row.of(half * kUnit + j, c));
                    const float difference = normalise.of(c, next.of(half * kUnit + j, c)) - own;
                    values[c][j] = k > 1 && alpha != 0 ? fmaf(alpha, difference, own) : own;
                });
                write_pixels(pictures, to, at.pixel(pictures) + half * kUnit, count, values);
            });
            row = next;
        }
    });
}

// The sum over the group first, then each picture anew: its bytes are a third or a fifth of what is moved.
template <class T>
NN_INLINE void image_optimal_q_thread(const Place& place, const Pictures& pictures, T* y, const MixPlan& plan) {
    const Normalise normalise(pictures);
    for_picture_groups(place, pictures, plan, [&](int64_t first, int64_t k, const Stretch& at) {
        const bool mixes = k > 1 && *pictures.strength != 0;
        const float scale = k == plan.group_size ? plan.scale : plan.last_scale;
        // Half by half: the sums of both would not fit in a thread's registers.
        for_halves(at.count, [&](int half, int count) {
            Bytes bytes;
            Values values, sums = {};
            for (int64_t i = 0; mixes && i < k; ++i) {
                bytes.read(pictures, first + i, at);
                for_values([&](int c, int j) {
                    const float own = normalise.of(c, bytes.of(half * kUnit + j, c));
                    sums[c][j] = i == 0 ? own : sums[c][j] + own;
                });
            }
            for (int64_t i = 0; i < k; ++i) {
                bytes.read(pictures, first + i, at);
                for_values([&](int c, int j) {
                    const float own = normalise.of(c, bytes.of(half * kUnit + j, c));
                    values[c][j] = mixes ? (own + sums[c][j]) * scale : own;
                });
                write_pixels(pictures, y + (first + i) * kChannels * pictures.plane(),
                             at.pixel(pictures) + half * kUnit, count, values);
            }
        });
    });
}

}  // namespace noisynn
