/* Reduction by area, exactly as resize.py specifies it in integers: the same bytes on every machine.
 *
 * A picture is reduced in height first, row by row, then in width, pixel by pixel. Two taps are weighed by one
 * instruction (pmaddwd), for which all values and weights fit in 16 bits with a sign. */
#include <stdint.h>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define HAS_VECTORS 1
#endif

#define WEIGHT_BITS 14 /* of a weight, which add up to 2^14 for each pixel */
#define ROW_BITS 7     /* below the point, of the rows between the two passes */
#define ROW_SHIFT (WEIGHT_BITS - ROW_BITS)
#define PIXEL_SHIFT (WEIGHT_BITS + ROW_BITS)

struct axis {
    const int32_t *first;   /* (new): where each new row or column begins in the old ones */
    const int16_t *weights; /* (new, taps); 0 where fewer taps are needed */
    int64_t taps;           /* an even number */
    int64_t count;          /* new rows or columns */
};

static void weigh_rows(const uint8_t *rows, int64_t stride, const int16_t *weight, int64_t taps, int64_t from,
                       int64_t values, int16_t *out) {
    for (int64_t x = from; x < values; ++x) {
        int32_t sum = 1 << (ROW_SHIFT - 1);
        for (int64_t t = 0; t < taps; ++t) sum += weight[t] * rows[t * stride + x];
        out[x] = (int16_t)(sum >> ROW_SHIFT);
    }
}

static void weigh_columns(const int16_t *row, const struct axis *columns, int64_t from, uint8_t *out) {
    for (int64_t x = from; x < columns->count; ++x) {
        const int16_t *pixel = row + 3 * columns->first[x], *weight = columns->weights + x * columns->taps;
        int32_t sum[3] = {1 << (PIXEL_SHIFT - 1), 1 << (PIXEL_SHIFT - 1), 1 << (PIXEL_SHIFT - 1)};
        for (int64_t t = 0; t < columns->taps; ++t, pixel += 3)
            for (int c = 0; c < 3; ++c) sum[c] += weight[t] * pixel[c];
        for (int c = 0; c < 3; ++c) out[3 * x + c] = (uint8_t)(sum[c] >> PIXEL_SHIFT);
    }
}

#ifdef HAS_VECTORS
__attribute__((target("avx2"))) static int64_t weigh_rows_avx2(const uint8_t *rows, int64_t stride,
                                                               const int16_t *weight, int64_t taps, int64_t values,
                                                               int16_t *out) {
    const __m256i half = _mm256_set1_epi32(1 << (ROW_SHIFT - 1));
    int64_t x = 0;
    for (; x + 16 <= values; x += 16) {
        __m256i low = half, high = half;
        for (int64_t t = 0; t < taps; t += 2) {
            const uint8_t *one = rows + t * stride + x, *other = t + 1 < taps ? one + stride : one;
            const __m256i pair = _mm256_set1_epi32((uint16_t)weight[t] | (t + 1 < taps ? weight[t + 1] << 16 : 0));
            const __m256i a = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)one));
            const __m256i b = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)other));
            low = _mm256_add_epi32(low, _mm256_madd_epi16(_mm256_unpacklo_epi16(a, b), pair));
            high = _mm256_add_epi32(high, _mm256_madd_epi16(_mm256_unpackhi_epi16(a, b), pair));
        }
        low = _mm256_srai_epi32(low, ROW_SHIFT);
        high = _mm256_srai_epi32(high, ROW_SHIFT);
        _mm256_storeu_si256((__m256i *)(out + x), _mm256_packs_epi32(low, high));
    }
    return x;
}

/* Two pixels at a time, one in each half of a vector. Each store writes 4 bytes, the last of them of the next pixel: the
 * last pixels are left to the plain loop. */
__attribute__((target("avx2"))) static int64_t weigh_columns_avx2(const int16_t *row, const struct axis *columns,
                                                                  uint8_t *out) {
    /* r0 g0 b0 r1 g1 b1 .. -> r0 r1, g0 g1, b0 b1, nothing */
    const __m256i pairs = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, 1, 6, 7, 2, 3, 8, 9, 4, 5, 10, 11, -1, -1, -1, -1));
    const __m256i bytes = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1));
    const int64_t taps = columns->taps;
    int64_t x = 0;
    for (; x + 3 <= columns->count; x += 2) {
        const int16_t *one = row + 3 * columns->first[x], *other = row + 3 * columns->first[x + 1];
        const int16_t *weight = columns->weights + x * taps;
        __m256i sum = _mm256_set1_epi32(1 << (PIXEL_SHIFT - 1));
        for (int64_t t = 0; t < taps; t += 2, one += 6, other += 6) {
            const __m256i values = _mm256_inserti128_si256(
                _mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)one)),
                _mm_loadu_si128((const __m128i *)other), 1);
            const __m256i both = _mm256_inserti128_si256(
                _mm256_castsi128_si256(_mm_shuffle_epi32(_mm_loadu_si32(weight + t), 0)),
                _mm_shuffle_epi32(_mm_loadu_si32(weight + taps + t), 0), 1);
            sum = _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_shuffle_epi8(values, pairs), both));
        }
        sum = _mm256_shuffle_epi8(_mm256_srai_epi32(sum, PIXEL_SHIFT), bytes);
        _mm_storeu_si32(out + 3 * x, _mm256_castsi256_si128(sum));
        _mm_storeu_si32(out + 3 * x + 3, _mm256_extracti128_si256(sum, 1));
    }
    return x;
}
#endif

/* pixels: (height, width, 3), rows `stride` bytes apart. between: 3 * (width + column taps) + 8 zeros, the caller's.
 * out: (rows->count, columns->count, 3). */
void nn_area_resize(const uint8_t *pixels, int64_t stride, int64_t width, const struct axis *rows,
                    const struct axis *columns, int16_t *between, uint8_t *out) {
#ifdef HAS_VECTORS
    const int vectors = __builtin_cpu_supports("avx2");
#endif
    for (int64_t y = 0; y < rows->count; ++y, out += 3 * columns->count) {
        const uint8_t *first = pixels + rows->first[y] * stride;
        const int16_t *weight = rows->weights + y * rows->taps;
        int64_t taps = rows->taps, done_values = 0, done_pixels = 0;
        while (taps > 1 && weight[taps - 1] == 0) --taps; /* those may lie below the picture */
#ifdef HAS_VECTORS
        if (vectors) done_values = weigh_rows_avx2(first, stride, weight, taps, 3 * width, between);
#endif
        weigh_rows(first, stride, weight, taps, done_values, 3 * width, between);
#ifdef HAS_VECTORS
        if (vectors) done_pixels = weigh_columns_avx2(between, columns, out);
#endif
        weigh_columns(between, columns, done_pixels, out);
    }
}
