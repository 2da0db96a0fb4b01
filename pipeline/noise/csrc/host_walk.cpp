// The GPU's threads on the CPU, one after another: every (block, thread) of a launch runs the text that the GPU runs.
// For tests alone (tests/unit/test_noise_threads.py), which call it by ctypes.
#include "image_bodies.h"
#include "lane_gpu.h"
#include "mix_bodies.h"
#include "norm_bodies.h"
#include "turned_bodies.h"

namespace {

using namespace noisynn;

struct Walk {
    int32_t format;  // 0 float32, 1 bfloat16, 2 float16
    uint32_t grid_x, grid_y;
    const void* x;
    void* y;
    Common common;
    DrawSource source;
    Extremes extremes;
    MixPlan plan;
};

// The same for memory that holds a sample column by column.
struct TurnedWalk {
    int32_t format;
    uint32_t grid_x, grid_y;
    const void* x;
    void* y;
    Turned turned;
    DrawSource source;
    Extremes extremes;
};

struct ImageWalk {
    int32_t format;
    uint32_t grid_x, grid_y;
    int32_t kind;
    void* y;
    Pictures pictures;
    DrawSource source;
    MixPlan plan;
};

// Any of the above: they begin alike.
template <class W, class Body>
void walk(const W& w, const Body& body) {
    for (uint32_t block_y = 0; block_y < w.grid_y; ++block_y)
        for (uint32_t block_x = 0; block_x < w.grid_x; ++block_x)
            for (uint32_t thread = 0; thread < kThreads; ++thread)
                body(Place{block_x, block_y, thread, w.grid_x, w.grid_y, kThreads});
}

template <class Body>
void in_format(int32_t format, const void* x, void* y, const Body& body) {
    if (format == 0) body(static_cast<const float*>(x), static_cast<float*>(y));
    if (format == 1) body(static_cast<const BFloat16*>(x), static_cast<BFloat16*>(y));
    if (format == 2) body(static_cast<const Half*>(x), static_cast<Half*>(y));
}

template <class Body>
void with_format(const Walk& w, const Body& body) {
    in_format(w.format, w.x, w.y, body);
}

template <Stretches how>
void walk_image(const ImageWalk* w) {
    in_format(w->format, w->y, w->y, [&](auto, auto y) {
        walk(*w, [&](const Place& place) {
            switch (ImageKind(w->kind)) {
                case ImageKind::none:
                    return image_thread<ImageKind::none, how, GpuLane>(place, w->pictures, y, w->source);
                case ImageKind::gaussian:
                    return image_thread<ImageKind::gaussian, how, GpuLane>(place, w->pictures, y, w->source);
                case ImageKind::salt_and_pepper:
                    return image_thread<ImageKind::salt_and_pepper, how, GpuLane>(place, w->pictures, y, w->source);
                case ImageKind::circular_shift: return image_shift_thread<how>(place, w->pictures, y, w->plan);
                case ImageKind::optimal_q: return image_optimal_q_thread<how>(place, w->pictures, y, w->plan);
            }
        });
    });
}

}  // namespace

