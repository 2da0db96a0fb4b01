// What the parts of the loader's native engine share, and what crosses to pipeline/data/native.py.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>

namespace noisynn {

// As native.py's. ask_reference: this engine does not do it (PNG, CMYK, anything libjpeg warns of); Pillow decides.
enum Status : int32_t { ok, wrong_bytes, read_failed, ask_reference, too_large };
enum Kind : int32_t { encoded, raw };
enum Interpolation : int32_t { bilinear, bicubic };

constexpr int64_t kMaxPixels = 50'000'000;  // decode.MAX_PIXELS

// One sample in a file. native.ITEM.
struct Item {
    int32_t fd, kind;
    uint64_t offset;
    uint32_t size, crc32;
    uint32_t width, height;  // where the container tells them, else 0
    int64_t sample_id;
};
static_assert(sizeof(Item) == 40);

// What is made of each picture. native._View.
struct View {
    int32_t size, training;
    uint32_t seed, epoch, crop_stream, flip_stream;
    int32_t interpolation, squash;
    int32_t verify, unused;  // verify: whether the checksum is looked at
    double scale[2], ratio[2], flip, eval_crop_share;
};
static_assert(sizeof(View) == 88);

struct Box {
    int left, top, width, height;
};

// Memory that is used again from picture to picture. Its content is not kept when it grows.
class Buffer {
  public:
    Buffer() = default;
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    ~Buffer() { std::free(data_); }

    // At least `bytes`, and kSlack after them that vector loads and stores may touch.
    uint8_t* take(size_t bytes) {
        if (bytes + kSlack > capacity_) {
            std::free(data_);
            data_ = nullptr, capacity_ = 0;
            const size_t wanted = (bytes + bytes / 4 + kSlack + 63) / 64 * 64;
            data_ = static_cast<uint8_t*>(std::aligned_alloc(64, wanted));
            if (data_ == nullptr) throw std::bad_alloc();
            capacity_ = wanted;
        }
        return data_;
    }

    // One picture of 50 megapixels must not hold 200 MB for the rest of the run.
    void let_go_of_much() {
        if (capacity_ <= kKept) return;
        std::free(data_);
        data_ = nullptr, capacity_ = 0;
    }

    uint8_t* data() { return data_; }
    const uint8_t* data() const { return data_; }

    static constexpr size_t kSlack = 128, kKept = 16 << 20;

  private:
    uint8_t* data_ = nullptr;
    size_t capacity_ = 0;
};

}  // namespace noisynn
