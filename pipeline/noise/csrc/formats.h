// The 16-bit floats: from and to float, rounded to the nearest, ties to even, as torch does.
#pragma once

#include "lanes_scalar.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace noisynn {

struct Half {
    uint16_t bits;
};

struct BFloat16 {
    uint16_t bits;
};

NN_INLINE float load_one(const float* p) { return *p; }
NN_INLINE void store_one(float* p, float v) { *p = v; }
NN_INLINE float load_one(const BFloat16* p) { return Scalar::from_bits(uint32_t(p->bits) << 16); }
NN_INLINE void store_one(BFloat16* p, float v) {
    const uint32_t bits = Scalar::bits(v);
    p->bits = v != v ? 0x7FC0 : uint16_t((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}
#ifdef __CUDACC__
NN_INLINE float load_one(const Half* p) { return __half2float(__ushort_as_half(p->bits)); }
NN_INLINE void store_one(Half* p, float v) { p->bits = __half_as_ushort(__float2half_rn(v)); }
#else
NN_INLINE float load_one(const Half* p) {
    _Float16 value;
    memcpy(&value, p, 2);
    return float(value);
}
NN_INLINE void store_one(Half* p, float v) {
    const _Float16 value = _Float16(v);
    memcpy(p, &value, 2);
}
#endif

// The remainder of a row, in the same terms as the vectors.
struct OneLane : Scalar {
    template <class T>
    static NN_INLINE F load(const T* p) {
        return load_one(p);
    }
    template <class T>
    static NN_INLINE void store(T* p, F v) {
        store_one(p, v);
    }
};

}  // namespace noisynn
