// The operators of pipeline/noise/ops.py on the CPU, through torch's stable C++ interface: one build serves torch 2.11
// and later. Schemas, shapes for the compiler and gradients are in ops.py.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "cpu_mapped.h"
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

Tensor gaussian_noise(Tensor x, Tensor strength, Tensor sample_ids, Tensor epoch, int64_t seed, int64_t stream,
                      int64_t first_token) {
    const double std = number(strength);
    const Draws draws(sample_ids, epoch, seed, stream, x.size(0));
    const Format format = format_of(x);
    const int64_t bytes = x.element_size(), spared = spared_of(x, first_token);
    return mapped(x, first_token, 1, false, [&](const Task& task) {
        const int64_t start = std == 0 ? task.end : std::clamp(spared, task.begin, task.end);
        task.copy_until(start, bytes);
        kernels().gaussian_noise(format, task.x, task.y, start, task.end, draws.of(task.first), std,
                                 task.streams);
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
    const Format format = format_of(x);
    const int64_t bytes = x.element_size(), spared = spared_of(x, first_token);
    const int64_t part_size = x.size(0) ? x.numel() / x.size(0) / parts : 0;
    return mapped(x, first_token, 1, false, [&](const Task& task) {
        const int64_t start = thresholds.either == 0 ? task.end : std::clamp(spared, task.begin, task.end);
        task.copy_until(start, bytes);
        for (int64_t at = start; at < task.end;) {
            const int64_t part = at / part_size, stop = std::min(task.end, (part + 1) * part_size);
            const int64_t entry = task.first * parts + part;
            kernels().salt_and_pepper(format, task.x, task.y, at, stop, draws.of(task.first), thresholds, lows[entry],
                                      highs[entry], task.streams);
            at = stop;
        }
    });
}

Tensor linear_mix(Tensor x, Tensor strength, bool optimal, int64_t group_size, int64_t first_token, bool transposed,
                  bool) {
    const double alpha = number(strength);
    STD_TORCH_CHECK(group_size >= 1, "group_size: at least 1");
    const Format format = format_of(x);
    const int64_t bytes = x.element_size(), spared = spared_of(x, first_token);
    return mapped(x, first_token, group_size, true, [&](const Task& task) {
        const bool mixes = task.samples > 1 && alpha != 0;
        const int64_t start = mixes ? std::clamp(spared, task.begin, task.end) : task.end;
        task.copy_until(start, bytes);
        const Mix mix = {task.samples, task.x_stride, task.y_stride, optimal, transposed, alpha, task.streams};
        if (mixes) kernels().linear_mix(format, task.x, task.y, start, task.end, mix);
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
