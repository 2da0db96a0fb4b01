// LayerNorm with noise behind it on a GPU: how the warps of norm_bodies.h are launched.
#include "norm_bodies.h"

#include "cuda_operators.cuh"

namespace noisynn {
namespace {

constexpr uint32_t kWarpsInBlock = 4, kMostBlocks = 1u << 20;
constexpr uint32_t kBackwardWarps = 1024;  // each leaves one row of weights' gradients: 8 warps a multiprocessor

__device__ __forceinline__ WarpPlace warp_here() {
    const uint32_t in_block = blockDim.x / kWarp;
    return {blockIdx.x * in_block + threadIdx.x / kWarp, gridDim.x * in_block};
}

template <int Units, class T>
__global__ void __launch_bounds__(kWarpsInBlock* kWarp, 7)
    norm_gaussian_kernel(NormForward<Units, T> work, DrawSource source) {
    norm_gaussian_warp<GpuLane>(warp_here(), work, source);
}

// Two rows in registers, and three blocks of it: with four some would be spilled.
template <int Units, class T>
__global__ void __launch_bounds__(kWarpsInBlock* kWarp, 3) norm_shift_kernel(NormForward<Units, T> work, Groups groups) {
    norm_shift_warp(warp_here(), work, groups);
}

template <int Units, class T>
__global__ void __launch_bounds__(kWarpsInBlock* kWarp, 4)
    norm_optimal_q_kernel(NormForward<Units, T> work, Groups groups) {
    norm_optimal_q_warp(warp_here(), work, groups);
}

template <Way way, int Units, class T>
__global__ void __launch_bounds__(kWarpsInBlock* kWarp, 2) norm_backward_kernel(NormBackward<Units, T> work) {
    norm_backward_warp<way>(warp_here(), work);
}

uint32_t blocks_for(uint32_t tasks) {
    const uint32_t blocks = (tasks + kWarpsInBlock - 1) / kWarpsInBlock;
    return blocks < kMostBlocks ? blocks : kMostBlocks;
}

// run(Width<units>{}, Type<T>{})
template <int Units>
struct Width {
    static constexpr int units = Units;
};

template <class Run>
void with_shape(const Tensor& x, const Run& run) {
    with_format(x, [&](auto type) {
        if (x.size(2) <= kWidest / 2)
            run(Width<2>{}, type);
        else
            run(Width<4>{}, type);
    });
}

Rows rows_of(const Tensor& x, const Tensor& strength, double epsilon, int64_t first_token) {
    STD_TORCH_CHECK(x.dim() == 3 && x.size(2) % kUnit == 0 && x.size(2) <= kWidest && x.size(2) > 0,
                    "norm_noise takes (samples, tokens, width), a width of whole eights up to ", kWidest);
    STD_TORCH_CHECK(x.size(0) * x.size(1) < int64_t(1) << 31, "norm_noise takes fewer than 2^31 tokens");
    STD_TORCH_CHECK(strength.numel() == 1 && strength.scalar_type() == ScalarType::Double,
                    "strength: float64, one number");
    return {uint32_t(x.size(0)), uint32_t(x.size(1)), uint32_t(x.size(2)), uint32_t(first_token),
            float(epsilon), 1.0f / float(x.size(2)), static_cast<const double*>(strength.const_data_ptr())};
}

Tensor aligned(const Tensor& x) {
    const Tensor ordered = torch::stable::contiguous(x);
    if (is_aligned(ordered.const_data_ptr())) return ordered;
    Tensor moved = torch::stable::empty_like(ordered);
    return torch::stable::copy_(moved, ordered);
}

const float* floats(const Tensor& x, int64_t count) {
    STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float && x.numel() == count && x.is_contiguous(),
                    "weight, bias, mean and scale: float32, as many as norm_noise made or takes");
    return static_cast<const float*>(x.const_data_ptr());
}

std::tuple<Tensor, Tensor, Tensor> norm_noise(Tensor input, Tensor weight, Tensor bias, double epsilon, int64_t way,
                                              Tensor strength, Tensor sample_ids, Tensor epoch, int64_t seed,
                                              int64_t stream, int64_t group_size, int64_t first_token, bool) {
    const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
    const Tensor x = aligned(input), ids = torch::stable::contiguous(sample_ids);
    const Tensor w = aligned(weight), b = aligned(bias);
    const Rows rows = rows_of(x, strength, epsilon, first_token);
    const DrawSource source = source_of(ids, epoch, seed, stream, x.size(0));
    const Groups groups = Groups::of(x.size(0), group_size);
    Tensor y = torch::stable::empty_like(x);
    Tensor means = torch::stable::new_empty(weight, {x.size(0), x.size(1)});
    Tensor scales = torch::stable::new_empty(weight, {x.size(0), x.size(1)});
    if (x.numel() == 0) return {y, means, scales};
    const cudaStream_t queue = queue_of(x);
    with_shape(x, [&](auto width, auto type) {
        using T = typename decltype(type)::type;
        const NormForward<width.units, T> work = {
            static_cast<const T*>(x.const_data_ptr()), static_cast<T*>(y.mutable_data_ptr()),
            static_cast<float*>(means.mutable_data_ptr()), static_cast<float*>(scales.mutable_data_ptr()),
            floats(w, rows.width), floats(b, rows.width), rows};
        const uint32_t tasks = way == 0 ? rows.samples * rows.tokens : groups.tasks(rows);
        const uint32_t blocks = blocks_for(tasks), threads = kWarpsInBlock * kWarp;
        if (way == 0) norm_gaussian_kernel<<<blocks, threads, 0, queue>>>(work, source);
        if (way == 1) norm_shift_kernel<<<blocks, threads, 0, queue>>>(work, groups);
        if (way == 2) norm_optimal_q_kernel<<<blocks, threads, 0, queue>>>(work, groups);
    });
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    return {y, means, scales};
}

std::tuple<Tensor, Tensor, Tensor> norm_noise_backward(Tensor gradient, Tensor input, Tensor weight, Tensor means,
                                                       Tensor scales, int64_t way, Tensor strength, int64_t group_size,
                                                       int64_t first_token) {
    const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
    const Tensor x = aligned(input), g = aligned(gradient), w = aligned(weight);
    const Rows rows = rows_of(x, strength, 0, first_token);
    const Groups groups = Groups::of(x.size(0), way == 0 ? 1 : group_size);
    STD_TORCH_CHECK(g.scalar_type() == x.scalar_type() && g.numel() == x.numel(), "gradient: as x");
    Tensor dx = torch::stable::empty_like(x);
    Tensor dweight = torch::stable::new_empty(weight, {kBackwardWarps, x.size(2)});
    Tensor dbias = torch::stable::new_empty(weight, {kBackwardWarps, x.size(2)});
    const int64_t tokens = x.size(0) * x.size(1);
    const cudaStream_t queue = queue_of(x);
    with_shape(x, [&](auto width, auto type) {
        using T = typename decltype(type)::type;
        const NormBackward<width.units, T> work = {
            static_cast<const T*>(g.const_data_ptr()), static_cast<const T*>(x.const_data_ptr()),
            static_cast<T*>(dx.mutable_data_ptr()), floats(means, tokens), floats(scales, tokens),
            floats(w, rows.width), static_cast<float*>(dweight.mutable_data_ptr()),
            static_cast<float*>(dbias.mutable_data_ptr()), rows, groups};
        const uint32_t blocks = kBackwardWarps / kWarpsInBlock, threads = kWarpsInBlock * kWarp;
        if (way == 0) norm_backward_kernel<Way::plain><<<blocks, threads, 0, queue>>>(work);
        if (way == 1) norm_backward_kernel<Way::shift><<<blocks, threads, 0, queue>>>(work);
        if (way == 2) norm_backward_kernel<Way::optimal><<<blocks, threads, 0, queue>>>(work);
    });
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    return {dx, dweight, dbias};
}

}  // namespace
}  // namespace noisynn

STABLE_TORCH_LIBRARY_IMPL(noisynn, CUDA, m) {
    m.impl("norm_noise", TORCH_BOX(&noisynn::norm_noise));
    m.impl("norm_noise_backward", TORCH_BOX(&noisynn::norm_noise_backward));
}
