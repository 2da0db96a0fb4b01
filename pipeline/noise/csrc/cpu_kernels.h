// What noise_cpu.cpp needs of the kernels, which are compiled once for each instruction set.
#pragma once

#include <cstdint>

#include "noise_math.h"

namespace noisynn {

enum class Format { float32, bfloat16, float16, float64 };

// A linear noise within one group of samples.
struct Mix {
    int64_t samples;         // k, at least 2
    int64_t sample_stride;   // elements from one sample to the next
    bool optimal;            // optimal Q; else circular shift
    bool transposed;         // for the backward pass
    double alpha;            // of the circular shift
};

// Each works on elements [begin, end) of a sample (of each sample of a group), counted from where x and y point to.
struct Kernels {
    const char* name;
    void (*gaussian_noise)(Format, const void* x, void* y, int64_t begin, int64_t end, const Draw&, double std);
    void (*salt_and_pepper)(Format, const void* x, void* y, int64_t begin, int64_t end, const Draw&, Thresholds,
                            double low, double high);
    void (*linear_mix)(Format, const void* x, void* y, int64_t begin, int64_t end, const Mix&);
    void (*random_words)(int64_t* words, int64_t begin, int64_t end, const Draw&);
};

extern const Kernels kernels_avx512, kernels_avx2, kernels_scalar;

}  // namespace noisynn
