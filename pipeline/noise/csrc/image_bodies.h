// image_noise: what one thread does for eight pixels of a picture's row: uint8 -> flip -> normalise -> noise -> the float
// format. Where rows are whole eights, a GPU reads their 24 bytes in three instructions and writes each channel in one of
// 16 bytes a 16-bit format, beside its neighbours'.
#pragma once

#include "mix_bodies.h"

namespace noisynn {

constexpr int kChannels = 3, kStretch = kUnit;

// The order of pipeline/noise/operators.py.
enum class ImageKind : int64_t { none, gaussian, salt_and_pepper, circular_shift, optimal_q };

struct Pictures {
    const uint8_t* pixels;    // (samples, height, width, 3)
    const bool* flip;         // (samples,); null: none is
    const float *mean, *std;  // (3,)
    int64_t samples, height, width;  // fewer than 2^32 pixels in a picture
    bool aligned;        // rows are whole stretches, which begin at multiples of 8 bytes in x and of 16 in y
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
    uint32_t pixel;  // its first, counted row by row
    int count;       // pixels, of one row
};

// Eight bytes, which a GPU moves in one instruction.
struct alignas(8) Eight {
    uint32_t word[2];
};

// A level as a float. In bits: a conversion would take the pipe that logarithms and roots go through.
NN_INLINE float float_of_byte(uint32_t word, int byte) {
#ifdef __CUDA_ARCH__
    return __uint_as_float(__byte_perm(word, 0x4B000000u, 0x7440u | byte)) - 0x1p23f;
#else
    return float(word >> 8 * byte & 0xFF);
#endif
}

// The bytes of a stretch, in the order of the result.
struct Bytes {
    union {
        uint8_t level[kStretch * kChannels];
        Eight eight[kChannels];
        uint32_t word[kStretch * kChannels / 4];
    };

