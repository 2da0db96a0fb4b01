// The operators of pipeline/noise/ops.py on the CPU, through torch's stable C++ interface: one build serves torch 2.11
// and later. Schemas, shapes for the compiler and gradients are in ops.py.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "cpu_operators.h"

namespace noisynn {
namespace {

bool runs_here(const Kernels& table) {
#if defined(__x86_64__)
    if (&table == &kernels_avx512) return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq");
    if (&table == &kernels_avx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
    return true;
}

// The widest that this processor has. NOISYNN_LANES names another one, for tests: all give the same bits.
const Kernels& chosen_kernels() {
    const char* wanted = std::getenv("NOISYNN_LANES");
    for (const Kernels* table : {
#if defined(__x86_64__)
             &kernels_avx512, &kernels_avx2,
#endif
             &kernels_scalar}) {
        if (wanted ? std::strcmp(wanted, table->name) == 0 : runs_here(*table)) {
            STD_TORCH_CHECK(runs_here(*table), "NOISYNN_LANES: this processor has no ", table->name);
            return *table;
        }
    }
    STD_TORCH_CHECK(false, "NOISYNN_LANES is ", wanted, ": give AVX-512, AVX2 or `one lane`");
}

}  // namespace

const Kernels& kernels() {
    static const Kernels& chosen = chosen_kernels();
    return chosen;
}

namespace {

constexpr int64_t kChunk = 1 << 14;  // elements of one task: some 10 us of work, and a whole number of vectors

// x as (samples, elements of a sample), of which the first `spared` stay as they are.
struct Layout {
    Format format;
    int64_t samples, size, spared, bytes;

