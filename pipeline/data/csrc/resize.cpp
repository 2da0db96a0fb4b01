#include "resize.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace noisynn {
namespace {

// Pillow's filters. The order of operations is theirs: the last bit of a weight depends on it.
double triangle(double x) {
    x = std::fabs(x);
    return x < 1.0 ? 1.0 - x : 0.0;
}

double cubic(double x) {
    constexpr double a = -0.5;
    x = std::fabs(x);
    if (x < 1.0) return ((a + 2.0) * x - (a + 3.0)) * x * x + 1;
    return x < 2.0 ? (((x - 5) * x + 8) * x - 4) * a : 0.0;
}

int32_t fixed_point(double weight) {
    return int32_t((weight < 0 ? -0.5 : 0.5) + weight * (1 << kWeightBits));
}

bool runs_here([[maybe_unused]] const ResizeKernels& kernels) {
#ifdef __x86_64__
    if (&kernels == &resize_avx512)
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni");
    if (&kernels == &resize_avx2) return __builtin_cpu_supports("avx2");
#endif
    return true;
}

}  // namespace

void Axis::set(int length, int resized, int first, int outputs, Interpolation interpolation, bool mirrored) {
    const double scale = double(length) / resized, stretch = std::max(scale, 1.0);
    const double support = (interpolation == bicubic ? 2.0 : 1.0) * stretch, inverse = 1.0 / stretch;
    const auto reach = [&](int output, int& from, int& to) {
        const double center = (first + output + 0.5) * scale;
        from = std::max(int(center - support + 0.5), 0);
        to = std::min(int(center + support + 0.5), length);
    };
    count = outputs;
    begin = length, end = 0, taps = 0;
    for (int output = 0; output < count; ++output) {
        int from, to;
        reach(output, from, to);
        begin = std::min(begin, from), end = std::max(end, to), taps = std::max(taps, to - from);
    }
    taps = (taps + 3) / 4 * 4;
    overrun = 0;
    start.resize(count);
    weights.assign(size_t(count) * taps, 0);
    exact.resize(taps);
    for (int output = 0; output < count; ++output) {
        int from, to;
        reach(output, from, to);
        const double center = (first + output + 0.5) * scale;
        double sum = 0.0;
        for (int x = 0; x < to - from; ++x) {
            const double place = (x + from - center + 0.5) * inverse;
            exact[x] = interpolation == bicubic ? cubic(place) : triangle(place);
            sum += exact[x];
        }
        const int slot = mirrored ? count - 1 - output : output;
        for (int x = 0; x < to - from; ++x)
            weights[size_t(slot) * taps + x] = fixed_point(sum != 0.0 ? exact[x] / sum : exact[x]);
        start[slot] = from - begin;
        overrun = std::max(overrun, from + taps - end);
    }
}

const ResizeKernels* resize_kernels() {
    static const ResizeKernels* const chosen = [] {
        const ResizeKernels* const all[] = {
#ifdef __x86_64__
            &resize_avx512, &resize_avx2,
#endif
            &resize_scalar};
        const char* wanted = std::getenv("NOISYNN_LANES");
        for (const ResizeKernels* kernels : all)
            if (runs_here(*kernels) && (wanted == nullptr || std::strcmp(wanted, kernels->name) == 0)) return kernels;
        return static_cast<const ResizeKernels*>(nullptr);
    }();
    return chosen;
}

}  // namespace noisynn
