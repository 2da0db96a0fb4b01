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
template <class L>
NN_INLINE void philox4x32_10(typename L::W (&c)[4], const RoundKeys& keys) {
#ifdef __CUDACC__
#pragma unroll
#endif
    for (int round = 0; round < 10; ++round) {
        const typename L::W p0 = L::multiply(c[0], 0xD2511F53u), p1 = L::multiply(c[2], 0xCD9E8D57u);
        c[0] = L::exclusive_or(L::high(p1), c[1], keys.first[round]);
        c[1] = p1;
        c[2] = L::exclusive_or(L::high(p0), c[3], keys.second[round]);
        c[3] = p0;
    }
}

// Words 0 to 3 of L::width blocks from `block` on. Which block a lane holds, the lanes say: L::transpose puts what was
// made of the words into memory's order.
template <class L>
NN_INLINE void draw_words(uint32_t block, const Draw& draw, const RoundKeys& keys, typename L::U (&words)[4]) {
    typename L::W counter[L::parts][4];
    for (int part = 0; part < L::parts; ++part) {
        counter[part][0] = L::blocks(block, part);
        counter[part][1] = L::wide(draw.stream);
        counter[part][2] = L::wide(uint32_t(draw.sample_id));
        counter[part][3] = L::wide(uint32_t(draw.sample_id >> 32));
    }
    for (int part = 0; part < L::parts; ++part) philox4x32_10<L>(counter[part], keys);
    for (int word = 0; word < 4; ++word) words[word] = L::join(counter[0][word], counter[L::parts - 1][word]);
}

}  // namespace noisynn
