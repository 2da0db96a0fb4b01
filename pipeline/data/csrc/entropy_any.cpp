#include <cstdlib>

#include "entropy_core.h"

namespace noisynn {
namespace {

const uint8_t* to_marker(const uint8_t* at, const uint8_t* last, uint8_t** out) {
    while (at < last) {
        const auto* found = static_cast<const uint8_t*>(std::memchr(at, 0xFF, size_t(last - at)));
        if (found == nullptr) break;
        const bool is_marker = found[1] != 0;
        if (out != nullptr) {
            const size_t length = size_t(found - at) + !is_marker;
            std::memcpy(*out, at, length);
            *out += length;
        }
        if (is_marker) return found;
        at = found + 2;
    }
    return nullptr;
}

}  // namespace

const EntropyKernels entropy_any{"any", to_marker, one, pair, aim, skip, move};

const EntropyKernels& entropy_kernels() {
#ifdef __x86_64__
    static const bool has_bmi2 = [] {
        const char* wanted = std::getenv("NOISYNN_LANES");
        const bool is_kept_back = wanted != nullptr && std::strcmp(wanted, "one lane") == 0;
        return !is_kept_back && __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("avx2");
    }();
    if (has_bmi2) return entropy_bmi2;
#endif
    return entropy_any;
}

}  // namespace noisynn
