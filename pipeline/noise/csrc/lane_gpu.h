// The lane that a GPU's thread is. On the CPU, where the tests walk the threads, exact functions stand in for its fast ones.
#pragma once

#include <type_traits>

#include "lanes_scalar.h"

namespace noisynn {

// One lane with the special function unit's logarithm, root, sine and cosine: 2^-22 absolute for lg2, 2^-20.9 for the
// angle's functions. They make 16-bit noise bound by memory; exact ones would take three times the instructions.
struct GpuLane : Scalar {
    static constexpr bool has_fast_math = true;

    using Scalar::multiply;  // of floats
    static NN_INLINE W multiply(W a, uint32_t b) {
#ifdef __CUDA_ARCH__
        // In PTX: of the product in C++ nvcc forgets that the factors have 32 bits, and adds zeros to each.
        W product;
        asm("mul.wide.u32 %0, %1, %2;" : "=l"(product) : "r"(uint32_t(a)), "r"(b));
        return product;
#else
        return Scalar::multiply(a, b);
#endif
    }
    // sqrt(|lg2 u|). lg2 of what is just below 1 may come out as above 0: its sign is left out.
    static NN_INLINE F fast_radius(F u) {
#ifdef __CUDA_ARCH__
        float log2, root;
        asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(log2) : "f"(u));
        asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(root) : "f"(fabsf(log2)));
        return root;
#else
        return sqrtf(fabsf(log2f(u)));
#endif
    }
    static NN_INLINE void fast_cosine_and_sine(U word, F& cosine, F& sine) {
        const float angle = float(int32_t(word)) * 1.4629180792671596e-9f;  // 2 pi / 2^32, from -pi to pi
#ifdef __CUDA_ARCH__
        asm("cos.approx.ftz.f32 %0, %1;" : "=f"(cosine) : "f"(angle));
        asm("sin.approx.ftz.f32 %0, %1;" : "=f"(sine) : "f"(angle));
#else
        cosine = cosf(angle), sine = sinf(angle);
#endif
    }
};
// A product of integers must not hide that of floats: the compiler would convert them without a word.
static_assert(std::is_same_v<decltype(GpuLane::multiply(1.0f, 1.0f)), float>);

}  // namespace noisynn
