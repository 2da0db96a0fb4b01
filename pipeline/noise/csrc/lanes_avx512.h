// Sixteen lanes of AVX-512 (F and DQ). Operation for operation what Scalar does: the results are the same to the bit.
#pragma once

#include <immintrin.h>

#include "formats.h"

namespace noisynn {

struct Avx512 {
    using W = __m512i;
    using U = __m512i;
    using F = __m512;
    static constexpr int width = 16, parts = 2;
    static constexpr bool has_fast_math = false;

    static NN_INLINE W wide(uint32_t value) { return _mm512_set1_epi64(value); }
    // Lane 4q + j holds block 4j + q, so that transposing within quarters puts all into memory's order. Part 0 has the
    // even lanes, part 1 the odd ones.
    static NN_INLINE W blocks(uint32_t block, int part) {
        const __m512i even = _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11);
        return _mm512_add_epi32(_mm512_add_epi32(even, _mm512_set1_epi64(4 * part)), _mm512_set1_epi64(block));
    }
    static NN_INLINE W multiply(W a, uint32_t b) { return _mm512_mul_epu32(a, _mm512_set1_epi64(b)); }
    // A shuffle, for it goes to another port than products and shifts do.
    static NN_INLINE W high(W a) { return _mm512_shuffle_epi32(a, _MM_PERM_ENUM(0xF5)); }
    static NN_INLINE W exclusive_or(W a, uint32_t b) { return _mm512_xor_si512(a, _mm512_set1_epi32(int(b))); }
    static NN_INLINE W exclusive_or(W a, W b, uint32_t c) {
        return _mm512_ternarylogic_epi32(a, b, _mm512_set1_epi32(int(c)), 0x96);
    }
    static NN_INLINE U join(W even, W odd) { return _mm512_mask_blend_epi32(0xAAAA, even, _mm512_slli_epi64(odd, 32)); }

    static NN_INLINE F set(float value) { return _mm512_set1_ps(value); }
    static NN_INLINE F to_float(U a) { return _mm512_cvtepu32_ps(a); }
    static NN_INLINE F signed_to_float(U a) { return _mm512_cvtepi32_ps(a); }
    static NN_INLINE F multiply(F a, F b) { return _mm512_mul_ps(a, b); }
    static NN_INLINE F add(F a, F b) { return _mm512_add_ps(a, b); }
    static NN_INLINE F subtract(F a, F b) { return _mm512_sub_ps(a, b); }
    static NN_INLINE F multiply_add(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
    static NN_INLINE F square_root(F a) { return _mm512_sqrt_ps(a); }
    static NN_INLINE U bits(F a) { return _mm512_castps_si512(a); }
    static NN_INLINE F from_bits(U a) { return _mm512_castsi512_ps(a); }
    static NN_INLINE U exponent_above(U bits, uint32_t base) {
        return _mm512_srai_epi32(_mm512_sub_epi32(bits, _mm512_set1_epi32(int(base))), 23);
    }
    static NN_INLINE F mantissa_at(U bits, U exponent) {
        return from_bits(_mm512_sub_epi32(bits, _mm512_slli_epi32(exponent, 23)));
    }
    static NN_INLINE F select_below(U words, uint64_t threshold, F yes, F no) {
        if (threshold == 0) return no;
        const U last = _mm512_set1_epi32(int(uint32_t(threshold - 1)));
        return _mm512_mask_blend_ps(_mm512_cmple_epu32_mask(words, last), no, yes);
    }
    // Lane l of v[w] is word w of its block; afterwards v[j] holds four blocks as they lie in memory.
    static NN_INLINE void transpose(F (&v)[4]) {
        const F low01 = _mm512_unpacklo_ps(v[0], v[1]), high01 = _mm512_unpackhi_ps(v[0], v[1]);
        const F low23 = _mm512_unpacklo_ps(v[2], v[3]), high23 = _mm512_unpackhi_ps(v[2], v[3]);
        v[0] = pair_low(low01, low23);
        v[1] = pair_high(low01, low23);
        v[2] = pair_low(high01, high23);
        v[3] = pair_high(high01, high23);
    }
    static NN_INLINE void transpose(U (&v)[4]) {
        F f[4] = {from_bits(v[0]), from_bits(v[1]), from_bits(v[2]), from_bits(v[3])};
        transpose(f);
        for (int i = 0; i < 4; ++i) v[i] = bits(f[i]);
    }

    static NN_INLINE F load(const float* p) { return _mm512_loadu_ps(p); }
    static NN_INLINE F load(const Half* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
    static NN_INLINE F load(const BFloat16* p) {
        return from_bits(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
    }
    static NN_INLINE void store(float* p, F v) { _mm512_storeu_ps(p, v); }
    template <class T>
    static NN_INLINE void store(T* p, F v) {
        _mm256_storeu_si256((__m256i*)p, narrow(p, v));
    }
    // Past the caches, p at a multiple of the vector; other cores see it after fence().
    static NN_INLINE void stream(float* p, F v) { _mm512_stream_ps(p, v); }
    template <class T>
    static NN_INLINE void stream(T* p, F v) {
        _mm256_stream_si256((__m256i*)p, narrow(p, v));
    }
    static NN_INLINE void fence() { _mm_sfence(); }

private:
    static NN_INLINE __m256i narrow(const Half*, F v) {
        return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    }
    static NN_INLINE __m256i narrow(const BFloat16*, F v) {
        const U b = bits(v), odd = _mm512_and_epi32(_mm512_srli_epi32(b, 16), _mm512_set1_epi32(1));
        const U rounded = _mm512_srli_epi32(_mm512_add_epi32(b, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF))), 16);
        const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
        return _mm512_cvtepi32_epi16(_mm512_mask_blend_epi32(nan, rounded, _mm512_set1_epi32(0x7FC0)));
    }
    static NN_INLINE F pair_low(F a, F b) {
        return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
    }
    static NN_INLINE F pair_high(F a, F b) {
        return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
    }
};

}  // namespace noisynn
