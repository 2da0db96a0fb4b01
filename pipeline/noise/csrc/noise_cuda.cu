// The operators of pipeline/noise/ops.py on a GPU, through torch's stable C++ interface. What a thread does stands in
// thread_bodies.h; here is how it is launched.
#include <initializer_list>
#include <type_traits>

#include "cuda_operators.cuh"
#include "layout.h"
#include "mix_bodies.h"
#include "turned_bodies.h"

namespace noisynn {
namespace {

// Blocks at once on one multiprocessor: as many as leave registers enough that none is spilled.
constexpr int kBlocksOfGaussian = 6, kBlocksOnOne = 4, kBlocksOfRing = 3, kBlocksOfHeld = 2;

__device__ __forceinline__ Place here() {
    return {blockIdx.x, blockIdx.y, threadIdx.x, gridDim.x, gridDim.y, blockDim.x};
}

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksOfGaussian)
    gaussian_kernel(const T* __restrict__ x, T* __restrict__ y, Common common, DrawSource source) {
    gaussian_thread<GpuLane>(here(), x, y, common, source);
}

template <class T>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 4 ? kBlocksOfRing : kBlocksOnOne)
    salt_and_pepper_kernel(const T* __restrict__ x, T* __restrict__ y, Common common, DrawSource source,
                           Extremes extremes) {
    salt_and_pepper_thread<GpuLane>(here(), x, y, common, source, extremes);
}

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksOfRing)
    circular_shift_kernel(const T* __restrict__ x, T* __restrict__ y, Common common, MixPlan plan) {
    circular_shift_thread(here(), x, y, common, plan);
}

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksOfHeld)
    circular_shift_held_kernel(const T* __restrict__ x, T* __restrict__ y, Common common, MixPlan plan) {
    circular_shift_held_thread(here(), x, y, common, plan);
}

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksOnOne)
    optimal_q_kernel(const T* __restrict__ x, T* __restrict__ y, Common common, MixPlan plan) {
    optimal_q_thread(here(), x, y, common, plan);
}

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksOfHeld)
    optimal_q_held_kernel(const T* __restrict__ x, T* __restrict__ y, Common common, MixPlan plan) {
    optimal_q_held_thread(here(), x, y, common, plan);
}

template <bool fits, class T>
__global__ void __launch_bounds__(kThreads, kBlocksOfHeld)
    gaussian_turned_kernel(const T* __restrict__ x, T* __restrict__ y, Turned turned, DrawSource source) {
    gaussian_turned_thread<GpuLane, fits>(here(), x, y, turned, source);
}

template <bool fits, class T>
__global__ void __launch_bounds__(kThreads, kBlocksOfHeld)
    salt_and_pepper_turned_kernel(const T* __restrict__ x, T* __restrict__ y, Turned turned, DrawSource source,
                                  Extremes extremes) {
    salt_and_pepper_turned_thread<GpuLane, fits>(here(), x, y, turned, source, extremes);
}

// x and its result on the device, and how they lie there: strides as they are where a kernel takes them, else those of a
// copy in the logical order.
struct Prepared {
    Tensor x, y;
    Layout layout;
    const double* strength;

    bool is_turned() const { return layout.rows > 1 && layout.is_turned(); }
    bool multiples_of(int64_t units, std::initializer_list<int64_t> strides) const {
        bool fit = is_aligned(x.const_data_ptr()) && is_aligned(y.const_data_ptr());
        for (const int64_t stride : strides) fit = fit && stride * x.element_size() % units == 0;
        return fit;
    }
    Common common() const {
        const bool fits = multiples_of(16, {layout.from.sample, layout.from.row, layout.to.sample});
        return {layout.samples, layout.size, layout.spared, layout.from.sample, layout.to.sample,
                layout.columns, layout.from.row, fits, strength};
    }
    Turned turned() const {
        const bool fits =
            multiples_of(16, {layout.from.sample, layout.from.column, layout.to.sample, layout.to.column});
        return {layout.samples, uint32_t(layout.rows), uint32_t(layout.columns),
                uint32_t(layout.spared / layout.columns), layout.from.sample, layout.from.column,
                layout.to.sample, layout.to.column, fits, strength};
    }
};

// by_place: what an operator does to an element does not depend on where in the sample it is. parts: of a sample, that
// have extremes of their own.
struct Nature {
    bool by_place = false;
    int64_t parts = 1;
};

// Whether the kernels take x as it lies.
bool is_taken(const Layout& layout, const Nature& nature) {
    if (!layout.fits) return false;
    if (layout.is_flat()) return true;
    if (layout.is_pitched()) return layout.columns % kUnit == 0;
    if (nature.by_place) return layout.is_same_order() && layout.spared == 0;
    return layout.is_turned() && layout.size >> 32 == 0 && (nature.parts == 1 || nature.parts == layout.rows);
}

// launch(x's memory, the result's, prepared, queue) on x's device, in its format; the result has x's own layout.
template <class Launch>
Tensor launched(const Tensor& x, const Tensor& strength, int64_t first_token, const Nature& nature,
                const Launch& launch) {
    const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
    STD_TORCH_CHECK(strength.numel() == 1 && strength.scalar_type() == ScalarType::Double,
                    "strength: float64, one number");
    Tensor y = torch::stable::empty_like(x);
    Layout layout(x, y, first_token);
    if (x.numel() == 0) return y;
    if (!is_taken(layout, nature)) {
        const Tensor ordered = launched(torch::stable::contiguous(x), strength, first_token, nature, launch);
        return torch::stable::copy_(y, ordered);
    }
    if (nature.by_place && !layout.is_pitched()) layout = layout.as_flat();
    const Prepared prepared = {x, y, layout, static_cast<const double*>(strength.const_data_ptr())};
    with_format(x, [&](auto type) {
        using T = typename decltype(type)::type;
        launch(static_cast<const T*>(x.const_data_ptr()), static_cast<T*>(y.mutable_data_ptr()), prepared, queue_of(x));
    });
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    return y;
}

