// Activations between two Linears.

#pragma once

#include <immintrin.h>

#include <string_view>

#include "vectors.h"

namespace ipex_sq {

struct Relu {
  // In this order NaN stays.
  __m512 operator()(__m512 x) const { return _mm512_max_ps(_mm512_setzero_ps(), x); }
};

// x * sigmoid(x * R(x^2)). `terms` are those of -log2(e) * R, the highest power first; from `most` on
// x^2 counts as `most`.
template <int kTerms>
struct Sigmoid {
  float terms[kTerms];
  float most;

  __m512 operator()(__m512 x) const {
    const __m512 square = _mm512_min_ps(_mm512_mul_ps(x, x), _mm512_set1_ps(most));
    __m512 power = _mm512_set1_ps(terms[0]);
    for (int n = 1; n < kTerms; ++n) power = _mm512_fmadd_ps(power, square, _mm512_set1_ps(terms[n]));
    return _mm512_div_ps(x, _mm512_add_ps(_mm512_set1_ps(1.0f), exp2(_mm512_mul_ps(x, power))));
  }
};

constexpr Sigmoid<1> kSilu{{-1.44269504f}, 1e30f};

// With tanh: 0.5 (1 + tanh y) = sigmoid(2 y), and y = sqrt(2 / pi) (x + 0.044715 x^3).
constexpr Sigmoid<2> kGeluTanh{{-0.10294324f, -2.3022082f}, 1e6f};

// With erf, to 3e-6: R was fitted to log(p / (1 - p)) / x, p the normal distribution, by least squares
// with weights that even out the largest errors, for x up to 5.
constexpr Sigmoid<5> kGelu{{-3.2289963e-6f, 8.8238262e-5f, 3.6027389e-4f, -0.10522669f, -2.3020454f}, 25.0f};

// Calls then(activation) with the one of that name; returns whether there is one.
template <typename Then>
bool with_activation(std::string_view name, const Then& then) {
  if (name == "relu") {
    then(Relu{});
  } else if (name == "silu") {
    then(kSilu);
  } else if (name == "gelu_tanh") {
    then(kGeluTanh);
  } else if (name == "gelu") {
    then(kGelu);
  } else {
    return false;
  }
  return true;
}

} // namespace ipex_sq
