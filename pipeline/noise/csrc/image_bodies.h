// image_noise: what one thread does for eight pixels of a picture's row: uint8 -> flip -> normalise -> noise -> the float
// format. Where rows are whole eights, a GPU reads their 24 bytes in three instructions and writes each channel in one of
// 16 bytes a 16-bit format, beside its neighbours'.
#pragma once

#include "mix_bodies.h"

namespace noisynn {

constexpr int kChannels = 3, kStretch = kUnit;

// How a thread finds its stretch: rows are whole stretches, written plane by plane or pixel by pixel (channels_last), or they
// are not, and each is looked at.
enum class Stretches { planes, pixels, pieces };

// The order of pipeline/noise/operators.py.
enum class ImageKind : int64_t { none, gaussian, salt_and_pepper, circular_shift, optimal_q };

struct Pictures {
    const uint8_t* pixels;    // (samples, height, width, 3)
    const bool* flip;         // (samples,); null: none is
    const float *mean, *std;  // (3,)
    int64_t samples, height, width;
    uint32_t plane;      // height * width
    bool aligned;        // rows are whole stretches; x and y begin at multiples of 16 bytes
    bool channels_last;  // of y
    const double* strength;

    NN_INLINE int64_t size() const { return int64_t(plane) * kChannels; }
    NN_INLINE int64_t stretches() const { return whole(width, kStretch); }
    NN_INLINE int64_t tasks() const { return height * stretches(); }
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

    template <Stretches how>
    NN_INLINE void read(const Pictures& pictures, int64_t sample, const Stretch& at) {
        const bool mirrored = pictures.flip != nullptr && pictures.flip[sample];
        uint32_t pixel = at.pixel;
        if (mirrored) {
            const uint32_t width = uint32_t(pictures.width), column = pixel % width;
            pixel += width - at.count - 2 * column;
        }
        const uint8_t* from = pictures.pixels + sample * pictures.size() + int64_t(pixel) * kChannels;
        if constexpr (how != Stretches::pieces) {
#pragma unroll
            for (int i = 0; i < kChannels; ++i) eight[i] = reinterpret_cast<const Eight*>(from)[i];
            if (mirrored) reverse();
        } else {
#pragma unroll
            for (int i = 0; i < kStretch; ++i)
#pragma unroll
                for (int c = 0; c < kChannels; ++c)
                    level[i * kChannels + c] = i < at.count ? from[(mirrored ? at.count - 1 - i : i) * kChannels + c] : 0;
        }
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

template <Stretches how, class T>
NN_INLINE void write_unit(const Unit<T>& unit, T* to, int count) {
    if constexpr (how != Stretches::pieces)
        unit.write_whole(to);
    else
        unit.write(to, count, false);
}

// make(channel, its eight values) for each channel, written plane by plane, so that a thread holds no more than one.
template <Stretches how, class T, class Make>
NN_INLINE void write_planes(const Pictures& pictures, T* sample, const Stretch& at, const Make& make) {
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
        float values[kUnit];
        make(c, values);
        Unit<T> unit;
        unit.from_floats(values);
        write_unit<how>(unit, sample + (int64_t(pictures.plane) * c + at.pixel), at.count);
    }
}

// The same, written pixel by pixel.
template <Stretches how, class T, class Make>
NN_INLINE void write_pixels(T* sample, const Stretch& at, const Make& make) {
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
        write_unit<how>(unit, sample + int64_t(at.pixel) * kChannels + u * kUnit, left < kUnit ? left : kUnit);
    }
}

template <Stretches how, class T, class Make>
NN_INLINE void write(const Pictures& pictures, T* sample, const Stretch& at, const Make& make) {
    if constexpr (how == Stretches::planes)
        write_planes<how>(pictures, sample, at, make);
    else if constexpr (how == Stretches::pixels)
        write_pixels<how>(sample, at, make);
    else if (pictures.channels_last)
        write_pixels<how>(sample, at, make);
    else
        write_planes<how>(pictures, sample, at, make);
}

// visit(row of samples or groups, stretch)
template <Stretches how, class Visit>
NN_INLINE void for_stretches(const Place& place, const Pictures& pictures, int64_t count, const Visit& visit) {
    const uint32_t stretches = uint32_t(pictures.stretches()), width = uint32_t(pictures.width);
    for_tasks(place, count, pictures.tasks(), [&](int64_t number, int64_t task) {
        Stretch at = {uint32_t(task) * kStretch, kStretch};
        if constexpr (how == Stretches::pieces) {
            const uint32_t row = uint32_t(task) / stretches, column = (uint32_t(task) - row * stretches) * kStretch;
            const uint32_t left = width - column;
            at = {row * width + column, int(left < kStretch ? left : kStretch)};
        }
        visit(number, at);
    });
}

// The noise of a stretch, channel by channel. Of planes, whose values are not held together, all six blocks of Philox are
// drawn at once: the keys of a round serve them all.
template <ImageKind kind, Stretches how, class L>
struct StretchNoise {
    static constexpr bool at_once = how == Stretches::planes, fits = how != Stretches::pieces;
    const Pictures& pictures;
    const Normalise& normalise;
    const Draw& draw;
    const RoundKeys& keys;
    const Replaced& replaced;
    float spread;
    uint32_t pixel;
    uint32_t words[kChannels][kUnit];

