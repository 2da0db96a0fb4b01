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

constexpr uint32_t kRounds = 10;

// The key of each round. Kept in memory on the CPU: a vector unit takes a broadcast word from there for nothing.
struct RoundKeys {
    uint32_t first[kRounds], second[kRounds];

    explicit NN_INLINE RoundKeys(const Draw& draw) {
        first_keys(draw.seed, first);
        second_keys(draw.epoch);
    }
    NN_INLINE RoundKeys(const uint32_t (&of_seed)[kRounds], uint32_t epoch) {
        for (uint32_t round = 0; round < kRounds; ++round) first[round] = of_seed[round];
        second_keys(epoch);
    }
    static NN_INLINE void first_keys(uint32_t seed, uint32_t (&keys)[kRounds]) {
        for (uint32_t round = 0; round < kRounds; ++round) keys[round] = seed + round * 0x9E3779B9u;
    }

private:
    NN_INLINE void second_keys(uint32_t epoch) {
        for (uint32_t round = 0; round < kRounds; ++round) second[round] = epoch + round * 0xBB67AE85u;
    }
};

constexpr uint32_t kFirstFactor = 0xD2511F53u, kSecondFactor = 0xCD9E8D57u;

// What of the first two rounds does not depend on the block: half of their products, the same for a whole sample. Plain
// integers, which a compiler takes out of a loop.
struct Beginning {
    uint32_t high_id, low, high, last;

    NN_INLINE Beginning(const Draw& draw, const RoundKeys& keys) {
        const uint64_t of_id = uint64_t(uint32_t(draw.sample_id)) * kSecondFactor;
        const uint64_t of_stream = uint64_t(uint32_t(of_id >> 32) ^ draw.stream ^ keys.first[0]) * kFirstFactor;
        high_id = uint32_t(draw.sample_id >> 32) ^ keys.second[0];
        low = uint32_t(of_id) ^ keys.first[1];
        high = uint32_t(of_stream >> 32) ^ keys.second[1];
        last = uint32_t(of_stream);
    }
};

// `L` gives the lanes: W holds a 32-bit word in the low half of each 64-bit lane (whatever is above is ignored by
// L::multiply), so that one instruction multiplies to 64 bits and neither half needs to be gathered.
// `N` counters at once: one alone waits for its own products most of the time.
template <class L, int N>
NN_INLINE void philox4x32_10(const typename L::W (&blocks)[N], const Draw& draw, const RoundKeys& keys,
                             typename L::W (&c)[N][4]) {
    const Beginning begun(draw, keys);
    for (int n = 0; n < N; ++n) {
        const typename L::W p0 = L::multiply(blocks[n], kFirstFactor);
        const typename L::W p1 = L::multiply(L::exclusive_or(L::high(p0), begun.high_id), kSecondFactor);
        c[n][0] = L::exclusive_or(L::high(p1), begun.low);
        c[n][1] = p1;
        c[n][2] = L::exclusive_or(p0, begun.high);
        c[n][3] = L::wide(begun.last);
    }
#ifdef __CUDACC__
#pragma unroll
#else
#pragma GCC unroll 10
#endif
    for (uint32_t round = 2; round < kRounds; ++round) {
        for (int n = 0; n < N; ++n) {
            const typename L::W p0 = L::multiply(c[n][0], kFirstFactor), p1 = L::multiply(c[n][2], kSecondFactor);
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
    typename L::W blocks[Steps * L::parts], made[Steps * L::parts][4];
    for (int n = 0; n < Steps * L::parts; ++n) blocks[n] = L::blocks(block + n / L::parts * L::width, n % L::parts);
    philox4x32_10<L>(blocks, draw, keys, made);
    for (int step = 0; step < Steps; ++step)
        for (int word = 0; word < 4; ++word)
            words[step][word] = L::join(made[step * L::parts][word], made[step * L::parts + L::parts - 1][word]);
}

}  // namespace noisynn
