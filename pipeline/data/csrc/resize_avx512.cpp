// The resize's passes in AVX-512 with VNNI and VBMI. A weight of 22 bits and sign is written in three digits of base
// 256, -128 to 127 each, so that vpdpbusd takes four taps at once and stays exact; sums wrap modulo 2^32, and the true
// one fits. A training crop of ImageNet's to 224 takes 70 us; AVX2 takes 115, one lane 600 (one core of Zen 4).
#include <immintrin.h>

#include <algorithm>

#include "resize.h"

namespace noisynn {
namespace {

struct Digits {
    int32_t of[3];  // each holds that digit of four taps
};

Digits digits_of(const int32_t* weights) {
    Digits digits{};
    for (int tap = 0; tap < 4; ++tap) {
        int32_t rest = weights[tap];
        for (int digit = 0; digit < 3; ++digit) {
            const auto value = int8_t(rest);
            digits.of[digit] |= int32_t(uint32_t(uint8_t(value)) << (8 * tap));
            rest = (rest - value) >> 8;
        }
    }
    return digits;
}

// Sums of four-byte products, from the highest digit down, rounded: still to be shifted by kWeightBits.
__m512i joined(const __m512i (&sums)[3]) {
    const __m512i upper = _mm512_add_epi32(_mm512_slli_epi32(sums[2], 8), sums[1]);
    return _mm512_add_epi32(_mm512_slli_epi32(upper, 8), sums[0]);
}

__m512i half() { return _mm512_set1_epi32(1 << (kWeightBits - 1)); }

// Four outputs and four taps. `place` picks, of the 16 pixels from `base` on, each output's four by channel.
struct Packed {
    __m512i place, digits[3];
};

// Where the pixels of four outputs lie: their first one, and from there, in bytes, the first of each.
struct Group {
    int32_t base, is_near, offset[4];
};

Group group_at(const Axis& axis, int x) {
    const int last = std::min(x + 4, axis.count) - 1;
    const auto [low, high] = std::minmax(axis.start[x], axis.start[last]);
    Group group{low, high + 4 - low <= 16, {}};
    for (int output = 0; output < 4; ++output)
        group.offset[output] = 4 * (axis.start[std::min(x + output, last)] - low);
    return group;
}

// axis.packed: the groups, and behind them a Packed for each four taps of each.
size_t bytes_of_groups(int groups) { return (size_t(groups) * sizeof(Group) + 63) / 64 * 64; }

void pack(Axis& axis) {
    const int steps = axis.taps / 4, groups = (axis.count + 3) / 4;
    uint8_t* room = axis.packed.take(bytes_of_groups(groups) + size_t(groups) * steps * sizeof(Packed));
    auto* group = reinterpret_cast<Group*>(room);
    auto* packed = reinterpret_cast<Packed*>(room + bytes_of_groups(groups));
    for (int x = 0; x < axis.count; x += 4, ++group) {
        *group = group_at(axis, x);
        alignas(64) uint8_t place[64];
        for (int output = 0; output < 4; ++output)
            for (int channel = 0; channel < 4; ++channel)
                for (int tap = 0; tap < 4; ++tap)
                    place[16 * output + 4 * channel + tap] = uint8_t(group->offset[output] + 4 * tap + channel);
        for (int step = 0; step < steps; ++step, ++packed) {
            Digits digits[4];
            for (int output = 0; output < 4; ++output)
                digits[output] =
                    digits_of(&axis.weights[size_t(std::min(x + output, axis.count - 1)) * axis.taps + 4 * step]);
            packed->place = _mm512_load_si512(place);
            const __m512i spread = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
            for (int digit = 0; digit < 3; ++digit) {
                const __m128i four = _mm_setr_epi32(digits[0].of[digit], digits[1].of[digit], digits[2].of[digit],
                                                    digits[3].of[digit]);
                packed->digits[digit] = _mm512_permutexvar_epi32(spread, _mm512_castsi128_si512(four));
            }
        }
    }
}

// Four outputs' four pixels each. Near: all lie within 64 bytes, and one load and one shuffle do.
template <bool Near>
__m512i pixels_of(const uint8_t* in, const int32_t (&offset)[4], const Packed& packed) {
    if constexpr (Near) {
        return _mm512_permutexvar_epi8(packed.place, _mm512_loadu_si512(in));
    } else {
        const auto load = [&](int output) {
            return _mm_loadu_si128(reinterpret_cast<const __m128i*>(in + offset[output]));
        };
        const __m512i four = _mm512_inserti64x4(
            _mm512_castsi256_si512(_mm256_set_m128i(load(1), load(0))), _mm256_set_m128i(load(3), load(2)), 1);
        const __m128i by_channel = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
        return _mm512_shuffle_epi8(four, _mm512_broadcast_i32x4(by_channel));
    }
}

// Four outputs of `Rows` rows: the weights are fetched once for all. Digit by digit from the highest down, so that one
// sum a row is enough.
template <bool Near, int Rows>
inline void four_outputs(const uint8_t* in, size_t in_stride, const int32_t (&offset)[4], const Packed* packed,
                         int steps, uint8_t* out, size_t out_stride) {
    __m512i sums[Rows];
    if (steps == 1) {
        __m512i pixels[Rows];
        for (int row = 0; row < Rows; ++row) pixels[row] = pixels_of<Near>(in + row * in_stride, offset, *packed);
        for (int row = 0; row < Rows; ++row) {
            sums[row] = _mm512_dpbusd_epi32(_mm512_setzero_si512(), pixels[row], packed->digits[2]);
            sums[row] = _mm512_dpbusd_epi32(_mm512_slli_epi32(sums[row], 8), pixels[row], packed->digits[1]);
            sums[row] = _mm512_dpbusd_epi32(
                _mm512_add_epi32(_mm512_slli_epi32(sums[row], 8), half()), pixels[row], packed->digits[0]);
        }
    } else {
        for (int row = 0; row < Rows; ++row) {
            __m512i by_digit[3] = {half(), _mm512_setzero_si512(), _mm512_setzero_si512()};
            for (int step = 0; step < steps; ++step) {
                const __m512i pixels = pixels_of<Near>(in + row * in_stride + 16 * step, offset, packed[step]);
                for (int digit = 0; digit < 3; ++digit)
                    by_digit[digit] = _mm512_dpbusd_epi32(by_digit[digit], pixels, packed[step].digits[digit]);
            }
            sums[row] = joined(by_digit);
        }
    }
    const __m128i drop_x = _mm_setr_epi8(0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, -1, -1, -1, -1);
    for (int row = 0; row < Rows; ++row) {
        const __m512i values = _mm512_srai_epi32(sums[row], kWeightBits);
        const __m128i bytes = _mm512_cvtusepi32_epi8(_mm512_max_epi32(values, _mm512_setzero_si512()));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out + row * out_stride), _mm_shuffle_epi8(bytes, drop_x));
    }
}