extern "C" {

void nn_grid(int64_t rows, int64_t tasks, uint32_t* x, uint32_t* y) {
    const Grid grid = grid_of(rows, tasks);
    *x = grid.x;
    *y = grid.y;
}

void nn_mix_plan(int64_t samples, int64_t group_size, bool transposed, MixPlan* plan) {
    *plan = MixPlan::of(samples, group_size, transposed);
}

void nn_walk_gaussian_noise(const Walk* w) {
    with_format(*w, [&](auto x, auto y) {
        walk(*w, [&](const Place& place) { gaussian_thread<GpuLane>(place, x, y, w->common, w->source); });
    });
}

void nn_walk_salt_and_pepper(const Walk* w) {
    with_format(*w, [&](auto x, auto y) {
        walk(*w, [&](const Place& place) {
            salt_and_pepper_thread<GpuLane>(place, x, y, w->common, w->source, w->extremes);
        });
    });
}

void nn_walk_circular_shift(const Walk* w) {
    with_format(*w, [&](auto x, auto y) {
        walk(*w, [&](const Place& place) { circular_shift_thread(place, x, y, w->common, w->plan); });
    });
}

void nn_walk_circular_shift_held(const Walk* w) {
    with_format(*w, [&](auto x, auto y) {
        walk(*w, [&](const Place& place) { circular_shift_held_thread(place, x, y, w->common, w->plan); });
    });
}

void nn_walk_optimal_q(const Walk* w) {
    with_format(*w, [&](auto x, auto y) {
        walk(*w, [&](const Place& place) { optimal_q_thread(place, x, y, w->common, w->plan); });
    });
}

void nn_walk_optimal_q_held(const Walk* w) {
    with_format(*w, [&](auto x, auto y) {
        walk(*w, [&](const Place& place) { optimal_q_held_thread(place, x, y, w->common, w->plan); });
    });
}

int32_t nn_held(int32_t format) { return format == 0 ? kHeld<float> : kHeld<Half>; }

int64_t nn_turned_tasks(const Turned* turned) { return turned->tasks(); }

void nn_walk_gaussian_turned(const TurnedWalk* w) {
    in_format(w->format, w->x, w->y, [&](auto x, auto y) {
        walk(*w, [&](const Place& place) {
            if (w->turned.fits_blocks())
                gaussian_turned_thread<GpuLane, true>(place, x, y, w->turned, w->source);
            else
                gaussian_turned_thread<GpuLane, false>(place, x, y, w->turned, w->source);
        });
    });
}

void nn_walk_salt_and_pepper_turned(const TurnedWalk* w) {
    in_format(w->format, w->x, w->y, [&](auto x, auto y) {
        walk(*w, [&](const Place& place) {
            if (w->turned.fits_blocks())
                salt_and_pepper_turned_thread<GpuLane, true>(place, x, y, w->turned, w->source, w->extremes);
            else
                salt_and_pepper_turned_thread<GpuLane, false>(place, x, y, w->turned, w->source, w->extremes);
        });
    });
}

int64_t nn_image_tasks(const Pictures* pictures) { return pictures->tasks(); }

void nn_walk_image(const ImageWalk* w) {
    if (!w->pictures.aligned) return walk_image<Stretches::pieces>(w);
    w->pictures.channels_last ? walk_image<Stretches::pixels>(w) : walk_image<Stretches::planes>(w);
}

// The uniforms of words, and the normals of pairs of them, as a GPU's lane makes them.
void nn_uniforms(const uint32_t* words, int64_t count, float* out) {
    for (int64_t i = 0; i < count; ++i) out[i] = uniform<GpuLane>(words[i]);
}

void nn_normals(const uint32_t* words, int64_t count, float* out) {
    for (int64_t i = 0; i + 1 < count; i += 2) normals<GpuLane>(words[i], words[i + 1], out[i], out[i + 1]);
}

struct NormWalk {
    int32_t format, way;  // way: 0 Gaussian (plain on the way back), 1 circular shift, 2 optimal Q
    uint32_t warps;
    const void *x, *gradient;
    void* y;  // dx on the way back
    float *means, *scales, *dweight, *dbias;
    const float *weight, *bias;
    Rows rows;
    uint32_t group_size;
    DrawSource source;
};

}

namespace {

// Of half the widest row, and of the widest: as norm_cuda.cu has it.
template <int units>
void walk_norm(const NormWalk* w) {
    const Groups groups = Groups::of(w->rows.samples, w->group_size);
    const auto run = [&](auto* x, auto* y) {
        using T = std::remove_pointer_t<decltype(y)>;
        const NormForward<units, T> work = {x, y, w->means, w->scales, w->weight, w->bias, w->rows};
        for (uint32_t warp = 0; warp < w->warps; ++warp) {
            if (w->way == 0) norm_gaussian_warp<GpuLane>(WarpPlace{warp, w->warps}, work, w->source);
            if (w->way == 1) norm_shift_warp(WarpPlace{warp, w->warps}, work, groups);
            if (w->way == 2) norm_optimal_q_warp(WarpPlace{warp, w->warps}, work, groups);
        }
    };
    in_format(w->format, w->x, w->y, run);
}

template <int units>
void walk_norm_backward(const NormWalk* w) {
    const Groups groups = Groups::of(w->rows.samples, w->way == 0 ? 1 : w->group_size);
    const auto run = [&](auto* x, auto* dx) {
        using T = std::remove_pointer_t<decltype(dx)>;
        const NormBackward<units, T> work = {static_cast<const T*>(w->gradient), x, dx, w->means, w->scales, w->weight,
                                             w->dweight, w->dbias, w->rows, groups};
        for (uint32_t warp = 0; warp < w->warps; ++warp) {
            if (w->way == 0) norm_backward_warp<Way::plain>(WarpPlace{warp, w->warps}, work);
            if (w->way == 1) norm_backward_warp<Way::shift>(WarpPlace{warp, w->warps}, work);
            if (w->way == 2) norm_backward_warp<Way::optimal>(WarpPlace{warp, w->warps}, work);
        }
    };
    in_format(w->format, w->x, w->y, run);
}

}  // namespace

extern "C" {

void nn_walk_norm(const NormWalk* w) { w->rows.width <= kWidest / 2 ? walk_norm<2>(w) : walk_norm<4>(w); }

void nn_walk_norm_backward(const NormWalk* w) {
    w->rows.width <= kWidest / 2 ? walk_norm_backward<2>(w) : walk_norm_backward<4>(w);
}

// Which elements of `size` a launch visits, for sizes that no memory holds: for the chosen threads alone, calls back
// with (row, first element, elements).
void nn_visits(int64_t rows, int64_t size, uint32_t grid_x, uint32_t grid_y, uint32_t block_x, uint32_t block_y,
               uint32_t thread, void (*visit)(int64_t, int64_t, int32_t)) {
    for_units(Place{block_x, block_y, thread, grid_x, grid_y, kThreads}, rows, size,
              [&](int64_t row, int64_t at, int count) { visit(row, at, count); });
}
}
