// What the operators on the CPU share: which kernels run here, and reading arguments.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "cpu_kernels.h"

namespace noisynn {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The widest that this processor has.
const Kernels& kernels();

// A result of so many bytes does not stay in a processor's caches for whoever takes it next, so it goes past them.
constexpr int64_t kStreamed = 1 << 25;

inline Format format_of(const Tensor& x) {
    switch (x.scalar_type()) {
        case ScalarType::Float: return Format::float32;
        case ScalarType::BFloat16: return Format::bfloat16;
        case ScalarType::Half: return Format::float16;
        case ScalarType::Double: return Format::float64;
        default: STD_TORCH_CHECK(false, "noise takes float32, bfloat16, float16 and float64");
    }
}

inline double number(const Tensor& scalar) {
    STD_TORCH_CHECK(scalar.numel() == 1 && scalar.scalar_type() == ScalarType::Double, "strength: float64, one number");
    return *static_cast<const double*>(scalar.const_data_ptr());
}

// Where element 0 would be, if element `begin` is at p: kernels count from there. Only what there is, is touched.
template <class T>
inline T* origin(T* p, int64_t begin, int64_t bytes) {
    return reinterpret_cast<T*>(reinterpret_cast<uintptr_t>(p) - uintptr_t(begin) * uintptr_t(bytes));
}

class Draws {
public:
    Draws(const Tensor& sample_ids, const Tensor& epoch, int64_t seed, int64_t stream, int64_t samples)
        : ids_(torch::stable::contiguous(sample_ids)) {
        STD_TORCH_CHECK(sample_ids.scalar_type() == ScalarType::Long && sample_ids.numel() == samples,
                        "sample_ids: int64, one for each sample");
        STD_TORCH_CHECK(epoch.scalar_type() == ScalarType::Long && epoch.numel() == 1, "epoch: int64, one number");
        const int64_t number = *static_cast<const int64_t*>(epoch.const_data_ptr());
        common_ = {uint32_t(seed), uint32_t(number), uint32_t(stream), 0};
    }
    Draw of(int64_t sample) const {
        Draw draw = common_;
        draw.sample_id = uint64_t(static_cast<const int64_t*>(ids_.const_data_ptr())[sample]);
        return draw;
    }

private:
    Tensor ids_;
    Draw common_;
};

}  // namespace noisynn
