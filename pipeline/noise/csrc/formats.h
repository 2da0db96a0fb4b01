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
#ifdef __CUDA_ARCH__
    p->bits = __bfloat16_as_ushort(__float2bfloat16_rn(v));
#else
    const uint32_t bits = Scalar::bits(v);
    p->bits = v != v ? 0x7FC0 : uint16_t((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
#endif
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

// Two neighbours at once, p at an even place: a GPU rounds and packs both in one instruction, and takes each out of their
// word in one.
template <class T>
NN_INLINE void store_two(T* p, float one, float other) {
    store_one(p, one);
    store_one(p + 1, other);
}
template <class T>
NN_INLINE void load_two(const T* p, float& one, float& other) {
    one = load_one(p);
    other = load_one(p + 1);
}
#ifdef __CUDA_ARCH__
template <>
__device__ __forceinline__ void load_two<BFloat16>(const BFloat16* p, float& one, float& other) {
    uint32_t word;
    memcpy(&word, p, 4);
    one = __uint_as_float(word << 16);
    other = __uint_as_float(word & 0xFFFF0000u);
}
template <>
__device__ __forceinline__ void load_two<Half>(const Half* p, float& one, float& other) {
    __half2 both;
    memcpy(&both, p, 4);
    one = __low2float(both);
    other = __high2float(both);
}
template <>
__device__ __forceinline__ void store_two<BFloat16>(BFloat16* p, float one, float other) {
    const __nv_bfloat162 both = __floats2bfloat162_rn(one, other);
    memcpy(p, &both, 4);
}
template <>
__device__ __forceinline__ void store_two<Half>(Half* p, float one, float other) {
    const __half2 both = __floats2half2_rn(one, other);
    memcpy(p, &both, 4);
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
    template <class T>
    static NN_INLINE void stream(T* p, F v) {
        store_one(p, v);
    }
    static NN_INLINE void fence() {}
};

}  // namespace noisynn