    Layout(const Tensor& x, int64_t first_token) : format(format_of(x)), bytes(x.element_size()) {
        STD_TORCH_CHECK(x.dim() >= 1, "noise takes (samples, ...)");
        samples = x.size(0);
        size = 1;
        for (int64_t axis = 1; axis < x.dim(); ++axis) size *= x.size(axis);
        STD_TORCH_CHECK(first_token == 0 || x.dim() >= 2, "first_token needs an axis of tokens");
        STD_TORCH_CHECK(size >> 34 == 0, "a sample has 2^34 elements at most: blocks of four are counted in 32 bits");
        const int64_t tokens = x.dim() >= 2 ? x.size(1) : 1;
        spared = tokens ? size / tokens * std::min(first_token, tokens) : 0;
    }
    const char* at(const void* x, int64_t sample) const { return static_cast<const char*>(x) + sample * size * bytes; }
    char* at(void* y, int64_t sample) const { return static_cast<char*>(y) + sample * size * bytes; }
    void copy(const char* x, char* y, int64_t begin, int64_t end) const {
        if (end > begin) std::memcpy(y + begin * bytes, x + begin * bytes, (end - begin) * bytes);
    }
};

// Whether memory goes through the elements in the logical order, in which noise is drawn.
bool is_ordered(const Tensor& x) { return x.is_contiguous(); }

// work(sample, begin, end) for all of every sample, in parallel; then the result in x's own layout.
template <class Work>
Tensor mapped(const Tensor& x, int64_t first_token, const Work& work) {
    const Tensor ordered = is_ordered(x) ? x : torch::stable::contiguous(x);
    Tensor y = torch::stable::empty_like(ordered);
    const Layout layout(ordered, first_token);
    const int64_t chunks = (layout.size + kChunk - 1) / kChunk;
    work(layout, ordered.const_data_ptr(), y.mutable_data_ptr(), chunks);
    if (is_ordered(x)) return y;
    Tensor like = torch::stable::empty_like(x);
    return torch::stable::copy_(like, y);
}

template <class Each>
void for_chunks(const Layout& layout, int64_t rows, int64_t chunks, const Each& each) {
    torch::stable::parallel_for(0, rows * chunks, 1, [&](int64_t from, int64_t to) {
        for (int64_t task = from; task < to; ++task) {
            const int64_t begin = task % chunks * kChunk;
            each(task / chunks, begin, std::min(layout.size, begin + kChunk));
        }
    });
}

Tensor gaussian_noise(Tensor x, Tensor strength, Tensor sample_ids, Tensor epoch, int64_t seed, int64_t stream,
                      int64_t first_token) {
    const double std = number(strength);
    const Draws draws(sample_ids, epoch, seed, stream, x.size(0));
    return mapped(x, first_token, [&](const Layout& layout, const void* from, void* to, int64_t chunks) {
        for_chunks(layout, layout.samples, chunks, [&](int64_t sample, int64_t begin, int64_t end) {
            const int64_t start = std == 0 ? end : std::clamp(layout.spared, begin, end);
            layout.copy(layout.at(from, sample), layout.at(to, sample), begin, start);
            kernels().gaussian_noise(layout.format, layout.at(from, sample), layout.at(to, sample), start, end,
                                     draws.of(sample), std);
        });
    });
}

Tensor salt_and_pepper(Tensor x, Tensor low, Tensor high, Tensor strength, Tensor sample_ids, Tensor epoch,
                       int64_t seed, int64_t stream, int64_t first_token) {
    const Thresholds thresholds = thresholds_of(number(strength));
    const Draws draws(sample_ids, epoch, seed, stream, x.size(0));
    for (const Tensor& extreme : {low, high})
        STD_TORCH_CHECK(extreme.scalar_type() == ScalarType::Double && extreme.dim() == 2 && extreme.is_contiguous() &&
                            extreme.size(0) == x.size(0) && extreme.size(1) == low.size(1) && extreme.size(1) >= 1,
                        "low and high: float64 (samples, parts)");
    const int64_t parts = low.size(1);
    const double *lows = static_cast<const double*>(low.const_data_ptr()),
                 *highs = static_cast<const double*>(high.const_data_ptr());
    return mapped(x, first_token, [&](const Layout& layout, const void* from, void* to, int64_t chunks) {
        for_chunks(layout, layout.samples, chunks, [&](int64_t sample, int64_t begin, int64_t end) {
            const int64_t start = thresholds.either == 0 ? end : std::clamp(layout.spared, begin, end);
            layout.copy(layout.at(from, sample), layout.at(to, sample), begin, start);
            const int64_t part_size = layout.size / parts;
            for (int64_t at = start; at < end;) {
                const int64_t part = at / part_size, stop = std::min(end, (part + 1) * part_size);
                kernels().salt_and_pepper(layout.format, layout.at(from, sample), layout.at(to, sample), at, stop,
                                          draws.of(sample), thresholds, lows[sample * parts + part],
                                          highs[sample * parts + part]);
                at = stop;
            }
        });
    });
}

Tensor linear_mix(Tensor x, Tensor strength, bool optimal, int64_t group_size, int64_t first_token, bool transposed,
                  bool) {
    const double alpha = number(strength);
    STD_TORCH_CHECK(group_size >= 1, "group_size: at least 1");
    return mapped(x, first_token, [&](const Layout& layout, const void* from, void* to, int64_t chunks) {
        const int64_t groups = (layout.samples + group_size - 1) / group_size;
        for_chunks(layout, groups, chunks, [&](int64_t group, int64_t begin, int64_t end) {
            const int64_t first = group * group_size, k = std::min(group_size, layout.samples - first);
            const int64_t start = k == 1 || alpha == 0 ? end : std::clamp(layout.spared, begin, end);
            for (int64_t i = first; i < first + k; ++i) layout.copy(layout.at(from, i), layout.at(to, i), begin, start);
            const Mix mix = {k, layout.size, optimal, transposed, alpha};
            kernels().linear_mix(layout.format, layout.at(from, first), layout.at(to, first), start, end, mix);
        });
    });
}

Tensor random_words(Tensor sample_ids, Tensor epoch, int64_t count, int64_t seed, int64_t stream) {
    const int64_t samples = sample_ids.numel();
    const Draws draws(sample_ids, epoch, seed, stream, samples);
    Tensor words = torch::stable::new_empty(sample_ids, {samples, count});
    int64_t* out = static_cast<int64_t*>(words.mutable_data_ptr());
    torch::stable::parallel_for(0, samples, 1 + kChunk / (count + 1), [&](int64_t from, int64_t to) {
        for (int64_t i = from; i < to; ++i) kernels().random_words(out + i * count, 0, count, draws.of(i));
    });
    return words;
}

}  // namespace
}  // namespace noisynn

STABLE_TORCH_LIBRARY_IMPL(noisynn, CPU, m) {
    m.impl("gaussian_noise", TORCH_BOX(&noisynn::gaussian_noise));
    m.impl("salt_and_pepper", TORCH_BOX(&noisynn::salt_and_pepper));
    m.impl("linear_mix", TORCH_BOX(&noisynn::linear_mix));
    m.impl("random_words", TORCH_BOX(&noisynn::random_words));
}
