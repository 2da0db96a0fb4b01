// The operators of pipeline/noise/ops.py on a GPU, through torch's stable C++ interface. What a thread does stands in
// thread_bodies.h; here is how it is launched.
#include "cuda_operators.cuh"
#include "thread_bodies.h"

namespace noisynn {
namespace {

constexpr int kBlocksOnOne = 4;  // blocks at once on one multiprocessor: 64 registers a thread, so that none is spilled

__device__ __forceinline__ Place here() {
    return {blockIdx.x, blockIdx.y, threadIdx.x, gridDim.x, gridDim.y, blockDim.x};
}

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksOnOne)
    gaussian_kernel(const T* __restrict__ x, T* __restrict__ y, Common common, DrawSource source) {
    gaussian_thread<DeviceLane>(here(), x, y, common, source);
}

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksOnOne)
    salt_and_pepper_kernel(const T* __restrict__ x, T* __restrict__ y, Common common, DrawSource source,
                           Extremes extremes) {
    salt_and_pepper_thread<DeviceLane>(here(), x, y, common, source, extremes);
}

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksOnOne)
    circular_shift_kernel(const T* __restrict__ x, T* __restrict__ y, Common common, MixPlan plan) {
    circular_shift_thread(here(), x, y, common, plan);
}

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksOnOne)
    optimal_q_kernel(const T* __restrict__ x, T* __restrict__ y, Common common, MixPlan plan) {
    optimal_q_thread(here(), x, y, common, plan);
}

// launch(T{}, x, y, common, stream) on x's device, in its format; the result has x's own layout.
template <class Launch>
Tensor launched(const Tensor& x, const Tensor& strength, int64_t first_token, const Launch& launch) {
    const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
    STD_TORCH_CHECK(x.dim() >= 1, "noise takes (samples, ...)");
    STD_TORCH_CHECK(strength.numel() == 1 && strength.scalar_type() == ScalarType::Double,
                    "strength: float64, one number");
    const Tensor ordered = x.is_contiguous() ? x : torch::stable::contiguous(x);
    Tensor y = torch::stable::empty_like(ordered);
    int64_t size = 1;
    for (int64_t axis = 1; axis < x.dim(); ++axis) size *= x.size(axis);
    STD_TORCH_CHECK(size >> 34 == 0, "a sample has 2^34 elements at most: blocks of four are counted in 32 bits");
    const int64_t tokens = x.dim() >= 2 ? x.size(1) : 1;
    const int64_t spared = tokens ? size / tokens * (first_token < tokens ? first_token : tokens) : 0;
    if (x.numel() > 0) {
        const bool aligned = is_aligned(ordered.const_data_ptr()) && is_aligned(y.mutable_data_ptr()) &&
                             size * x.element_size() % 16 == 0;
        const Common common = {x.size(0), size, spared, aligned,
                               static_cast<const double*>(strength.const_data_ptr())};
        with_format(x, [&](auto type) {
            using T = typename decltype(type)::type;
            launch(static_cast<const T*>(ordered.const_data_ptr()), static_cast<T*>(y.mutable_data_ptr()), common,
                   queue_of(x));
        });
        STD_CUDA_KERNEL_LAUNCH_CHECK();
    }
    if (x.is_contiguous()) return y;
    Tensor like = torch::stable::empty_like(x);
    return torch::stable::copy_(like, y);
}

dim3 blocks(int64_t rows, int64_t size) {
    const Grid grid = grid_of(rows, size);
    return dim3(grid.x, grid.y);
}

Tensor gaussian_noise(Tensor x, Tensor strength, Tensor sample_ids, Tensor epoch, int64_t seed, int64_t stream,
                      int64_t first_token) {
    const Tensor ids = torch::stable::contiguous(sample_ids);
    const DrawSource source = source_of(ids, epoch, seed, stream, x.size(0));
    return launched(x, strength, first_token, [&](auto from, auto to, const Common& common, cudaStream_t queue) {
        gaussian_kernel<<<blocks(common.samples, common.size), kThreads, 0, queue>>>(from, to, common, source);
    });
}

Tensor salt_and_pepper(Tensor x, Tensor low, Tensor high, Tensor strength, Tensor sample_ids, Tensor epoch,
                       int64_t seed, int64_t stream, int64_t first_token) {
    const Tensor ids = torch::stable::contiguous(sample_ids);
    const DrawSource source = source_of(ids, epoch, seed, stream, x.size(0));
    for (const Tensor& extreme : {low, high})
        STD_TORCH_CHECK(extreme.scalar_type() == ScalarType::Double && extreme.dim() == 2 && extreme.is_contiguous() &&
                            extreme.size(0) == x.size(0) && extreme.size(1) == low.size(1) && extreme.size(1) >= 1,
                        "low and high: float64 (samples, parts)");
    const double *lows = static_cast<const double*>(low.const_data_ptr()),
                 *highs = static_cast<const double*>(high.const_data_ptr());
    const int64_t parts = low.size(1);
    return launched(x, strength, first_token, [&](auto from, auto to, const Common& common, cudaStream_t queue) {
        STD_TORCH_CHECK(parts == 1 || (common.size >> 32 == 0 && common.size / parts >= kUnit),
                        "channels with extremes of their own have 8 elements each or more, 2^32 together or less");
        const Extremes extremes = {lows, highs, parts, uint32_t(common.size / parts)};
        salt_and_pepper_kernel<<<blocks(common.samples, common.size), kThreads, 0, queue>>>(from, to, common, source,
                                                                                            extremes);
    });
}

Tensor linear_mix(Tensor x, Tensor strength, bool optimal, int64_t group_size, int64_t first_token, bool transposed,
                  bool) {
    STD_TORCH_CHECK(group_size >= 1, "group_size: at least 1");
    const MixPlan plan = MixPlan::of(x.size(0), group_size, transposed);
    return launched(x, strength, first_token, [&](auto from, auto to, const Common& common, cudaStream_t queue) {
        const dim3 grid = blocks(plan.groups, common.size);
        if (optimal)
            optimal_q_kernel<<<grid, kThreads, 0, queue>>>(from, to, common, plan);
        else
            circular_shift_kernel<<<grid, kThreads, 0, queue>>>(from, to, common, plan);
    });
}

}  // namespace
}  // namespace noisynn

STABLE_TORCH_LIBRARY_IMPL(noisynn, CUDA, m) {
    m.impl("gaussian_noise", TORCH_BOX(&noisynn::gaussian_noise));
    m.impl("salt_and_pepper", TORCH_BOX(&noisynn::salt_and_pepper));
    m.impl("linear_mix", TORCH_BOX(&noisynn::linear_mix));
}