dim3 blocks(int64_t rows, int64_t tasks) {
    const Grid grid = grid_of(rows, tasks);
    return dim3(grid.x, grid.y);
}

Tensor gaussian_noise(Tensor x, Tensor strength, Tensor sample_ids, Tensor epoch, int64_t seed, int64_t stream,
                      int64_t first_token) {
    const Tensor ids = torch::stable::contiguous(sample_ids);
    const DrawSource source = source_of(ids, epoch, seed, stream, x.size(0));
    return launched(x, strength, first_token, {}, [&](const auto* from, auto* to, const Prepared& prepared,
                                                                 cudaStream_t queue) {
        if (prepared.is_turned()) {
            const Turned turned = prepared.turned();
            const dim3 grid = blocks(turned.samples, turned.tasks());
            if (turned.fits_blocks())
                gaussian_turned_kernel<true><<<grid, kThreads, 0, queue>>>(from, to, turned, source);
            else
                gaussian_turned_kernel<false><<<grid, kThreads, 0, queue>>>(from, to, turned, source);
        } else {
            const Common common = prepared.common();
            const dim3 grid = blocks(common.samples, whole(common.size, kUnit));
            gaussian_kernel<<<grid, kThreads, 0, queue>>>(from, to, common, source);
        }
    });
}

// As `low` and `high` give them: (samples, parts) each.
Extremes extremes_of(const Tensor& low, const Tensor& high, int64_t samples, int64_t size) {
    for (const Tensor& extreme : {low, high})
        STD_TORCH_CHECK(extreme.scalar_type() == ScalarType::Double && extreme.dim() == 2 && extreme.is_contiguous() &&
                            extreme.size(0) == samples && extreme.size(1) == low.size(1) && extreme.size(1) >= 1,
                        "low and high: float64 (samples, parts)");
    const int64_t parts = low.size(1);
    STD_TORCH_CHECK(parts == 1 || size == 0 || (size >> 32 == 0 && size / parts >= kUnit),
                    "channels with extremes of their own have 8 elements each or more, 2^32 together or less");
    return {static_cast<const double*>(low.const_data_ptr()), static_cast<const double*>(high.const_data_ptr()), parts,
            uint32_t(size / parts)};
}

Tensor salt_and_pepper(Tensor x, Tensor low, Tensor high, Tensor strength, Tensor sample_ids, Tensor epoch,
                       int64_t seed, int64_t stream, int64_t first_token) {
    const Tensor ids = torch::stable::contiguous(sample_ids);
    const DrawSource source = source_of(ids, epoch, seed, stream, x.size(0));
    const Extremes extremes = extremes_of(low, high, x.size(0), x.size(0) ? x.numel() / x.size(0) : 0);
    const Nature nature = {false, extremes.parts};
    return launched(x, strength, first_token, nature, [&](const auto* from, auto* to, const Prepared& prepared,
                                                                 cudaStream_t queue) {
        if (prepared.is_turned()) {
            const Turned turned = prepared.turned();
            const dim3 grid = blocks(turned.samples, turned.tasks());
            if (turned.fits_blocks())
                salt_and_pepper_turned_kernel<true><<<grid, kThreads, 0, queue>>>(from, to, turned, source, extremes);
            else
                salt_and_pepper_turned_kernel<false><<<grid, kThreads, 0, queue>>>(from, to, turned, source, extremes);
        } else {
            const Common common = prepared.common();
            const dim3 grid = blocks(common.samples, whole(common.size, kUnit));
            salt_and_pepper_kernel<<<grid, kThreads, 0, queue>>>(from, to, common, source, extremes);
        }
    });
}

Tensor linear_mix(Tensor x, Tensor strength, bool optimal, int64_t group_size, int64_t first_token, bool transposed,
                  bool) {
    STD_TORCH_CHECK(group_size >= 1, "group_size: at least 1");
    const MixPlan plan = MixPlan::of(x.size(0), group_size, transposed);
    return launched(x, strength, first_token, {true}, [&](const auto* from, auto* to, const Prepared& prepared,
                                                                 cudaStream_t queue) {
        constexpr int held = kHeld<std::remove_pointer_t<decltype(to)>>;
        const Common common = prepared.common();
        const dim3 grid = blocks(plan.groups, whole(common.size, kUnit));
        const bool fits = group_size <= held || x.size(0) <= held;
        if (!optimal && fits)
            circular_shift_held_kernel<<<grid, kThreads, 0, queue>>>(from, to, common, plan);
        else if (!optimal)
            circular_shift_kernel<<<grid, kThreads, 0, queue>>>(from, to, common, plan);
        else if (fits)
            optimal_q_held_kernel<<<grid, kThreads, 0, queue>>>(from, to, common, plan);
        else
            optimal_q_kernel<<<grid, kThreads, 0, queue>>>(from, to, common, plan);
    });
}

}  // namespace
}  // namespace noisynn

STABLE_TORCH_LIBRARY_IMPL(noisynn, CUDA, m) {
    m.impl("gaussian_noise", TORCH_BOX(&noisynn::gaussian_noise));
    m.impl("salt_and_pepper", TORCH_BOX(&noisynn::salt_and_pepper));
    m.impl("linear_mix", TORCH_BOX(&noisynn::linear_mix));
}