template <int Rows>
void rows_of_outputs(const uint8_t* in, size_t in_stride, const Axis& axis, uint8_t* out, size_t out_stride) {
    const int steps = axis.taps / 4, groups = (axis.count + 3) / 4;
    auto* group = reinterpret_cast<const Group*>(axis.packed.data());
    auto* packed = reinterpret_cast<const Packed*>(axis.packed.data() + bytes_of_groups(groups));
    for (int i = 0; i < groups; ++i, ++group, packed += steps, out += 12) {
        const uint8_t* from = in + 4 * size_t(group->base);
        if (group->is_near)
            four_outputs<true, Rows>(from, in_stride, group->offset, packed, steps, out, out_stride);
        else
            four_outputs<false, Rows>(from, in_stride, group->offset, packed, steps, out, out_stride);
    }
}

void horizontal(const uint8_t* in, size_t in_stride, int rows, const Axis& axis, uint8_t* out, size_t out_stride) {
    constexpr int kRows = 4;
    for (; rows >= kRows; rows -= kRows, in += kRows * in_stride, out += kRows * out_stride)
        rows_of_outputs<kRows>(in, in_stride, axis, out, out_stride);
    for (; rows > 0; --rows, in += in_stride, out += out_stride)
        rows_of_outputs<1>(in, in_stride, axis, out, out_stride);
}

__m512i column(const uint8_t* in, size_t in_stride, const Digits* digits, int taps) {
    const __m512i zero = _mm512_setzero_si512();
    __m512i sums[4][3];
    for (auto& quarter : sums) quarter[0] = half(), quarter[1] = quarter[2] = zero;
    for (int tap = 0; tap < taps; tap += 4, ++digits) {
        __m512i rows[4];
        for (auto& row : rows) row = _mm512_loadu_si512(in), in += in_stride;
        const __m512i a = _mm512_unpacklo_epi8(rows[0], rows[1]), b = _mm512_unpackhi_epi8(rows[0], rows[1]);
        const __m512i c = _mm512_unpacklo_epi8(rows[2], rows[3]), d = _mm512_unpackhi_epi8(rows[2], rows[3]);
        const __m512i quarters[4] = {_mm512_unpacklo_epi16(a, c), _mm512_unpackhi_epi16(a, c),
                                     _mm512_unpacklo_epi16(b, d), _mm512_unpackhi_epi16(b, d)};
        for (int digit = 0; digit < 3; ++digit) {
            const __m512i weights = _mm512_set1_epi32(digits->of[digit]);
            for (int i = 0; i < 4; ++i) sums[i][digit] = _mm512_dpbusd_epi32(sums[i][digit], quarters[i], weights);
        }
    }
    __m512i values[4];
    for (int i = 0; i < 4; ++i) values[i] = _mm512_srai_epi32(joined(sums[i]), kWeightBits);
    // Packing undoes the order that unpacking made.
    return _mm512_packus_epi16(_mm512_packs_epi32(values[0], values[1]), _mm512_packs_epi32(values[2], values[3]));
}

void vertical(const uint8_t* in, size_t in_stride, const Axis& axis, uint8_t* out, int columns) {
    constexpr int kSteps = 64;  // up to here the digits of a row stand on the stack
    Digits few[kSteps];
    std::vector<Digits> many(axis.taps / 4 > kSteps ? axis.taps / 4 : 0);
    Digits* const digits = many.empty() ? few : many.data();
    for (int y = 0; y < axis.count; ++y, out += columns) {
        const uint8_t* rows = in + axis.start[y] * in_stride;
        const int32_t* weights = &axis.weights[size_t(y) * axis.taps];
        for (int step = 0; step < axis.taps / 4; ++step) digits[step] = digits_of(weights + 4 * step);
        for (int x = 0; x < columns; x += 64) {
            const int left = std::min(columns - x, 64);
            const __mmask64 kept = ~uint64_t(0) >> (64 - left);
            _mm512_mask_storeu_epi8(out + x, kept, column(rows + x, in_stride, digits, axis.taps));
        }
    }
}

}  // namespace

const ResizeKernels resize_avx512 = {"AVX-512", pack, horizontal, vertical};

}  // namespace noisynn
