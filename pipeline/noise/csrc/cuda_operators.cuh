// What the operators on a GPU share: reading arguments.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "lane_gpu.h"
#include "thread_bodies.h"

namespace noisynn {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline bool is_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

template <class T>
struct Type {
    using type = T;
};

// run(Type<T>{}) with x's format.
template <class Run>
void with_format(const Tensor& x, const Run& run) {
    switch (x.scalar_type()) {
        case ScalarType::Float: return run(Type<float>{});
        case ScalarType::BFloat16: return run(Type<BFloat16>{});
        case ScalarType::Half: return run(Type<Half>{});
        default: STD_TORCH_CHECK(false, "on a GPU noise takes float32, bfloat16 and float16");
    }
}

// torch's queue of work on x's device.
inline cudaStream_t queue_of(const Tensor& x) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
    return static_cast<cudaStream_t>(stream);
}

inline DrawSource source_of(const Tensor& sample_ids, const Tensor& epoch, int64_t seed, int64_t stream, int64_t samples) {
    STD_TORCH_CHECK(sample_ids.scalar_type() == ScalarType::Long && sample_ids.numel() == samples &&
                        sample_ids.is_contiguous(),
                    "sample_ids: int64, one for each sample");
    STD_TORCH_CHECK(epoch.scalar_type() == ScalarType::Long && epoch.numel() == 1, "epoch: int64, one number");
    DrawSource source = {static_cast<const int64_t*>(sample_ids.const_data_ptr()),
                         static_cast<const int64_t*>(epoch.const_data_ptr()), uint32_t(stream)};
    RoundKeys::first_keys(uint32_t(seed), source.first_keys);
    return source;
}

}  // namespace noisynn
