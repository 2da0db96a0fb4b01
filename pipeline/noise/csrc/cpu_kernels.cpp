// The kernels for one instruction set, which the build chooses: NN_LANES (Avx512, Avx2, OneLane) and NN_TABLE.
#include "cpu_kernels.h"

#include <algorithm>
#include <cmath>
#include <type_traits>

#if defined(__AVX512F__)
#include "lanes_avx512.h"
#elif defined(__AVX2__)
#include "lanes_avx2.h"
#else
#include "formats.h"
#endif

namespace noisynn {
namespace {

using Lanes = NN_LANES;

constexpr int kSteps = 2;  // vectors of blocks at once

// A call for each 64 elements would load all constants anew.
#define NN_ALWAYS_INLINE __attribute__((always_inline))

constexpr int64_t kMixChunk = 256;  // elements of each sample: the sums and a group's rows stay near for the second pass
constexpr double kTwoPi = 6.283185307179586;

template <class T>
struct Type {
    using type = T;
};

template <class Call>
void with_format(Format format, const Call& call) {
    switch (format) {
        case Format::float32: return call(Type<float>{});
        case Format::bfloat16: return call(Type<BFloat16>{});
        case Format::float16: return call(Type<Half>{});
        case Format::float64: return call(Type<double>{});
    }
}

template <bool streams, class L, class T>
NN_INLINE void put(T* p, typename L::F v) {
    if constexpr (streams)
        L::stream(p, v);
    else
        L::store(p, v);
}

// run(std::true_type) where vectors from `first` on may be streamed and are to be; then waits for them.
template <class T, class Run>
NN_INLINE void with_streams(bool wanted, const T* first, const Run& run) {
    if (wanted && reinterpret_cast<uintptr_t>(first) % (Lanes::width * sizeof(T)) == 0) {
        run(std::true_type{});
        Lanes::fence();
    } else {
        run(std::false_type{});
    }
}

// The first element from `begin` on that begins a block.
constexpr int64_t at_block(int64_t begin) { return (begin + 3) / 4 * 4; }

// Calls wide(block) for whole vectors of blocks and one(block, first word, last word) for what is left at either end.
template <class Wide, class One>
NN_INLINE void for_blocks(int64_t begin, int64_t end, const Wide& wide, const One& one) {
    constexpr int64_t step = 4 * kSteps * Lanes::width;
    int64_t at = begin;
    while (at < end) {
        if (at % 4 == 0)
            for (; end - at >= step; at += step) wide(at / 4);
        if (at >= end) return;
        const int64_t stop = std::min(end, at / 4 * 4 + 4);
        one(at / 4, at % 4, stop - at / 4 * 4);
        at = stop;
    }
}

// visit(lanes, place): vectors first, then one by one.
template <class Visit>
NN_INLINE void for_elements(int64_t begin, int64_t end, const Visit& visit) {
    int64_t at = begin;
    for (; end - at >= Lanes::width; at += Lanes::width) visit(Lanes{}, at);
    for (; at < end; ++at) visit(OneLane{}, at);
}

template <class L, int Steps>
NN_INLINE void block_normals(uint32_t block, const Draw& draw, const RoundKeys& keys, typename L::F (&n)[Steps][4]) {
    typename L::U words[Steps][4];
    draw_words<L>(block, draw, keys, words);
    for (int step = 0; step < Steps; ++step) {
        normals<L>(words[step][0], words[step][1], n[step][0], n[step][1]);
        normals<L>(words[step][2], words[step][3], n[step][2], n[step][3]);
        L::transpose(n[step]);
    }
}

template <bool streams, class T>
void gaussian_part(const T* x, T* y, int64_t begin, int64_t end, const Draw& draw, float std) {
    const RoundKeys keys(draw);
    for_blocks(
        begin, end,
        [&](int64_t block) NN_ALWAYS_INLINE {
            typename Lanes::F n[kSteps][4];
            block_normals<Lanes>(uint32_t(block), draw, keys, n);
            for (int j = 0; j < 4 * kSteps; ++j) {
                const int64_t at = 4 * block + j * Lanes::width;
                put<streams, Lanes>(y + at,
                                    Lanes::multiply_add(n[j / 4][j % 4], Lanes::set(std), Lanes::load(x + at)));
            }
        },
        [&](int64_t block, int64_t first, int64_t last) {
            float n[1][4];
            block_normals<OneLane>(uint32_t(block), draw, keys, n);
            for (int64_t j = first; j < last; ++j)
                store_one(y + 4 * block + j, fmaf(n[0][j], std, load_one(x + 4 * block + j)));
        });
}

template <class T>
void gaussian_row(const T* x, T* y, int64_t begin, int64_t end, const Draw& draw, float std, bool streams) {
    with_streams(streams, y + at_block(begin),
                 [&](auto yes) { gaussian_part<yes.value>(x, y, begin, end, draw, std); });
}

void gaussian_row(const double* x, double* y, int64_t begin, int64_t end, const Draw& draw, double std, bool) {
    const RoundKeys keys(draw);
    for (int64_t at = begin; at < end; ++at) {
        uint32_t words[1][4];
        draw_words<Scalar>(uint32_t(at / 4), draw, keys, words);
        const uint32_t* pair = words[0] + (at % 4 & 2);
        const double radius = std::sqrt(-2.0 * std::log(pair[0] * 0x1p-32 + 0x1p-33));
        const double angle = kTwoPi * (pair[1] * 0x1p-32 + 0x1p-33);
        y[at] = x[at] + std * radius * (at % 2 ? std::sin(angle) : std::cos(angle));
    }
}

template <bool streams, class T, class F>
void salt_and_pepper_part(const T* x, T* y, int64_t begin, int64_t end, const Draw& draw, Thresholds t, F low, F high) {
    const RoundKeys keys(draw);
    for_blocks(
        begin, end,
        [&](int64_t block) NN_ALWAYS_INLINE {
            if constexpr (!std::is_same_v<T, double>) {
                typename Lanes::U words[kSteps][4];
                draw_words<Lanes>(uint32_t(block), draw, keys, words);
                for (auto& step : words) Lanes::transpose(step);
                const auto salt = Lanes::set(high), pepper = Lanes::set(low);
                for (int j = 0; j < 4 * kSteps; ++j) {
                    const int64_t at = 4 * block + j * Lanes::width;
                    const auto kept = Lanes::select_below(words[j / 4][j % 4], t.either, pepper, Lanes::load(x + at));
                    put<streams, Lanes>(y + at, Lanes::select_below(words[j / 4][j % 4], t.salt, salt, kept));
                }
            } else {
                for (int64_t b = block; b < block + kSteps * Lanes::width; ++b) {
                    uint32_t words[1][4];
                    draw_words<Scalar>(uint32_t(b), draw, keys, words);
                    for (int j = 0; j < 4; ++j)
                        y[4 * b + j] = words[0][j] < t.salt ? high : words[0][j] < t.either ? low : x[4 * b + j];
                }
            }
        },
        [&](int64_t block, int64_t first, int64_t last) {
            uint32_t words[1][4];
            draw_words<Scalar>(uint32_t(block), draw, keys, words);
            for (int64_t j = first; j < last; ++j) {
                const int64_t at = 4 * block + j;
                const uint32_t word = words[0][j];
                if (word >= t.either)
                    y[at] = x[at];
                else if constexpr (std::is_same_v<T, double>)
                    y[at] = word < t.salt ? high : low;
                else
                    store_one(y + at, word < t.salt ? high : low);
            }
        });
}

template <class T, class F>
void salt_and_pepper_row(const T* x, T* y, int64_t begin, int64_t end, const Draw& draw, Thresholds t, F low, F high,
                         bool streams) {
    with_streams(streams && !std::is_same_v<T, double>, y + at_block(begin),
                 [&](auto yes) { salt_and_pepper_part<yes.value>(x, y, begin, end, draw, t, low, high); });
}

// (x_i + sum_j x_j) / (k + 1): symmetric, so it is its own transpose. The sum runs over the samples in their order.
template <bool streams, class T>
void optimal_q(const T* x, T* y, int64_t begin, int64_t end, const Mix& mix) {
    alignas(64) float sums[kMixChunk];
    const float scale = 1.0f / float(mix.samples + 1);
    for (int64_t i = 0; i < mix.samples; ++i) {
        const T* row = x + i * mix.x_stride + begin;
        for_elements(0, end - begin, [&](auto lanes, int64_t at) {
            using L = decltype(lanes);
            const auto value = L::load(row + at);
            L::store(sums + at, i == 0 ? value : L::add(L::load(sums + at), value));
        });
    }
    for (int64_t i = 0; i < mix.samples; ++i) {
        const T* row = x + i * mix.x_stride + begin;
        T* out = y + i * mix.y_stride + begin;
        for_elements(0, end - begin, [&](auto lanes, int64_t at) {
            using L = decltype(lanes);
            const auto sum = L::add(L::load(row + at), L::load(sums + at));
            put<streams, L>(out + at, L::multiply(sum, L::set(scale)));
        });
    }
}

// x_i + alpha (x_other - x_i), the other being the next sample of the ring; in the transpose the one before.
template <bool streams, class T>
void circular_shift(const T* x, T* y, int64_t begin, int64_t end, const Mix& mix) {
    for (int64_t i = 0; i < mix.samples; ++i) {
        const int64_t other = (i + (mix.transposed ? mix.samples - 1 : 1)) % mix.samples;
        const T *row = x + i * mix.x_stride, *other_row = x + other * mix.x_stride;
        T* out = y + i * mix.y_stride;
        for_elements(begin, end, [&](auto lanes, int64_t at) {
            using L = decltype(lanes);
            const auto own = L::load(row + at);
            const auto difference = L::subtract(L::load(other_row + at), own);
            put<streams, L>(out + at, L::multiply_add(L::set(float(mix.alpha)), difference, own));
        });
    }
}

template <bool>
void optimal_q(const double* x, double* y, int64_t begin, int64_t end, const Mix& mix) {
    for (int64_t at = begin; at < end; ++at) {
        double sum = 0;
        for (int64_t i = 0; i < mix.samples; ++i) sum += x[i * mix.x_stride + at];
        for (int64_t i = 0; i < mix.samples; ++i)
            y[i * mix.y_stride + at] = (x[i * mix.x_stride + at] + sum) / double(mix.samples + 1);
    }
}

template <bool>
void circular_shift(const double* x, double* y, int64_t begin, int64_t end, const Mix& mix) {
    for (int64_t i = 0; i < mix.samples; ++i) {
        const int64_t other = (i + (mix.transposed ? mix.samples - 1 : 1)) % mix.samples;
        for (int64_t at = begin; at < end; ++at) {
            const double own = x[i * mix.x_stride + at];
            y[i * mix.y_stride + at] = own + mix.alpha * (x[other * mix.x_stride + at] - own);
        }
    }
}

}  // namespace
}  // namespace noisynn