    NN_INLINE StretchNoise(const Pictures& pictures, const Normalise& normalise, const Draw& draw, const RoundKeys& keys,
                           const Replaced& replaced, float spread, uint32_t pixel)
        : pictures(pictures), normalise(normalise), draw(draw), keys(keys), replaced(replaced), spread(spread),
          pixel(pixel) {}
    NN_INLINE void begin() {
        if constexpr (at_once) {
            constexpr int blocks = kUnit / 4;
            typename L::W numbers[kChannels * blocks], made[kChannels * blocks][4];
#pragma unroll
            for (int n = 0; n < kChannels * blocks; ++n)
                numbers[n] = L::blocks(uint32_t((int64_t(pictures.plane) * (n / blocks) + pixel) / 4) + n % blocks, 0);
            philox4x32_10<L>(numbers, draw, keys, made);
#pragma unroll
            for (int n = 0; n < kChannels * blocks; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i) words[n / blocks][n % blocks * 4 + i] = uint32_t(made[n][i]);
        }
    }
    NN_INLINE void add_to(int channel, float (&values)[kUnit]) {
        const int64_t at = int64_t(pictures.plane) * channel + pixel;
        if constexpr (kind == ImageKind::gaussian && at_once) {
#pragma unroll
            for (int i = 0; i < kUnit; i += 2)
                add_normals<L>(words[channel][i], words[channel][i + 1], spread, values[i], values[i + 1]);
        } else if constexpr (kind == ImageKind::gaussian) {
            add_normals_at<L, fits>(at, draw, keys, spread, values);
        } else {
            if constexpr (!at_once) words_at<L, fits>(at, draw, keys, words[channel]);
            const float pepper = normalise.of(channel, 0), salt = normalise.of(channel, 255);
#pragma unroll
            for (int i = 0; i < kUnit; ++i) values[i] = replaced.of(words[channel][i], values[i], pepper, salt);
        }
    }
};

// Each sample on its own: none, Gaussian, salt-and-pepper.
template <ImageKind kind, Stretches how, class L, class T>
NN_INLINE void image_thread(const Place& place, const Pictures& pictures, T* y, const DrawSource& source) {
    const Normalise normalise(pictures);
    const float std = float(*pictures.strength), spread = spread_of<L>(std);
    const Thresholds thresholds = thresholds_of(*pictures.strength);
    const bool on = kind == ImageKind::gaussian ? std != 0 : kind != ImageKind::none && thresholds.either != 0;
    const Replaced replaced(thresholds);
    const RoundKeys keys = source.keys();
    for_stretches<how>(place, pictures, pictures.samples, [&](int64_t sample, const Stretch& at) {
        Bytes bytes;
        bytes.read<how>(pictures, sample, at);
        const Draw draw = source.of(sample);
        StretchNoise<kind, how, L> noise(pictures, normalise, draw, keys, replaced, spread, at.pixel);
        if constexpr (kind != ImageKind::none)
            if (on) noise.begin();
        T* to = y + sample * pictures.size();
        write<how>(pictures, to, at, [&](int c, float (&values)[kUnit]) {
#pragma unroll
            for (int i = 0; i < kUnit; ++i) values[i] = normalise.of(c, bytes.of(i, c));
            if constexpr (kind != ImageKind::none)
                if (on) noise.add_to(c, values);
        });
    });
}

// visit(first sample, samples, stretch)
template <Stretches how, class Visit>
NN_INLINE void for_picture_groups(const Place& place, const Pictures& pictures, const MixPlan& plan,
                                  const Visit& visit) {
    for_stretches<how>(place, pictures, plan.groups, [&](int64_t group, const Stretch& at) {
        const int64_t first = group * plan.group_size, left = pictures.samples - first;
        visit(first, left < plan.group_size ? left : plan.group_size, at);
    });
}

template <Stretches how, class T>
NN_INLINE void image_shift_thread(const Place& place, const Pictures& pictures, T* y, const MixPlan& plan) {
    const Normalise normalise(pictures);
    const float alpha = float(*pictures.strength);
    for_picture_groups<how>(place, pictures, plan, [&](int64_t first, int64_t k, const Stretch& at) {
        Bytes row, next;
        row.read<how>(pictures, first, at);
#pragma unroll 2
        for (int64_t i = 0; i < k; ++i) {
            next.read<how>(pictures, first + (i + 1 < k ? i + 1 : 0), at);
            T* to = y + (first + i) * pictures.size();
            write<how>(pictures, to, at, [&](int c, float (&values)[kUnit]) {
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
template <Stretches how, class T>
NN_INLINE void image_optimal_q_thread(const Place& place, const Pictures& pictures, T* y, const MixPlan& plan) {
    const Normalise normalise(pictures);
    for_picture_groups<how>(place, pictures, plan, [&](int64_t first, int64_t k, const Stretch& at) {
        const bool mixes = k > 1 && *pictures.strength != 0;
        const float scale = k == plan.group_size ? plan.scale : plan.last_scale;
        Bytes bytes;
        float sums[kChannels][kUnit] = {};
#pragma unroll 2
        for (int64_t i = 0; mixes && i < k; ++i) {
            bytes.read<how>(pictures, first + i, at);
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
            bytes.read<how>(pictures, first + i, at);
            write<how>(pictures, y + (first + i) * pictures.size(), at, [&](int c, float (&values)[kUnit]) {
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
