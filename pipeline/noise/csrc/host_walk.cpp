// The GPU's threads on the CPU, one after another: every (block, thread) of a launch runs the text that the GPU runs.
// For tests alone (tests/unit/test_noise_threads.py), which call it by ctypes.
#include "thread_bodies.h"

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

template <class Body>
void walk(const Walk& w, const Body& body) {
    for (uint32_t block_y = 0; block_y < w.grid_y; ++block_y)
        for (uint32_t block_x = 0; block_x < w.grid_x; ++block_x)
            for (uint32_t thread = 0; thread < kThreads; ++thread)
                body(Place{block_x, block_y, thread, w.grid_x, w.grid_y, kThreads});
}

template <class Body>
void with_format(const Walk& w, const Body& body) {
    if (w.format == 0) body(static_cast<const float*>(w.x), static_cast<float*>(w.y));
    if (w.format == 1) body(static_cast<const BFloat16*>(w.x), static_cast<BFloat16*>(w.y));
    if (w.format == 2) body(static_cast<const Half*>(w.x), static_cast<Half*>(w.y));
}

}  // namespace

extern "C" {

void nn_grid(int64_t rows, int64_t size, uint32_t* x, uint32_t* y) {
    const Grid grid = grid_of(rows, size);
    *x = grid.x;
    *y = grid.y;
}

void nn_mix_plan(int64_t samples, int64_t group_size, bool transposed, MixPlan* plan) {
    *plan = MixPlan::of(samples, group_size, transposed);
}

void nn_walk_gaussian_noise(const Walk* w) {
    with_format(*w, [&](auto x, auto y) {
        walk(*w, [&](const Place& place) { gaussian_thread<Scalar>(place, x, y, w->common, w->source); });
    });
}

void nn_walk_salt_and_pepper(const Walk* w) {
    with_format(*w, [&](auto x, auto y) {
        walk(*w, [&](const Place& place) {
            salt_and_pepper_thread<Scalar>(place, x, y, w->common, w->source, w->extremes);
        });
    });
}

void nn_walk_circular_shift(const Walk* w) {
    with_format(*w, [&](auto x, auto y) {
        walk(*w, [&](const Place& place) { circular_shift_thread(place, x, y, w->common, w->plan); });
    });
}

void nn_walk_optimal_q(const Walk* w) {
    with_format(*w, [&](auto x, auto y) {
        walk(*w, [&](const Place& place) { optimal_q_thread(place, x, y, w->common, w->plan); });
    });
}

// Which elements of `size` a launch visits, for sizes that no memory holds: for the chosen threads alone, calls back
// with (row, first element, elements).
void nn_visits(int64_t rows, int64_t size, uint32_t grid_x, uint32_t grid_y, uint32_t block_x, uint32_t block_y,
               uint32_t thread, void (*visit)(int64_t, int64_t, int32_t)) {
    for_units(Place{block_x, block_y, thread, grid_x, grid_y, kThreads}, rows, size,
              [&](int64_t row, int64_t at, int count) { visit(row, at, count); });
}
}