    NN_INLINE void read(const Pictures& pictures, int64_t sample, const Stretch& at) {
        const bool mirrored = pictures.flip != nullptr && pictures.flip[sample];
        uint32_t pixel = at.pixel;
        if (mirrored) {
            const uint32_t width = uint32_t(pictures.width), column = pixel % width;
            pixel += width - at.count - 2 * column;
        }
        const uint8_t* from = pictures.pixels + (sample * pictures.plane() + pixel) * kChannels;
        if (pictures.aligned) {
#pragma unroll
            for (int i = 0; i < kChannels; ++i) eight[i] = reinterpret_cast<const Eight*>(from)[i];
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
    NN_INLINE float of(int pixel, int channel) const {
        const int byte = pixel * kChannels + channel;
        return float_of_byte(word[byte / 4], byte % 4);
    }
};

// make(channel, its eight values) for each channel, written where they belong: planes are written one by one, so that a
// thread holds no more than one.
template <class T, class Make>
NN_INLINE void write_pixels(const Pictures& pictures, T* sample, const Stretch& at, const Make& make) {
    if (!pictures.channels_last) {
#pragma unroll
        for (int c = 0; c < kChannels; ++c) {
            float values[kUnit];
            make(c, values);
            Unit<T> unit;
            unit.from_floats(values);
            unit.write(sample + c * pictures.plane() + at.pixel, at.count, pictures.aligned);
        }
        return;
    }
    float values[kChannels][kUnit];
#pragma unroll
    for (int c = 0; c < kChannels; ++c) make(c, values[c]);
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
        const int left = at.count * kChannels - u * kUnit;
        unit.write(sample + int64_t(at.pixel) * kChannels + u * kUnit, left < kUnit ? left : kUnit, pictures.aligned);
    }
}

// visit(row of samples or groups, stretch)
template <class Visit>
NN_INLINE void for_stretches(const Place& place, const Pictures& pictures, int64_t rows, const Visit& visit) {
    const uint32_t stretches = uint32_t(pictures.stretches()), width = uint32_t(pictures.width);
    for_tasks(place, rows, pictures.tasks(), [&](int64_t number, int64_t task) {
        Stretch at = {uint32_t(task) * kStretch, kStretch};
        if (!pictures.aligned) {
            const uint32_t row = uint32_t(task) / stretches, column = (uint32_t(task) - row * stretches) * kStretch;
            const uint32_t left = width - column;
            at = {row * width + column, int(left < kStretch ? left : kStretch)};
        }
        visit(number, at);
    });
}

template <ImageKind kind, bool fits, class L>
NN_INLINE void add_to_channel(const Pictures& pictures, const Normalise& normalise, float spread,
                              const Replaced& replaced, const Draw& draw, const RoundKeys& keys, int channel,
                              uint32_t pixel, float (&values)[kUnit]) {
    const int64_t at = channel * pictures.plane() + pixel;
    if constexpr (kind == ImageKind::gaussian) {
        add_normals_at<L, fits>(at, draw, keys, spread, values);
    } else {
        uint32_t words[kUnit];
        words_at<L, fits>(at, draw, keys, words);
        const float pepper = normalise.of(channel, 0), salt = normalise.of(channel, 255);
#pragma unroll
        for (int i = 0; i < kUnit; ++i) values[i] = replaced.of(words[i], values[i], pepper, salt);
    }
}

// Each sample on its own: none, Gaussian, salt-and-pepper.
template <ImageKind kind, bool fits, class L, class T>
NN_INLINE void image_thread(const Place& place, const Pictures& pictures, T* y, const DrawSource& source) {
    const Normalise normalise(pictures);
    const float std = float(*pictures.strength), spread = spread_of<L>(std);
    const Thresholds thresholds = thresholds_of(*pictures.strength);
    const bool on = kind == ImageKind::gaussian ? std != 0 : thresholds.either != 0;
    const Replaced replaced(thresholds);
    const RoundKeys keys = source.keys();
    for_stretches(place, pictures, pictures.samples, [&](int64_t sample, const Stretch& at) {
        Bytes bytes;
        bytes.read(pictures, sample, at);
        const Draw draw = source.of(sample);
        write_pixels(pictures, y + sample * kChannels * pictures.plane(), at, [&](int c, float (&values)[kUnit]) {
#pragma unroll
            for (int i = 0; i < kUnit; ++i) values[i] = normalise.of(c, bytes.of(i, c));
            if constexpr (kind != ImageKind::none)
                if (on)
                    add_to_channel<kind, fits, L>(pictures, normalise, spread, replaced, draw, keys, c, at.pixel, values);
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
#pragma unroll 2
        for (int64_t i = 0; i < k; ++i) {
            next.read(pictures, first + (i + 1 < k ? i + 1 : 0), at);
            T* to = y + (first + i) * kChannels * pictures.plane();
            write_pixels(pictures, to, at, [&](int c, float (&values)[kUnit]) {
#pragma unroll
                for (int j = 0; j < kUnit; ++j) {
                    const float own = normalise.of(c, row.of(j, c));
                    const float difference = normalise.of(c, next.of(j, c)) - own;
                    values[j] = k > 1 && alpha != 0 ? fmaf(alpha, difference, own) : own;
                }
            });
            row = next;
        }
    });
}

// The sum of the levels first, which is exact, then each picture anew: its bytes are a third or a fifth of what is moved.
template <class T>
NN_INLINE void image_optimal_q_thread(const Place& place, const Pictures& pictures, T* y, const MixPlan& plan) {
    const Normalise normalise(pictures);
    for_picture_groups(place, pictures, plan, [&](int64_t first, int64_t k, const Stretch& at) {
        const bool mixes = k > 1 && *pictures.strength != 0;
        const float scale = k == plan.group_size ? plan.scale : plan.last_scale;
        Bytes bytes;
        float sums[kChannels][kUnit] = {};
#pragma unroll 2
        for (int64_t i = 0; mixes && i < k; ++i) {
            bytes.read(pictures, first + i, at);
#pragma unroll
            for (int c = 0; c < kChannels; ++c)
#pragma unroll
                for (int j = 0; j < kUnit; ++j) sums[c][j] += bytes.of(j, c);
        }
#pragma unroll
        for (int c = 0; c < kChannels; ++c)
#pragma unroll
            for (int j = 0; j < kUnit; ++j) sums[c][j] = fmaf(sums[c][j], normalise.scale[c], float(k) * normalise.bias[c]);
        for (int64_t i = 0; i < k; ++i) {
            bytes.read(pictures, first + i, at);
            write_pixels(pictures, y + (first + i) * kChannels * pictures.plane(), at, [&](int c, float (&values)[kUnit]) {
#pragma unroll
                for (int j = 0; j < kUnit; ++j) {
                    const float own = normalise.of(c, bytes.of(j, c));
                    values[j] = mixes ? (own + sums[c][j]) * scale : own;
                }
            });
        }
    });
}

}  // namespace noisynn