#include "norm_rows.h"

namespace noisynn {
namespace {

// The formats whose wide one is F.
template <class F, class Call>
void with_narrow(Format format, const Call& call) {
    if constexpr (std::is_same_v<F, double>) {
        call(Type<double>{});
    } else {
        if (format == Format::float32) call(Type<float>{});
        if (format == Format::bfloat16) call(Type<BFloat16>{});
        if (format == Format::float16) call(Type<Half>{});
    }
}

template <class F>
constexpr RowKernels<F> row_kernels() {
    return {
        [](Format format, const void* x, F* wide, int64_t count) {
            with_narrow<F>(format, [&](auto type) {
                to_wide(static_cast<const typename decltype(type)::type*>(x), wide, count);
            });
        },
        [](Format format, const F* wide, void* y, int64_t count, bool streams) {
            with_narrow<F>(format, [&](auto type) {
                from_wide(wide, static_cast<typename decltype(type)::type*>(y), count, streams);
            });
        },
        [](Format format, const void* x, F* wide, const NormRow<F>& row) {
            with_narrow<F>(format, [&](auto type) {
                norm_row(static_cast<const typename decltype(type)::type*>(x), wide, row);
            });
        },
        [](Format format, const void* x, F* gradient, F* room, void* dx, const NormRow<F>& row, F* dweight, F* dbias,
           bool streams) {
            with_narrow<F>(format, [&](auto type) {
                using T = typename decltype(type)::type;
                norm_row_back(static_cast<const T*>(x), gradient, room, static_cast<T*>(dx), row, dweight, dbias,
                              streams);
            });
        },
    };
}

}  // namespace

extern const Kernels NN_TABLE;
const Kernels NN_TABLE = {
    NN_NAME,
    [](Format format, const void* x, void* y, int64_t begin, int64_t end, const Draw& draw, double std, bool streams) {
        with_format(format, [&](auto type) {
            using T = typename decltype(type)::type;
            gaussian_row(static_cast<const T*>(x), static_cast<T*>(y), begin, end, draw, std, streams);
        });
    },
    [](Format format, const void* x, void* y, int64_t begin, int64_t end, const Draw& draw, Thresholds t, double low,
       double high, bool streams) {
        with_format(format, [&](auto type) {
            using T = typename decltype(type)::type;
            using F = std::conditional_t<std::is_same_v<T, double>, double, float>;
            salt_and_pepper_row(static_cast<const T*>(x), static_cast<T*>(y), begin, end, draw, t, F(low), F(high),
                                streams);
        });
    },
    [](Format format, const void* x, void* y, int64_t begin, int64_t end, const Mix& mix) {
        with_format(format, [&](auto type) {
            using T = typename decltype(type)::type;
            const T* from = static_cast<const T*>(x);
            T* to = static_cast<T*>(y);
            // From one row to the next, too: all of them must begin alike.
            const bool streams = mix.streams && mix.y_stride % Lanes::width == 0 && !std::is_same_v<T, double>;
            with_streams(streams, to + begin, [&](auto yes) {
                for (int64_t at = begin; at < end; at += kMixChunk) {
                    const int64_t stop = std::min(end, at + kMixChunk);
                    if (mix.optimal)
                        optimal_q<yes.value>(from, to, at, stop, mix);
                    else
                        circular_shift<yes.value>(from, to, at, stop, mix);
                }
            });
        });
    },
    [](int64_t* out, int64_t begin, int64_t end, const Draw& draw) {
        const RoundKeys keys(draw);
        for_blocks(
            begin, end,
            [&](int64_t block) NN_ALWAYS_INLINE {
                typename Lanes::U words[kSteps][4];
                draw_words<Lanes>(uint32_t(block), draw, keys, words);
                for (auto& step : words) Lanes::transpose(step);
                uint32_t flat[4 * kSteps * Lanes::width];
                static_assert(sizeof(flat) == sizeof(words));
                memcpy(flat, words, sizeof(words));
                for (int i = 0; i < 4 * kSteps * Lanes::width; ++i) out[4 * block + i] = flat[i];
            },
            [&](int64_t block, int64_t first, int64_t last) {
                uint32_t words[1][4];
                draw_words<Scalar>(uint32_t(block), draw, keys, words);
                for (int64_t j = first; j < last; ++j) out[4 * block + j] = words[0][j];
            });
    },
    row_kernels<float>(),
    row_kernels<double>(),
};

}  // namespace noisynn
