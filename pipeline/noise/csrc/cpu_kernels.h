// What noise_cpu.cpp needs of the kernels, which are compiled once for each instruction set.
#pragma once

#include <cstdint>

#include "noise_math.h"

namespace noisynn {

enum class Format { float32, bfloat16, float16, float64 };

// A linear noise within one group of samples.
struct Mix {
    int64_t samples;             // k, at least 2
    int64_t x_stride, y_stride;  // elements from one sample to the next
    bool optimal;                // optimal Q; else circular shift
    bool transposed;             // for the backward pass
    double alpha;                // of the circular shift
    bool streams = false;        // as in Kernels
};

// What LayerNorm needs of a row, and leaves of it for the way back. F: float, or double for float64.
template <class F>
struct NormRow {
    int64_t width;
    const F *weight, *bias;
    F epsilon;
    F *mean, *scale;  // scale: 1 / sqrt(variance + epsilon)
};

// A row in x's format and in the wide one: `to` reads, `from` writes, `norm` does LayerNorm into wide, `back` its
// gradient. All wide pointers are of F; streams: as in Kernels.
template <class F>
struct RowKernels {
    void (*to_wide)(Format, const void* x, F* wide, int64_t count);
    void (*from_wide)(Format, const F* wide, void* y, int64_t count, bool streams);
    void (*norm)(Format, const void* x, F* wide, const NormRow<F>&);
    void (*norm_back)(Format, const void* x, F* gradient, F* room, void* dx, const NormRow<F>&, F* dweight, F* dbias,
                      bool streams);
};

// Each works on elements [begin, end) of a sample (of each sample of a group), counted from where x and y point to.
// streams: the result goes to memory past the caches, where it can: half the traffic, for it need not be read first, but
// whoever takes it next reads it from memory.
struct Kernels {
    const char* name;
    void (*gaussian_noise)(Format, const void* x, void* y, int64_t begin, int64_t end, const Draw&, double std,
                           bool streams);
    void (*salt_and_pepper)(Format, const void* x, void* y, int64_t begin, int64_t end, const Draw&, Thresholds,
                            double low, double high, bool streams);
    void (*linear_mix)(Format, const void* x, void* y, int64_t begin, int64_t end, const Mix&);
    void (*random_words)(int64_t* words, int64_t begin, int64_t end, const Draw&);
    RowKernels<float> rows;          // of all formats but float64
    RowKernels<double> double_rows;  // of float64
};

extern const Kernels kernels_avx512, kernels_avx2, kernels_scalar;

}  // namespace noisynn
