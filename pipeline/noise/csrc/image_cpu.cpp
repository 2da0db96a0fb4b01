// image_noise on the CPU: uint8 pictures -> flip -> normalise -> noise -> the float format, a strip of rows at a time, so that
// memory is read once and written once and all between stays in the cache.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <vector>

#include "cpu_operators.h"
#include "formats.h"

namespace noisynn {
namespace {

constexpr int64_t kChannels = 3;
constexpr int64_t kStrip = 4096;  // pixels of a sample in one strip, where its rows are not longer: 48 KB of floats

// The order of pipeline/noise/ops.py.
enum class Kind : int64_t { none, gaussian, salt_and_pepper, circular_shift, optimal_q };

struct Pictures {
    const uint8_t* pixels;  // (samples, height, width, 3)
    const bool* flip;       // null: none is
    int64_t samples, height, width;
    float scale[kChannels], bias[kChannels];  // a level's normalised value is level * scale + bias

    float normalised(int64_t channel, float level) const { return fmaf(level, scale[channel], bias[channel]); }

    // Rows [top, bottom) of a sample -> (3, pixels) floats.
    void read(int64_t sample, int64_t top, int64_t bottom, float* planes) const {
        const int64_t pixels_of_strip = (bottom - top) * width;
        const bool mirrored = flip != nullptr && flip[sample];
        for (int64_t y = top; y < bottom; ++y) {
            const uint8_t* row = pixels + ((sample * height + y) * width) * kChannels;
            for (int64_t channel = 0; channel < kChannels; ++channel) {
                float* out = planes + channel * pixels_of_strip + (y - top) * width;
                const float s = scale[channel], b = bias[channel];
                if (mirrored)
                    for (int64_t x = 0; x < width; ++x) out[x] = fmaf(row[(width - 1 - x) * kChannels + channel], s, b);
                else
                    for (int64_t x = 0; x < width; ++x) out[x] = fmaf(row[x * kChannels + channel], s, b);
            }
        }
    }
};

// (3, pixels) floats -> pixels [begin, end) of a sample, plane by plane or pixel by pixel.
template <class T>
void write(const float* planes, T* sample, int64_t plane_size, int64_t begin, int64_t count, bool channels_last) {
    for (int64_t channel = 0; channel < kChannels; ++channel) {
        const float* plane = planes + channel * count;
        T* out = channels_last ? sample + begin * kChannels + channel : sample + channel * plane_size + begin;
        const int64_t step = channels_last ? kChannels : 1;
        for (int64_t i = 0; i < count; ++i) store_one(out + i * step, plane[i]);
    }
}

struct Noise {
    Kind kind;
    double strength;
    bool is_linear() const { return kind == Kind::circular_shift || kind == Kind::optimal_q; }
};

void add_noise(const Noise& noise, const Pictures& pictures, const Draw& draw, float* planes, int64_t begin,
               int64_t count) {
    const int64_t plane_size = pictures.height * pictures.width;
    for (int64_t channel = 0; channel < kChannels; ++channel) {
        const int64_t first = channel * plane_size + begin;
        float* row = origin(planes + channel * count, first, sizeof(float));
        if (noise.kind == Kind::gaussian)
            kernels().gaussian_noise(Format::float32, row, row, first, first + count, draw, noise.strength,
                                     false);
        else
            kernels().salt_and_pepper(Format::float32, row, row, first, first + count, draw,
                                      thresholds_of(noise.strength), pictures.normalised(channel, 0),
                                      pictures.normalised(channel, 255), false);
    }
}

// One strip of one group of samples (of one sample, where the noise does not mix).
template <class T>
void strip(const Noise& noise, const Pictures& pictures, const Draws& draws, T* out, int64_t first, int64_t k,
           int64_t top, int64_t bottom, bool channels_last, std::vector<float>& memory) {
    const int64_t width = pictures.width, plane_size = pictures.height * width;
    const int64_t count = (bottom - top) * width, floats = kChannels * count;
    memory.resize(2 * k * floats);
    float *planes = memory.data(), *mixed = planes + k * floats;
    for (int64_t i = 0; i < k; ++i) {
        pictures.read(first + i, top, bottom, planes + i * floats);
        if (!noise.is_linear() && noise.kind != Kind::none && noise.strength != 0)
            add_noise(noise, pictures, draws.of(first + i), planes + i * floats, top * width, count);
    }
    if (noise.is_linear() && k > 1 && noise.strength != 0) {
        const Mix mix = {k, floats, floats, noise.kind == Kind::optimal_q, false, noise.strength};
        kernels().linear_mix(Format::float32, planes, mixed, 0, floats, mix);
        planes = mixed;
    }
    for (int64_t i = 0; i < k; ++i)
        write(planes + i * floats, out + (first + i) * kChannels * plane_size, plane_size, top * width, count,
              channels_last);
}

void check(const Tensor& images, const Tensor& mean, const Tensor& std, const Tensor& flip, const Tensor& out) {
    STD_TORCH_CHECK(images.scalar_type() == ScalarType::Byte && images.dim() == 4 && images.size(3) == kChannels,
                    "images: uint8 (samples, height, width, 3)");
    for (const Tensor& of_channel : {mean, std})
        STD_TORCH_CHECK(of_channel.scalar_type() == ScalarType::Float && of_channel.numel() == kChannels &&
                            of_channel.is_contiguous(),
                        "mean and std: float32, one for each channel");
    STD_TORCH_CHECK(flip.scalar_type() == ScalarType::Bool && flip.is_contiguous() &&
                        (flip.numel() == 0 || flip.numel() == images.size(0)),
                    "flip: bool, one for each sample, or none");
    STD_TORCH_CHECK(out.numel() == images.numel(), "out: (samples, 3, height, width)");
}

}  // namespace

// Fills `out`, which ops.py has made in the wanted format and layout.
void image_noise(Tensor images, Tensor mean, Tensor std, Tensor flip, int64_t kind, Tensor strength, Tensor sample_ids,
                 Tensor epoch, int64_t seed, int64_t stream, int64_t group_size, bool channels_last, Tensor out) {
    const Tensor ordered = torch::stable::contiguous(images);
    check(ordered, mean, std, flip, out);
    Pictures pictures = {static_cast<const uint8_t*>(ordered.const_data_ptr()),
                         flip.numel() ? static_cast<const bool*>(flip.const_data_ptr()) : nullptr,
                         ordered.size(0), ordered.size(1), ordered.size(2), {}, {}};
    for (int64_t channel = 0; channel < kChannels; ++channel) {
        const float s = static_cast<const float*>(std.const_data_ptr())[channel];
        pictures.scale[channel] = 1.0f / (255.0f * s);
        pictures.bias[channel] = -static_cast<const float*>(mean.const_data_ptr())[channel] / s;
    }
    const Noise noise = {Kind(kind), number(strength)};
    const Draws draws(sample_ids, epoch, seed, stream, pictures.samples);
    const int64_t k = noise.is_linear() ? group_size : 1, groups = (pictures.samples + k - 1) / k;
    const int64_t rows = std::max<int64_t>(1, kStrip / std::max<int64_t>(1, pictures.width));
    const int64_t strips = (pictures.height + rows - 1) / rows;
    const Format format = format_of(out);
    torch::stable::parallel_for(0, groups * strips, 1, [&](int64_t from, int64_t to) {
        std::vector<float> memory;
        for (int64_t task = from; task < to; ++task) {
            const int64_t first = task / strips * k, top = task % strips * rows;
            const int64_t members = std::min(k, pictures.samples - first), bottom = std::min(top + rows, pictures.height);
            const auto fill = [&](auto* p) {
                strip(noise, pictures, draws, p, first, members, top, bottom, channels_last, memory);
            };
            if (format == Format::float32) fill(static_cast<float*>(out.mutable_data_ptr()));
            if (format == Format::bfloat16) fill(static_cast<BFloat16*>(out.mutable_data_ptr()));
            if (format == Format::float16) fill(static_cast<Half*>(out.mutable_data_ptr()));
        }
    });
}

}  // namespace noisynn

STABLE_TORCH_LIBRARY_IMPL(noisynn, CPU, m) { m.impl("image_noise_", TORCH_BOX(&noisynn::image_noise)); }
