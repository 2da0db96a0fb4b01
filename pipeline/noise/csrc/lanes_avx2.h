// Eight lanes of AVX2, FMA and F16C. Operation for operation what Scalar does: the results are the same to the bit.
#pragma once

#include <immintrin.h>

#include "formats.h"

namespace noisynn {

struct Avx2 {
    using W = __m256i;
    using U = __m256i;
    using F = __m256;
    static constexpr int width = 8, parts = 2;
    static constexpr bool has_fast_math = false;

    static NN_INLINE W wide(uint32_t value) { return _mm256_set1_epi64x(value); }
    // Lane 4q + j holds block 2j + q, so that transposing within halves puts all into memory's order. Part 0 has the
    // even lanes, part 1 the odd ones.
    static NN_INLINE W blocks(uint32_t block, int part) {
        const __m256i even = _mm256_setr_epi64x(0, 4, 1, 5);
        return _mm256_add_epi32(_mm256_add_epi32(even, _mm256_set1_epi64x(2 * part)), _mm256_set1_epi64x(block));
    }
    static NN_INLINE W multiply(W a, uint32_t b) { return _mm256_mul_epu32(a, _mm256_set1_epi64x(b)); }
    static NN_INLINE W high(W a) { return _mm256_srli_epi64(a, 32); }
    static NN_INLINE W exclusive_or(W a, uint32_t b) { return _mm256_xor_si256(a, _mm256_set1_epi32(int(b))); }
    static NN_INLINE W exclusive_or(W a, W b, uint32_t c) {
        return _mm256_xor_si256(_mm256_xor_si256(a, b), _mm256_set1_epi32(int(c)));
    }
    static NN_INLINE U join(W even, W odd) { return _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA); }

    static NN_INLINE F set(float value) { return _mm256_set1_ps(value); }
    // There is no conversion of unsigned words: the halves are exact, and their sum is rounded once.
    static NN_INLINE F to_float(U a) {
        const F upper = _mm256_cvtepi32_ps(_mm256_srli_epi32(a, 16));
        const F lower = _mm256_cvtepi32_ps(_mm256_and_si256(a, _mm256_set1_epi32(0xFFFF)));
        return _mm256_fmadd_ps(upper, _mm256_set1_ps(65536.0f), lower);
    }
    static NN_INLINE F signed_to_float(U a) { return _mm256_cvtepi32_ps(a); }
    static NN_INLINE F multiply(F a, F b) { return _mm256_mul_ps(a, b); }
    static NN_INLINE F add(F a, F b) { return _mm256_add_ps(a, b); }
    static NN_INLINE F subtract(F a, F b) { return _mm256_sub_ps(a, b); }
    static NN_INLINE F multiply_add(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
    static NN_INLINE F square_root(F a) { return _mm256_sqrt_ps(a); }
    static NN_INLINE U bits(F a) { return _mm256_castps_si256(a); }
    static NN_INLINE F from_bits(U a) { return _mm256_castsi256_ps(a); }
    static NN_INLINE U exponent_above(U bits, uint32_t base) {
        return _mm256_srai_epi32(_mm256_sub_epi32(bits, _mm256_set1_epi32(int(base))), 23);
    }
    static NN_INLINE F mantissa_at(U bits, U exponent) {
        return from_bits(_mm256_sub_epi32(bits, _mm256_slli_epi32(exponent, 23)));
    }
    static NN_INLINE F select_below(U words, uint64_t threshold, F yes, F no) {
        if (threshold == 0) return no;
        const U last = _mm256_set1_epi32(int(uint32_t(threshold - 1)));
        return _mm256_blendv_ps(no, yes, from_bits(_mm256_cmpeq_epi32(_mm256_min_epu32(words, last), words)));
    }
    // Lane l of v[w] is word w of its block; afterwards v[j] holds two blocks as they lie in memory.
    static NN_INLINE void transpose(F (&v)[4]) {
        const F low01 = _mm256_unpacklo_ps(v[0], v[1]), high01 = _mm256_unpackhi_ps(v[0], v[1]);
        const F low23 = _mm256_unpacklo_ps(v[2], v[3]), high23 = _mm256_unpackhi_ps(v[2], v[3]);
        v[0] = _mm256_shuffle_ps(low01, low23, 0x44);
        v[1] = _mm256_shuffle_ps(low01, low23, 0xEE);
        v[2] = _mm256_shuffle_ps(high01, high23, 0x44);
        v[3] = _mm256_shuffle_ps(high01, high23, 0xEE);
    }
    static NN_INLINE void transpose(U (&v)[4]) {
        F f[4] = {from_bits(v[0]), from_bits(v[1]), from_bits(v[2]), from_bits(v[3])};
        transpose(f);
        for (int i = 0; i < 4; ++i) v[i] = bits(f[i]);
    }

    static NN_INLINE F load(const float* p) { return _mm256_loadu_ps(p); }
    static NN_INLINE F load(const Half* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
    static NN_INLINE F load(const BFloat16* p) {
        return from_bits(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
    }
    static NN_INLINE void store(float* p, F v) { _mm256_storeu_ps(p, v); }
    template <class T>
    static NN_INLINE void store(T* p, F v) {
        _mm_storeu_si128((__m128i*)p, narrow(p, v));
    }
    // Past the caches, p at a multiple of the vector; other cores see it after fence().
    static NN_INLINE void stream(float* p, F v) { _mm256_stream_ps(p, v); }
    template <class T>
    static NN_INLINE void stream(T* p, F v) {
        _mm_stream_si128((__m128i*)p, narrow(p, v));
    }
    static NN_INLINE void fence() { _mm_sfence(); }

private:
    static NN_INLINE __m128i narrow(const Half*, F v) { return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT); }
    static NN_INLINE __m128i narrow(const BFloat16*, F v) {
        const U b = bits(v), odd = _mm256_and_si256(_mm256_srli_epi32(b, 16), _mm256_set1_epi32(1));
        const U rounded = _mm256_srli_epi32(_mm256_add_epi32(b, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF))), 16);
        const U nan = bits(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
        const U out = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7FC0), nan);
        return _mm256_castsi256_si128(_mm256_permute4x64_epi64(_mm256_packus_epi32(out, out), 0x08));
    }
};

}  // namespace noisynn
