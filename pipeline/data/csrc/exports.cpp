// What pipeline/data/native.py calls. No exception leaves: it would end the process.
#include <cstring>

#include <libdeflate.h>

#include "jpeg_header.h"
#include "pool.h"

#define NN_EXPORT extern "C" __attribute__((visibility("default")))

namespace noisynn {
namespace {

// A job outlives the interpreter's own order of ending: it holds its pool.
struct Handle {
    std::shared_ptr<Pool> pool;
    Job job;
};

struct Pixels {
    uint8_t* out;
    int width;

    static void take(void* context, const uint8_t* rows, size_t stride, int count) {
        auto& pixels = *static_cast<Pixels*>(context);
        for (int row = 0; row < count; ++row, rows += stride)
            for (int x = 0; x < pixels.width; ++x, pixels.out += 3) std::memcpy(pixels.out, rows + 4 * size_t(x), 3);
    }
};

}  // namespace
}  // namespace noisynn

using namespace noisynn;

NN_EXPORT int32_t nn_loader_abi() { return 2; }

// nullptr where NOISYNN_LANES names what this processor has not.
NN_EXPORT const char* nn_loader_lanes() { return resize_kernels() == nullptr ? nullptr : resize_kernels()->name; }

// Whose entropy decoder reads what can be read in part.
NN_EXPORT const char* nn_loader_entropy_decoder() {
    return replaces_entropy_decoder() ? entropy_kernels().name : "libjpeg's";
}

NN_EXPORT void* nn_pool_open(int32_t threads) {
    try {
        return new std::shared_ptr<Pool>(std::make_shared<Pool>(threads));
    } catch (...) {
        return nullptr;
    }
}

NN_EXPORT void nn_pool_close(void* pool) { (*static_cast<std::shared_ptr<Pool>*>(pool))->close(); }

NN_EXPORT void nn_pool_free(void* pool) { delete static_cast<std::shared_ptr<Pool>*>(pool); }

NN_EXPORT void* nn_job_submit(void* pool, const Item* items, int64_t count, const View* view, uint8_t* out,
                              int32_t* status, int32_t* crops) {
    try {
        const auto& shared = *static_cast<std::shared_ptr<Pool>*>(pool);
        auto handle = std::make_unique<Handle>(Handle{shared, {items, count, *view, out, status, crops}});
        shared->submit(&handle->job);
        return handle.release();
    } catch (...) {
        return nullptr;
    }
}

NN_EXPORT void nn_job_wait(void* job) {
    auto* handle = static_cast<Handle*>(job);
    handle->pool->wait(&handle->job);
}

NN_EXPORT void nn_job_free(void* job) { delete static_cast<Handle*>(job); }

// The rest is for tests, which compare each step with Python's.

NN_EXPORT uint32_t nn_crc32(const uint8_t* data, size_t size) { return libdeflate_crc32(0, data, size); }

// sizes: (count, 2) width and height; crops: (count, 5).
NN_EXPORT void nn_training_crops(const int32_t* sizes, const int64_t* sample_ids, int64_t count, const View* view,
                                 int32_t* crops) {
    for (int64_t i = 0; i < count; ++i, crops += 5) {
        const Framing framing = training_framing(sizes[2 * i], sizes[2 * i + 1], sample_ids[i], *view);
        const Box box = framing.source;
        const int32_t crop[5] = {box.left, box.top, box.width, box.height, framing.flip};
        std::memcpy(crops, crop, sizeof(crop));
    }
}

// A picture whose bytes are in memory: item.offset, fd and crc32 mean nothing. `data` is copied first: vector loads may
// read past its end.
NN_EXPORT int32_t nn_make_picture(const uint8_t* data, const Item* item, const View* view, uint8_t* out,
                                  int32_t* crop) {
    try {
        Workspace workspace;
        uint8_t* bytes = workspace.file.take(item->size);
        std::memcpy(bytes, data, item->size);
        return make_picture(bytes, *item, *view, workspace, out, crop);
    } catch (...) {
        return ask_reference;
    }
}

// out: RGB (height, width, 3) of a window of a JPEG. *spliced: whether restart markers spared a part.
NN_EXPORT int32_t nn_decode_window(const uint8_t* data, uint32_t size, const int32_t* window, uint8_t* out,
                                   int32_t* spliced) {
    try {
        Workspace workspace;
        JpegHeader header;
        uint8_t* bytes = workspace.file.take(size);
        std::memcpy(bytes, data, size);
        if (!read_jpeg_header(bytes, size, header) || !has_end(bytes, size, header)) return ask_reference;
        const Box box{window[0], window[1], window[2], window[3]};
        if (box.left < 0 || box.top < 0 || box.width < 1 || box.height < 1) return ask_reference;
        if (box.width > header.width - box.left || box.height > header.height - box.top) return ask_reference;
        Pixels pixels{out, box.width};
        bool spared;
        const bool good = decode_window(bytes, size, header, box, workspace.decoder, spared, Pixels::take, &pixels);
        *spliced = spared;
        return good ? ok : ask_reference;
    } catch (...) {
        return ask_reference;
    }
}
