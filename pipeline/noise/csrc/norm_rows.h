// LayerNorm of one row on the CPU, for cpu_kernels.cpp: plain loops, which the compiler makes vectors of. Sums are taken
// in sixteen parts whatever the lanes, so that all instruction sets give the same bits.
#pragma once

#include <cmath>

namespace noisynn {
namespace {

constexpr int64_t kParts = 16;

// The sum of term(0) to term(count - 1).
template <class F, class Term>
NN_INLINE F sum_in_parts(int64_t count, const Term& term) {
    F parts[kParts] = {};
    int64_t at = 0;
    for (; at + kParts <= count; at += kParts)
        for (int64_t j = 0; j < kParts; ++j) parts[j] += term(at + j);
    for (int64_t j = 0; at < count; ++at, ++j) parts[j] += term(at);
    for (int64_t half = kParts / 2; half > 0; half /= 2)
        for (int64_t j = 0; j < half; ++j) parts[j] += parts[j + half];
    return parts[0];
}

template <class T>
void to_wide(const T* x, float* out, int64_t count) {
    for_elements(0, count, [&](auto lanes, int64_t at) {
        using L = decltype(lanes);
        L::store(out + at, L::load(x + at));
    });
}

template <class T>
void from_wide(const float* x, T* out, int64_t count) {
    for_elements(0, count, [&](auto lanes, int64_t at) {
        using L = decltype(lanes);
        L::store(out + at, L::load(x + at));
    });
}

void to_wide(const double* x, double* out, int64_t count) { std::copy(x, x + count, out); }
void from_wide(const double* x, double* out, int64_t count) { std::copy(x, x + count, out); }

template <class T, class F>
void norm_row(const T* x, F* out, const NormRow<F>& row) {
    const int64_t count = row.width;
    to_wide(x, out, count);
    const F mean = sum_in_parts<F>(count, [&](int64_t i) NN_ALWAYS_INLINE { return out[i]; }) / F(count);
    const F variance = sum_in_parts<F>(count, [&](int64_t i) NN_ALWAYS_INLINE {
                           return (out[i] - mean) * (out[i] - mean);
                       }) / F(count);
    const F scale = F(1) / std::sqrt(variance + row.epsilon);
    for (int64_t i = 0; i < count; ++i) out[i] = (out[i] - mean) * scale * row.weight[i] + row.bias[i];
    *row.mean = mean;
    *row.scale = scale;
}

// With n = (x - mean) * scale and g the gradient times weight: dx = scale * (g - mean(g) - n * mean(g n)).
// `gradient` (wide) is used up; `n` is room for a row.
template <class T, class F>
void norm_row_back(const T* x, F* gradient, F* n, T* dx, const NormRow<F>& row, F* dweight, F* dbias) {
    const int64_t count = row.width;
    const F mean = *row.mean, scale = *row.scale;
    to_wide(x, n, count);
    for (int64_t i = 0; i < count; ++i) {
        n[i] = (n[i] - mean) * scale;
        dweight[i] += gradient[i] * n[i];
        dbias[i] += gradient[i];
        gradient[i] *= row.weight[i];
    }
    const F mean_g = sum_in_parts<F>(count, [&](int64_t i) NN_ALWAYS_INLINE { return gradient[i]; }) / F(count);
    const F mean_gn = sum_in_parts<F>(count, [&](int64_t i) NN_ALWAYS_INLINE { return gradient[i] * n[i]; }) / F(count);
    for (int64_t i = 0; i < count; ++i) n[i] = scale * (gradient[i] - mean_g - n[i] * mean_gn);
    from_wide(n, dx, count);
}

}  // namespace
}  // namespace noisynn
