// LayerNorm with noise behind it on the CPU, and the way back: pipeline/noise/ops.py's norm_noise. A task is one token
// of the samples of a group: its rows are made wide (float32; float64 of float64), and stay in the cache until they are
// written, rounded once.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstdint>
#include <tuple>
#include <vector>

#include "cpu_operators.h"

namespace noisynn {
namespace {

enum class Way : int64_t { gaussian, shift, optimal };  // pipeline/noise/operators.py's order

constexpr int64_t kBackwardParts = 64;  // rows of weights' gradients, whatever the threads, so that their sum is the same

template <class F>
const RowKernels<F>& row_kernels() {
    if constexpr (std::is_same_v<F, double>)
        return kernels().double_rows;
    else
        return kernels().rows;
}

template <class F>
constexpr Format wide_format() {
    return std::is_same_v<F, double> ? Format::float64 : Format::float32;
}

struct Shape {
    Format format;
    int64_t samples, tokens, width, bytes, group, spared;
    bool mixes, streams;

    Shape(const Tensor& x, Way way, double strength, int64_t group_size, int64_t first_token)
        : format(format_of(x)), bytes(x.element_size()), group(way == Way::gaussian ? 1 : group_size),
          spared(first_token), mixes(way != Way::gaussian && strength != 0) {
        STD_TORCH_CHECK(x.dim() == 3 && x.size(2) > 0, "norm_noise takes (samples, tokens, width)");
        STD_TORCH_CHECK(group_size >= 1, "group_size: at least 1");
        samples = x.size(0), tokens = x.size(1), width = x.size(2);
        streams = x.numel() * bytes >= kStreamed;
    }
    int64_t tasks() const { return (samples + group - 1) / group * tokens; }
    int64_t row(int64_t sample, int64_t token) const { return sample * tokens + token; }
    template <class Byte>
    Byte* at(Byte* memory, int64_t row) const {
        return memory + row * width * bytes;
    }
};

// visit(first sample, samples, token, whether they are mixed)
template <class Visit>
void visit_task(const Shape& shape, int64_t task, const Visit& visit) {
    const int64_t first = task / shape.tokens * shape.group, token = task % shape.tokens;
    const int64_t count = std::min(shape.group, shape.samples - first);
    visit(first, count, token, shape.mixes && count > 1 && token >= shape.spared);
}

template <class F>
const F* numbers(const Tensor& x, int64_t count) {
    STD_TORCH_CHECK(x.scalar_type() == (std::is_same_v<F, double> ? ScalarType::Double : ScalarType::Float) &&
                        x.numel() == count && x.is_contiguous(),
                    "weight, bias, mean and scale: float32 (float64 for float64), as many as norm_noise made or takes");
    return static_cast<const F*>(x.const_data_ptr());
}

template <class F>
void mix_rows(const Shape& shape, Way way, double alpha, int64_t count, bool transposed, const F* from, F* to) {
    const Mix mix = {count, shape.width, shape.width, way == Way::optimal, transposed, alpha};
    kernels().linear_mix(wide_format<F>(), from, to, 0, shape.width, mix);
}

// The row of a sample's token, in `row`, with noise: what its elements draw is that of their places in the sample.
template <class F>
void add_gaussian(F* row, int64_t token, int64_t width, const Draw& draw, double std) {
    const int64_t begin = token * width;
    F* sample = origin(row, begin, sizeof(F));
    kernels().gaussian_noise(wide_format<F>(), sample, sample, begin, begin + width, draw, std, false);
}

template <class F>
void forward(const Shape& shape, Way way, const Tensor& x, const Tensor& weight, const Tensor& bias, double epsilon,
             double strength, const Draws& draws, Tensor& y, Tensor& means, Tensor& scales) {
    const F *w = numbers<F>(weight, shape.width), *b = numbers<F>(bias, shape.width);
    F *mean = static_cast<F*>(means.mutable_data_ptr()), *scale = static_cast<F*>(scales.mutable_data_ptr());
    const char* from = static_cast<const char*>(x.const_data_ptr());
    char* to = static_cast<char*>(y.mutable_data_ptr());
    torch::stable::parallel_for(0, shape.tasks(), 16, [&](int64_t begin, int64_t end) {
        std::vector<F> rows(shape.group * shape.width), mixed(shape.mixes ? rows.size() : 0);
        for (int64_t task = begin; task < end; ++task)
            visit_task(shape, task, [&](int64_t first, int64_t count, int64_t token, bool mixes) {
                for (int64_t i = 0; i < count; ++i) {
                    const int64_t row = shape.row(first + i, token);
                    const NormRow<F> norm = {shape.width, w, b, F(epsilon), mean + row, scale + row};
                    F* wide = rows.data() + i * shape.width;
                    row_kernels<F>().norm(shape.format, shape.at(from, row), wide, norm);
                    if (way == Way::gaussian && strength != 0 && token >= shape.spared)
                        add_gaussian(wide, token, shape.width, draws.of(first + i), strength);
                }
                if (mixes) mix_rows(shape, way, strength, count, false, rows.data(), mixed.data());
                for (int64_t i = 0; i < count; ++i)
                    row_kernels<F>().from_wide(shape.format, (mixes ? mixed : rows).data() + i * shape.width,
                                               shape.at(to, shape.row(first + i, token)), shape.width, shape.streams);
            });
    });
}

template <class F>
void backward(const Shape& shape, Way way, double alpha, const Tensor& gradient, const Tensor& x, const Tensor& weight,
              const Tensor& means, const Tensor& scales, Tensor& dx, Tensor& dweight, Tensor& dbias) {
    const int64_t tokens = shape.samples * shape.tokens;
    const F *w = numbers<F>(weight, shape.width), *mean = numbers<F>(means, tokens), *scale = numbers<F>(scales, tokens);
    const char *g = static_cast<const char*>(gradient.const_data_ptr()), *from = static_cast<const char*>(x.const_data_ptr());
    char* to = static_cast<char*>(dx.mutable_data_ptr());
    torch::stable::parallel_for(0, kBackwardParts, 1, [&](int64_t begin, int64_t end) {
        std::vector<F> rows(shape.group * shape.width), mixed(shape.mixes ? rows.size() : 0), room(shape.width);
        for (int64_t part = begin; part < end; ++part) {
            F* weights = static_cast<F*>(dweight.mutable_data_ptr()) + part * shape.width;
            F* biases = static_cast<F*>(dbias.mutable_data_ptr()) + part * shape.width;
            std::fill(weights, weights + shape.width, F(0));
            std::fill(biases, biases + shape.width, F(0));
            for (int64_t task = part; task < shape.tasks(); task += kBackwardParts)
                visit_task(shape, task, [&](int64_t first, int64_t count, int64_t token, bool mixes) {
                    for (int64_t i = 0; i < count; ++i)
                        row_kernels<F>().to_wide(shape.format, shape.at(g, shape.row(first + i, token)),
                                                 rows.data() + i * shape.width, shape.width);
                    if (mixes) mix_rows(shape, way, alpha, count, true, rows.data(), mixed.data());
                    for (int64_t i = 0; i < count; ++i) {
                        const int64_t row = shape.row(first + i, token);
                        // The way back only reads what the way there left.
                        const NormRow<F> norm = {shape.width, w, nullptr, F(0), const_cast<F*>(mean + row),
                                                 const_cast<F*>(scale + row)};
                        row_kernels<F>().norm_back(shape.format, shape.at(from, row),
                                                   (mixes ? mixed : rows).data() + i * shape.width, room.data(),
                                                   shape.at(to, row), norm, weights, biases, shape.streams);
                    }
                });
        }
    });
}

std::tuple<Tensor, Tensor, Tensor> norm_noise(Tensor input, Tensor weight, Tensor bias, double epsilon, int64_t way,
                                              Tensor strength, Tensor sample_ids, Tensor epoch, int64_t seed,
                                              int64_t stream, int64_t group_size, int64_t first_token, bool) {
    const Tensor x = torch::stable::contiguous(input);
    const double level = number(strength);
    const Shape shape(x, Way(way), level, group_size, first_token);
    const Draws draws(sample_ids, epoch, seed, stream, shape.samples);
    Tensor y = torch::stable::empty_like(x);
    Tensor means = torch::stable::new_empty(weight, {shape.samples, shape.tokens});
    Tensor scales = torch::stable::new_empty(weight, {shape.samples, shape.tokens});
    if (shape.format == Format::float64)
        forward<double>(shape, Way(way), x, weight, bias, epsilon, level, draws, y, means, scales);
    else
        forward<float>(shape, Way(way), x, weight, bias, epsilon, level, draws, y, means, scales);
    return {y, means, scales};
}

std::tuple<Tensor, Tensor, Tensor> norm_noise_backward(Tensor gradient, Tensor input, Tensor weight, Tensor means,
                                                       Tensor scales, int64_t way, Tensor strength, int64_t group_size,
                                                       int64_t first_token) {
    const Tensor x = torch::stable::contiguous(input), g = torch::stable::contiguous(gradient);
    const double level = number(strength);
    const Shape shape(x, Way(way), level, group_size, first_token);
    STD_TORCH_CHECK(g.scalar_type() == x.scalar_type() && g.numel() == x.numel(), "gradient: as x");
    Tensor dx = torch::stable::empty_like(x);
    Tensor dweight = torch::stable::new_empty(weight, {kBackwardParts, shape.width});
    Tensor dbias = torch::stable::new_empty(weight, {kBackwardParts, shape.width});
    if (shape.format == Format::float64)
        backward<double>(shape, Way(way), level, g, x, weight, means, scales, dx, dweight, dbias);
    else
        backward<float>(shape, Way(way), level, g, x, weight, means, scales, dx, dweight, dbias);
    return {dx, dweight, dbias};
}

}  // namespace
}  // namespace noisynn

STABLE_TORCH_LIBRARY_IMPL(noisynn, CPU, m) {
    m.impl("norm_noise", TORCH_BOX(&noisynn::norm_noise));
    m.impl("norm_noise_backward", TORCH_BOX(&noisynn::norm_noise_backward));
}
