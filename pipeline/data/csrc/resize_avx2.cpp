// The resize's passes in AVX2. A weight of 22 bits and sign is high * 2^15 + low, each an int16, so that vpmaddwd takes
// two taps at once and stays exact; sums wrap modulo 2^32, and the true one fits.
#include <immintrin.h>

#include <cstring>

#include "resize.h"

namespace noisynn {
namespace {

constexpr int kLowBits = 15;

int32_t pair_of(int32_t one, int32_t other) { return (one & 0xFFFF) | int32_t(uint32_t(other) << 16); }
int32_t low_of(int32_t weight) { return weight & ((1 << kLowBits) - 1); }
int32_t high_of(int32_t weight) { return weight >> kLowBits; }

__m256i whole(__m256i low, __m256i high) {
    const __m256i sum = _mm256_add_epi32(low, _mm256_slli_epi32(high, kLowBits));
    return _mm256_srai_epi32(_mm256_add_epi32(sum, _mm256_set1_epi32(1 << (kWeightBits - 1))), kWeightBits);
}

// Two outputs and four taps: low and high of taps 0 and 1, then of taps 2 and 3; each for four channels.
struct Packed {
    __m256i low[2], high[2];
};

__m256i for_two(int32_t first, int32_t second) {
    return _mm256_set_m128i(_mm_set1_epi32(second), _mm_set1_epi32(first));
}

void pack(Axis& axis) {
    const int steps = axis.taps / 4, pairs = (axis.count + 1) / 2;
    auto* packed = reinterpret_cast<Packed*>(axis.packed.take(size_t(pairs) * steps * sizeof(Packed)));
    for (int x = 0; x < axis.count; x += 2) {
        const int32_t* one = &axis.weights[size_t(x) * axis.taps];
        const int32_t* other = x + 1 < axis.count ? one + axis.taps : one;
        for (int step = 0; step < steps; ++step, one += 4, other += 4, ++packed) {
            for (int i = 0; i < 2; ++i) {
                packed->low[i] = for_two(pair_of(low_of(one[2 * i]), low_of(one[2 * i + 1])),
                                         pair_of(low_of(other[2 * i]), low_of(other[2 * i + 1])));
                packed->high[i] = for_two(pair_of(high_of(one[2 * i]), high_of(one[2 * i + 1])),
                                          pair_of(high_of(other[2 * i]), high_of(other[2 * i + 1])));
            }
        }
    }
}

void horizontal(const uint8_t* in, size_t in_stride, int rows, const Axis& axis, uint8_t* out, size_t out_stride) {
    // Four RGBX pixels -> one channel's two pixels side by side, as words.
    const __m256i front = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, -1, 4, -1, 1, -1, 5, -1, 2, -1, 6, -1, 3, -1, 7, -1));
    const __m256i back = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(8, -1, 12, -1, 9, -1, 13, -1, 10, -1, 14, -1, 11, -1, 15, -1));
    const int steps = axis.taps / 4;
    for (int row = 0; row < rows; ++row, in += in_stride, out += out_stride) {
        auto* packed = reinterpret_cast<const Packed*>(axis.packed.data());
        for (int x = 0; x < axis.count; x += 2) {
            const uint8_t* one = in + 4 * size_t(axis.start[x]);
            const uint8_t* other = x + 1 < axis.count ? in + 4 * size_t(axis.start[x + 1]) : one;
            __m256i low = _mm256_setzero_si256(), high = low;
            for (int step = 0; step < steps; ++step, one += 16, other += 16, ++packed) {
                const __m256i pixels = _mm256_loadu2_m128i(reinterpret_cast<const __m128i*>(other),
                                                           reinterpret_cast<const __m128i*>(one));
                const __m256i a = _mm256_shuffle_epi8(pixels, front), b = _mm256_shuffle_epi8(pixels, back);
                low = _mm256_add_epi32(low, _mm256_add_epi32(_mm256_madd_epi16(a, packed->low[0]),
                                                             _mm256_madd_epi16(b, packed->low[1])));
                high = _mm256_add_epi32(high, _mm256_add_epi32(_mm256_madd_epi16(a, packed->high[0]),
                                                               _mm256_madd_epi16(b, packed->high[1])));
            }
            const __m256i sum = whole(low, high);
            const __m256i words = _mm256_packs_epi32(sum, sum), bytes = _mm256_packus_epi16(words, words);
            const int32_t first = _mm256_extract_epi32(bytes, 0), second = _mm256_extract_epi32(bytes, 4);
            std::memcpy(out + 3 * x, &first, 4);
            std::memcpy(out + 3 * x + 3, &second, 4);
        }
    }
}

__m256i column(const uint8_t* in, size_t in_stride, const int32_t* weights, int taps) {
    const __m256i zero = _mm256_setzero_si256();
    __m256i low[4] = {zero, zero, zero, zero}, high[4] = {zero, zero, zero, zero};
    for (int tap = 0; tap < taps; tap += 2, in += 2 * in_stride) {
        const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in));
        const __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in + in_stride));
        const __m256i front = _mm256_unpacklo_epi8(a, b), back = _mm256_unpackhi_epi8(a, b);
        const __m256i words[4] = {_mm256_unpacklo_epi8(front, zero), _mm256_unpackhi_epi8(front, zero),
                                  _mm256_unpacklo_epi8(back, zero), _mm256_unpackhi_epi8(back, zero)};
        const __m256i l = _mm256_set1_epi32(pair_of(low_of(weights[tap]), low_of(weights[tap + 1])));
        const __m256i h = _mm256_set1_epi32(pair_of(high_of(weights[tap]), high_of(weights[tap + 1])));
        for (int i = 0; i < 4; ++i) {
            low[i] = _mm256_add_epi32(low[i], _mm256_madd_epi16(words[i], l));
            high[i] = _mm256_add_epi32(high[i], _mm256_madd_epi16(words[i], h));
        }
    }
    // Packing undoes the order that unpacking made.
    return _mm256_packus_epi16(_mm256_packs_epi32(whole(low[0], high[0]), whole(low[1], high[1])),
                               _mm256_packs_epi32(whole(low[2], high[2]), whole(low[3], high[3])));
}

void vertical(const uint8_t* in, size_t in_stride, const Axis& axis, uint8_t* out, int columns) {
    for (int y = 0; y < axis.count; ++y, out += columns) {
        const uint8_t* rows = in + axis.start[y] * in_stride;
        const int32_t* weights = &axis.weights[size_t(y) * axis.taps];
        for (int x = 0; x < columns; x += 32) {
            const __m256i bytes = column(rows + x, in_stride, weights, axis.taps);
            if (columns - x >= 32) {
                _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + x), bytes);
            } else {
                uint8_t last[32];
                _mm256_storeu_si256(reinterpret_cast<__m256i*>(last), bytes);
                std::memcpy(out + x, last, columns - x);
            }
        }
    }
}

}  // namespace

const ResizeKernels resize_avx2 = {"AVX2", pack, horizontal, vertical};

}  // namespace noisynn
