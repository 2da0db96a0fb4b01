// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), on any lanes of any machine.
//
// Key: (seed, epoch). Counter: (block, stream, low and high half of the sample id). The same text is compiled for the
// host's scalar and vector units and for the GPU; pipeline/noise/reference.py is its specification.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define NN_INLINE __host__ __device__ __forceinline__
#else
#define NN_INLINE inline __attribute__((always_inline))
#endif

namespace noisynn {

// What a sample's draws are functions of, but for the place in the sample.
struct Draw {
    uint32_t seed, epoch, stream;
    uint64_t sample_id;
};

// The key of each round. Kept in memory on the CPU: a vector unit takes a broadcast word from there for nothing.
struct RoundKeys {
    uint32_t first[10], second[10];

    explicit NN_INLINE RoundKeys(const Draw& draw) {
        for (uint32_t round = 0; round < 10; ++round) {
            first[round] = draw.seed + round * 0x9E3779B9u;
            second[round] = draw.epoch + round * 0xBB67AE85u;
        }
    }
};

// `L` gives the lanes: W holds a 32-bit word in the low half of each 64-bit lane (whatever is above is ignored by
// L::multiply), so that one instruction multiplies to 64 bits and neither half needs to be gathered.
// `N` counters at once: one alone waits for its own products most of the time.
template <class L, int N>
NN_INLINE void philox4x32_10(typename L::W (&c)[N][4], const RoundKeys& keys) {
#ifdef __CUDACC__
#pragma unroll
#else
#pragma GCC unroll 10
#endif
    for (int round = 0; round < 10; ++round) {
        for (int n = 0; n < N; ++n) {
            const typename L::W p0 = L::multiply(c[n][0], 0xD2511F53u), p1 = L::multiply(c[n][2], 0xCD9E8D57u);
            c[n][0] = L::exclusive_or(L::high(p1), c[n][1], keys.first[round]);
            c[n][1] = p1;
            c[n][2] = L::exclusive_or(L::high(p0), c[n][3], keys.second[round]);
            c[n][3] = p0;
        }
    }
}

// Words 0 to 3 of `Steps` times L::width blocks from `block` on. Which block a lane holds, the lanes say: L::transpose
// puts what was made of the words into memory's order.
template <class L, int Steps>
NN_INLINE void draw_words(uint32_t block, const Draw& draw, const RoundKeys& keys,
                          typename L::U (&words)[Steps][4]) {
    typename L::W counter[Steps * L::parts][4];
    for (int n = 0; n < Steps * L::parts; ++n) {
        counter[n][0] = L::blocks(block + n / L::parts * L::width, n % L::parts);
        counter[n][1] = L::wide(draw.stream);
        counter[n][2] = L::wide(uint32_t(draw.sample_id));
        counter[n][3] = L::wide(uint32_t(draw.sample_id >> 32));
    }
    philox4x32_10<L>(counter, keys);
    for (int step = 0; step < Steps; ++step)
        for (int word = 0; word < 4; ++word)
            words[step][word] =
                L::join(counter[step * L::parts][word], counter[step * L::parts + L::parts - 1][word]);
}

}  // namespace noisynn
