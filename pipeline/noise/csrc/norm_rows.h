// LayerNorm of one row on the CPU, for cpu_kernels.cpp. Sums are taken in sixteen parts whatever the lanes, so that all
// instruction sets give the same bits. float64 is there for gradcheck: it gets plain loops.
#pragma once

#include <cmath>

namespace noisynn {
namespace {

constexpr int64_t kParts = 16;

template <class F>
NN_INLINE F sum_of_parts(F (&parts)[kParts]) {
    for (int64_t half = kParts / 2; half > 0; half /= 2)
        for (int64_t j = 0; j < half; ++j) parts[j] += parts[j + half];
    return parts[0];
}

// The sum of term(lanes, 0) to term(lanes, count - 1).
template <class Term>
NN_INLINE float sum_in_parts(int64_t count, const Term& term) {
    constexpr int vectors = kParts / Lanes::width;
    typename Lanes::F sums[vectors];
    for (auto& sum : sums) sum = Lanes::set(0);
    int64_t at = 0;
    for (; at + kParts <= count; at += kParts)
        for (int v = 0; v < vectors; ++v) sums[v] = Lanes::add(sums[v], term(Lanes{}, at + v * Lanes::width));
    float parts[kParts];
    for (int v = 0; v < vectors; ++v) Lanes::store(parts + v * Lanes::width, sums[v]);
    for (int64_t j = 0; at < count; ++at, ++j) parts[j] += term(OneLane{}, at);
    return sum_of_parts(parts);
}

template <class T>
void to_wide(const T* x, float* out, int64_t count) {
    for_elements(0, count, [&](auto lanes, int64_t at) {
        using L = decltype(lanes);
        L::store(out + at, L::load(x + at));
    });
}

template <class T>
void from_wide(const float* x, T* out, int64_t count, bool streams) {
    with_streams(streams, out, [&](auto yes) {
        for_elements(0, count, [&](auto lanes, int64_t at) {
            using L = decltype(lanes);
            put<yes.value, L>(out + at, L::load(x + at));
        });
    });
}

template <class T>
void norm_row(const T* x, float* out, const NormRow<float>& row) {
    const int64_t count = row.width;
    const float mean = sum_in_parts(count, [&](auto lanes, int64_t at) NN_ALWAYS_INLINE {
                           using L = decltype(lanes);
                           const auto value = L::load(x + at);
                           L::store(out + at, value);
                           return value;
                       }) / float(count);
    const float variance = sum_in_parts(count, [&](auto lanes, int64_t at) NN_ALWAYS_INLINE {
                               using L = decltype(lanes);
                               const auto centred = L::subtract(L::load(out + at), L::set(mean));
                               return L::multiply(centred, centred);
                           }) / float(count);
    const float scale = 1.0f / std::sqrt(variance + row.epsilon);
    for_elements(0, count, [&](auto lanes, int64_t at) NN_ALWAYS_INLINE {
        using L = decltype(lanes);
        const auto n = L::multiply(L::subtract(L::load(out + at), L::set(mean)), L::set(scale));
        L::store(out + at, L::multiply_add(n, L::load(row.weight + at), L::load(row.bias + at)));
    });
    *row.mean = mean;
    *row.scale = scale;
}

// With n = (x - mean) * scale and g the gradient times weight: dx = scale * (g - mean(g) - n * mean(g n)).
// `gradient` (wide) is used up; `n` is room for a row.
template <class T>
void norm_row_back(const T* x, float* gradient, float* n, T* dx, const NormRow<float>& row, float* dweight,
                   float* dbias, bool streams) {
    const int64_t count = row.width;
    const float mean = *row.mean, scale = *row.scale;
    const float mean_g = sum_in_parts(count, [&](auto lanes, int64_t at) NN_ALWAYS_INLINE {
                             using L = decltype(lanes);
                             const auto normal =
                                 L::multiply(L::subtract(L::load(x + at), L::set(mean)), L::set(scale));
                             const auto incoming = L::load(gradient + at);
                             const auto g = L::multiply(incoming, L::load(row.weight + at));
                             L::store(dweight + at, L::multiply_add(incoming, normal, L::load(dweight + at)));
                             L::store(dbias + at, L::add(L::load(dbias + at), incoming));
                             L::store(n + at, normal);
                             L::store(gradient + at, g);
                             return g;
                         }) / float(count);
    const float mean_gn = sum_in_parts(count, [&](auto lanes, int64_t at) NN_ALWAYS_INLINE {
                              using L = decltype(lanes);
                              return L::multiply(L::load(gradient + at), L::load(n + at));
                          }) / float(count);
    with_streams(streams, dx, [&](auto yes) {
        for_elements(0, count, [&](auto lanes, int64_t at) NN_ALWAYS_INLINE {
            using L = decltype(lanes);
            const auto centred = L::subtract(L::load(gradient + at), L::set(mean_g));
            const auto left = L::multiply_add(L::load(n + at), L::set(-mean_gn), centred);
            put<yes.value, L>(dx + at, L::multiply(left, L::set(scale)));
        });
    });
}

void to_wide(const double* x, double* out, int64_t count) { std::copy(x, x + count, out); }
void from_wide(const double* x, double* out, int64_t count, bool) { std::copy(x, x + count, out); }

template <class Term>
double plain_sum(int64_t count, const Term& term) {
    double parts[kParts] = {};
    for (int64_t i = 0; i < count; ++i) parts[i % kParts] += term(i);
    return sum_of_parts(parts);
}

void norm_row(const double* x, double* out, const NormRow<double>& row) {
    const int64_t count = row.width;
    const double mean = plain_sum(count, [&](int64_t i) { return x[i]; }) / double(count);
    const double variance =
        plain_sum(count, [&](int64_t i) { return (x[i] - mean) * (x[i] - mean); }) / double(count);
    const double scale = 1.0 / std::sqrt(variance + row.epsilon);
    for (int64_t i = 0; i < count; ++i) out[i] = (x[i] - mean) * scale * row.weight[i] + row.bias[i];
    *row.mean = mean;
    *row.scale = scale;
}

void norm_row_back(const double* x, double* gradient, double* n, double* dx, const NormRow<double>& row,
                   double* dweight, double* dbias, bool) {
    const int64_t count = row.width;
    for (int64_t i = 0; i < count; ++i) {
        n[i] = (x[i] - *row.mean) * *row.scale;
        dweight[i] += gradient[i] * n[i];
        dbias[i] += gradient[i];
        gradient[i] *= row.weight[i];
    }
    const double mean_g = plain_sum(count, [&](int64_t i) { return gradient[i]; }) / double(count);
    const double mean_gn = plain_sum(count, [&](int64_t i) { return gradient[i] * n[i]; }) / double(count);
    for (int64_t i = 0; i < count; ++i) dx[i] = *row.scale * (gradient[i] - mean_g - n[i] * mean_gn);
}

}  // namespace
}  // namespace noisynn
