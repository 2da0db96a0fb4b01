// image_noise on a GPU: how the threads of image_bodies.h are launched.
#include "image_bodies.h"

#include "cuda_operators.cuh"

namespace noisynn {
namespace {

// Blocks at once on one multiprocessor: 64 registers a thread; 80 where it draws six blocks of Philox, or three of pieces,
// or holds the bytes of two pictures, or sums; 128 for two pictures in pieces.
constexpr int kBlocksOnOne = 4, kBlocksOfSix = 3, kBlocksOfGroups = 3, kBlocksOfPieces = 2;

__device__ __forceinline__ Place here() {
    return {blockIdx.x, blockIdx.y, threadIdx.x, gridDim.x, gridDim.y, blockDim.x};
}

constexpr int blocks_of_one(ImageKind kind, Stretches how) {
    return kind != ImageKind::none && how != Stretches::pixels ? kBlocksOfSix : kBlocksOnOne;
}

template <ImageKind kind, Stretches how, class T>
__global__ void __launch_bounds__(kThreads, blocks_of_one(kind, how))
    image_kernel(Pictures pictures, T* __restrict__ y, DrawSource source) {
    image_thread<kind, how, GpuLane>(here(), pictures, y, source);
}

template <Stretches how, class T>
__global__ void __launch_bounds__(kThreads, how == Stretches::pieces ? kBlocksOfPieces : kBlocksOfGroups)
    image_shift_kernel(Pictures pictures, T* __restrict__ y, MixPlan plan) {
    image_shift_thread<how>(here(), pictures, y, plan);
}

template <Stretches how, class T>
__global__ void __launch_bounds__(kThreads, kBlocksOfGroups)
    image_optimal_q_kernel(Pictures pictures, T* __restrict__ y, MixPlan plan) {
    image_optimal_q_thread<how>(here(), pictures, y, plan);
}

template <Stretches value>
struct How {
    static constexpr Stretches how = value;
};

const float* of_channels(const Tensor& x) {
    STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float && x.numel() == kChannels && x.is_contiguous(),
                    "mean and std: float32, one for each channel");
    return static_cast<const float*>(x.const_data_ptr());
}

const bool* flips(const Tensor& flip, int64_t samples) {
    STD_TORCH_CHECK(flip.scalar_type() == ScalarType::Bool && flip.is_contiguous() &&
                        (flip.numel() == 0 || flip.numel() == samples),
                    "flip: bool, one for each sample, or none");
    return flip.numel() ? static_cast<const bool*>(flip.const_data_ptr()) : nullptr;
}

// Fills `out`, which ops.py has made in the wanted format and layout.
void image_noise(Tensor images, Tensor mean, Tensor std, Tensor flip, int64_t kind, Tensor strength, Tensor sample_ids,
                 Tensor epoch, int64_t seed, int64_t stream, int64_t group_size, bool channels_last, Tensor out) {
    const torch::stable::accelerator::DeviceGuard guard(images.get_device_index());
    STD_TORCH_CHECK(images.scalar_type() == ScalarType::Byte && images.dim() == 4 && images.size(3) == kChannels,
                    "images: uint8 (samples, height, width, 3)");
    STD_TORCH_CHECK(out.numel() == images.numel(), "out: (samples, 3, height, width)");
    STD_TORCH_CHECK(strength.numel() == 1 && strength.scalar_type() == ScalarType::Double,
                    "strength: float64, one number");
    if (images.numel() == 0) return;
    const Tensor x = torch::stable::contiguous(images), ids = torch::stable::contiguous(sample_ids);
    const int64_t samples = x.size(0), plane = x.size(1) * x.size(2);
    STD_TORCH_CHECK(plane >> 32 == 0, "a picture has fewer than 2^32 pixels");
    const bool aligned =
        is_aligned(x.const_data_ptr()) && is_aligned(out.const_data_ptr()) && x.size(2) % kStretch == 0;
    const Pictures pictures = {static_cast<const uint8_t*>(x.const_data_ptr()), flips(flip, samples),
                               of_channels(mean), of_channels(std), samples, x.size(1), x.size(2), uint32_t(plane), aligned,
                               channels_last, static_cast<const double*>(strength.const_data_ptr())};
    const DrawSource source = source_of(ids, epoch, seed, stream, samples);
    const MixPlan plan = MixPlan::of(samples, group_size, false);
    const bool is_linear = kind >= int64_t(ImageKind::circular_shift);
    const Grid size = grid_of(is_linear ? plan.groups : samples, pictures.tasks());
    const dim3 grid(size.x, size.y);
    const cudaStream_t queue = queue_of(x);
    const auto launch = [&](auto* to, auto told) {
        constexpr Stretches how = decltype(told)::how;
        switch (ImageKind(kind)) {
            case ImageKind::none:
                return image_kernel<ImageKind::none, how><<<grid, kThreads, 0, queue>>>(pictures, to, source);
            case ImageKind::gaussian:
                return image_kernel<ImageKind::gaussian, how><<<grid, kThreads, 0, queue>>>(pictures, to, source);
            case ImageKind::salt_and_pepper:
                return image_kernel<ImageKind::salt_and_pepper, how><<<grid, kThreads, 0, queue>>>(pictures, to, source);
            case ImageKind::circular_shift:
                return image_shift_kernel<how><<<grid, kThreads, 0, queue>>>(pictures, to, plan);
            case ImageKind::optimal_q:
                return image_optimal_q_kernel<how><<<grid, kThreads, 0, queue>>>(pictures, to, plan);
        }
    };
    with_format(out, [&](auto type) {
        using T = typename decltype(type)::type;
        T* to = static_cast<T*>(out.mutable_data_ptr());
        if (!aligned) return launch(to, How<Stretches::pieces>{});
        channels_last ? launch(to, How<Stretches::pixels>{}) : launch(to, How<Stretches::planes>{});
    });
    STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace
}  // namespace noisynn

STABLE_TORCH_LIBRARY_IMPL(noisynn, CUDA, m) { m.impl("image_noise_", TORCH_BOX(&noisynn::image_noise)); }
