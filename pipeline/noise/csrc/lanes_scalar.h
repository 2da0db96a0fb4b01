// One lane: the remainder of a row on the CPU, machines without vector units, and each thread of a GPU.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "philox.h"

namespace noisynn {

struct Scalar {
    using W = uint64_t;
    using U = uint32_t;
    using I = int32_t;
    using F = float;
    static constexpr int width = 1, parts = 1;
    static constexpr bool has_fast_math = false;

    static NN_INLINE W wide(uint32_t value) { return value; }
    static NN_INLINE W blocks(uint32_t block, int) { return block; }
    static NN_INLINE W multiply(W a, uint32_t b) { return uint64_t(uint32_t(a)) * b; }
    static NN_INLINE W high(W a) { return a >> 32; }
    static NN_INLINE W exclusive_or(W a, uint32_t b) { return a ^ b; }
    static NN_INLINE W exclusive_or(W a, W b, uint32_t c) { return a ^ b ^ c; }
    static NN_INLINE U join(W even, W) { return uint32_t(even); }

    static NN_INLINE F set(float value) { return value; }
    static NN_INLINE F to_float(U a) { return float(a); }
    static NN_INLINE F signed_to_float(U a) { return float(I(a)); }
    static NN_INLINE F multiply(F a, F b) { return a * b; }
    static NN_INLINE F add(F a, F b) { return a + b; }
    static NN_INLINE F subtract(F a, F b) { return a - b; }
    static NN_INLINE F multiply_add(F a, F b, F c) { return fmaf(a, b, c); }
    static NN_INLINE F square_root(F a) { return sqrtf(a); }
    static NN_INLINE U bits(F a) {
        U bits;
        memcpy(&bits, &a, 4);
        return bits;
    }
    static NN_INLINE F from_bits(U a) {
        F value;
        memcpy(&value, &a, 4);
        return value;
    }
    static NN_INLINE U exponent_above(U bits, uint32_t base) { return U(I(bits - base) >> 23); }
    static NN_INLINE F mantissa_at(U bits, U exponent) { return from_bits(bits - (exponent << 23)); }
    static NN_INLINE F select_below(U words, uint64_t threshold, F yes, F no) { return words < threshold ? yes : no; }
    static NN_INLINE void transpose(F (&)[4]) {}
    static NN_INLINE void transpose(U (&)[4]) {}
};

}  // namespace noisynn
