// From random words to noise, on any lanes: what the CPU's and the GPU's kernels share.
#pragma once

#include <cmath>
#include <cstdint>

#include "philox.h"

namespace noisynn {

// A word as a uniform in (0, 1]: never 0, so that a logarithm can be taken. The product is exact, so one rounding of
// the word and one of the sum, as in reference.py.
template <class L>
NN_INLINE typename L::F uniform(typename L::U word) {
    return L::multiply_add(L::to_float(word), L::set(0x1p-32f), L::set(0x1p-33f));
}

// ln(u) for u in [2^-33, 1], with a relative error of 2.5e-7: u = 2^e m with m in [2/3, 4/3), so that this holds near
// u = 1 too, where the radius is small. Coefficients: minimax for the relative error (2.0e-7).
template <class L>
NN_INLINE typename L::F natural_log(typename L::F u) {
    const auto bits = L::bits(u);
    const auto exponent = L::exponent_above(bits, 0x3F2AAAABu);  // of 2/3
    const auto f = L::subtract(L::mantissa_at(bits, exponent), L::set(1.0f));
    auto q = L::multiply_add(L::set(-0.15177126f), f, L::set(0.16964917f));
    q = L::multiply_add(q, f, L::set(-0.16462468f));
    q = L::multiply_add(q, f, L::set(0.19822498f));
    q = L::multiply_add(q, f, L::set(-0.25004664f));
    q = L::multiply_add(q, f, L::set(0.33336565f));
    q = L::multiply_add(q, f, L::set(-0.5f));
    const auto log_mantissa = L::multiply_add(L::multiply(f, f), q, f);
    return L::multiply_add(L::signed_to_float(exponent), L::set(0.69314718f), log_mantissa);
}

// cos and sin of 2 pi word / 2^32, each to 3e-7: the word with a sign is the angle in half turns t = -1 to 1, and
// sin(pi t) = t (1 - t^2) P(t^2), cos(pi t) = (1 - 4 t^2) Q(t^2) have their zeros where they belong. Coefficients:
// minimax for the absolute error (1.0e-7 and 1.2e-8).
template <class L>
NN_INLINE void cosine_and_sine(typename L::U word, typename L::F& cosine, typename L::F& sine) {
    const auto t = L::multiply(L::signed_to_float(word), L::set(0x1p-31f));
    const auto z = L::multiply(t, t), one = L::set(1.0f);
    auto s = L::multiply_add(L::set(5.9732930e-3f), z, L::set(-7.4459374e-2f));
    s = L::multiply_add(s, z, L::set(0.52378047f));
    s = L::multiply_add(s, z, L::set(-2.0260837f));
    s = L::multiply_add(s, z, L::set(3.1415913f));
    sine = L::multiply(L::multiply(s, L::subtract(one, z)), t);
    auto c = L::multiply_add(L::set(-3.9917039e-4f), z, L::set(6.2419651e-3f));
    c = L::multiply_add(c, z, L::set(-5.7199076e-2f));
    c = L::multiply_add(c, z, L::set(0.31949079f));
    c = L::multiply_add(c, z, L::set(-0.93480116f));
    c = L::multiply_add(c, z, one);
    cosine = L::multiply(c, L::multiply_add(L::set(-4.0f), z, one));
}

// Fast lanes give sqrt(|lg2 u|): sqrt(-2 ln u) is this times as much.
constexpr float kFastRadius = 1.1774100f;

// Box-Muller: two words make two standard normals. Lanes with fast approximations of their own (the GPU's) use those.
template <class L>
NN_INLINE void normals(typename L::U first, typename L::U second, typename L::F& one, typename L::F& other) {
    typename L::F radius;
    if constexpr (L::has_fast_math) {
        radius = L::multiply(L::set(kFastRadius), L::fast_radius(uniform<L>(first)));
        L::fast_cosine_and_sine(second, one, other);
    } else {
        radius = L::square_root(L::multiply(L::set(-2.0f), natural_log<L>(uniform<L>(first))));
        cosine_and_sine<L>(second, one, other);
    }
    one = L::multiply(radius, one);
    other = L::multiply(radius, other);
}

// What normal_products takes for `std`: what a radius is to be multiplied by, once for many draws.
template <class L>
NN_INLINE float spread_of(float std) {
    return L::has_fast_math ? kFastRadius * std : std;
}

// std times a normal as two factors: their product is added to x with one rounding.
template <class L>
struct Product {
    typename L::F one, other;

    NN_INLINE typename L::F added_to(typename L::F x) const { return L::multiply_add(one, other, x); }
};

// std times the two normals of two words: fewer instructions than normals() and two products.
template <class L>
NN_INLINE void normal_products(typename L::U first, typename L::U second, typename L::F spread, Product<L>& one,
                               Product<L>& other) {
    if constexpr (L::has_fast_math) {
        one.one = other.one = L::multiply(spread, L::fast_radius(uniform<L>(first)));
        L::fast_cosine_and_sine(second, one.other, other.other);
    } else {
        normals<L>(first, second, one.one, other.one);
        one.other = other.other = spread;
    }
}

// std times two normals, added to x and y.
template <class L>
NN_INLINE void add_normals(typename L::U first, typename L::U second, typename L::F spread, typename L::F& x,
                           typename L::F& y) {
    Product<L> one, other;
    normal_products<L>(first, second, spread, one, other);
    x = one.added_to(x);
    y = other.added_to(y);
}

// Salt-and-pepper on integers, so that all implementations take the same decision: a word below `salt` is salt, one
// below `either` is salt or pepper. Up to 2^32, which no word reaches.
struct Thresholds {
    uint64_t salt, either;
};

// A probability that is none is taken as the nearest (NaN as 0): where it comes from a tensor, nobody has looked at it.
NN_INLINE Thresholds thresholds_of(double wanted) {
    const double probability = wanted > 0 ? (wanted < 1 ? wanted : 1) : 0;
    return {uint64_t(rint(probability / 2 * 0x1p32)), uint64_t(rint(probability * 0x1p32))};
}

}  // namespace noisynn
