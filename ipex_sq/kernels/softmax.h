// What attention over many tokens and over one have in common: the softmax of a row of scores, and
// what is added to them.

#pragma once

#include <ATen/ATen.h>

#include <immintrin.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <limits>
#include <optional>
#include <tuple>

#include "vectors.h"

namespace ipex_sq {

using at::BFloat16;

constexpr int64_t kKeys = 2 * kVector; // keys come in multiples of this: one register of bf16
constexpr int64_t kBlock = 64; // keys of one product
constexpr float kLog2E = 1.44269504f;
constexpr float kLeast = std::numeric_limits<float>::lowest() / 2;

inline int64_t blocks_of(int64_t n, int64_t size) {
  return (n + size - 1) / size;
}

inline __mmask32 first_of(int64_t n) {
  return n < kKeys ? (__mmask32(1) << n) - 1 : ~__mmask32(0);
}

// 2^(score * factor - top). The product is rounded as it is in `top`: the largest becomes 1 however
// large it is. Without a rounding in its name the compiler would make one operation of the two.
inline __m512 below(const float* scores, __m512 factor, __m512 top) {
  const __m512 scaled =
      _mm512_mul_round_ps(_mm512_loadu_ps(scores), factor, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  return exp2(_mm512_sub_ps(scaled, top));
}

inline void store(BFloat16* to, __m512 low, __m512 high, __mmask32 mask) {
  const __m512bh both = _mm512_cvtne2ps_pbh(high, low);
  _mm512_mask_storeu_epi16(to, mask, reinterpret_cast<const __m512i&>(both));
}

// One row of scores to weights that are not divided by their sum yet. Of `width` scores `valid`
// count; `bias`, in units of log 2, is added to those. `scale` takes scores to these units and is
// positive. Scores and weights lie in blocks of 64, each `jump` after the one before. Returns the
// largest in these units and the sum of the weights.
inline std::tuple<float, float> softmax_row(
    float* scores, const float* bias, float scale, int64_t valid, int64_t width, int64_t jump, BFloat16* weights) {
  const float none = -std::numeric_limits<float>::infinity();
  const int64_t end = width / kBlock * jump + width % kBlock;
  for (int64_t k = valid; k < width;) {
    const int64_t stop = std::min((k / kBlock + 1) * kBlock, width);
    float* block = scores + k / kBlock * (jump - kBlock);
    std::fill(block + k, block + stop, none);
    k = stop;
  }
  __m512 factor = _mm512_set1_ps(scale);
  __m512 largest = _mm512_set1_ps(none);
  for (int64_t block = 0; block < end; block += jump) {
    const int64_t stop = std::min(block + kBlock, end);
    for (int64_t k = block; k < stop; k += kVector) {
      __m512 score = _mm512_loadu_ps(scores + k);
      if (bias) {
        score = _mm512_fmadd_ps(score, factor, _mm512_loadu_ps(bias));
        bias += kVector;
        _mm512_storeu_ps(scores + k, score);
      }
      largest = _mm512_max_ps(largest, score);
    }
  }
  if (bias) factor = _mm512_set1_ps(1.0f);
  const float top = _mm512_reduce_max_ps(largest) * (bias ? 1.0f : scale);
  const __m512 most = _mm512_set1_ps(top);
  __m512 sum = _mm512_setzero_ps();
  for (int64_t block = 0; block < end; block += jump) {
    const int64_t stop = std::min(block + kBlock, end);
    for (int64_t k = block; k < stop; k += kKeys) {
      const __m512 low = below(scores + k, factor, most);
      const __m512 high = below(scores + k + kVector, factor, most);
      sum = _mm512_add_ps(sum, _mm512_add_ps(low, high));
      store(weights + k, low, high, ~__mmask32(0));
    }
  }
  return {top, _mm512_reduce_add_ps(sum)};
}

inline float wide(float x) {
  return x;
}

inline float wide(uint16_t bits_of_bf16) {
  const uint32_t bits = static_cast<uint32_t>(bits_of_bf16) << 16;
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

// In units of log 2, and finite, so that a row that is masked all over stays finite too.
template <typename T>
void read_bias(const T* from, int64_t stride, int64_t keys, float* to) {
  if (stride == 1) {
    for (int64_t k = 0; k < keys; ++k) to[k] = std::max(wide(from[k]) * kLog2E, kLeast);
  } else {
    for (int64_t k = 0; k < keys; ++k) to[k] = std::max(wide(from[k * stride]) * kLog2E, kLeast);
  }
}

// What is added to the scores: [batch, heads, tokens, keys], where 1 stands for all.
class Bias {
 public:
  // `sizes` are [batch, heads, tokens, keys].
  Bias(const std::optional<at::Tensor>& mask, const std::array<int64_t, 4>& sizes) {
    if (!mask) return;
    TORCH_CHECK(mask->dim() == 4, "the mask must have four dimensions");
    TORCH_CHECK(mask->scalar_type() != at::kBool, "the mask is added: it cannot be of truth values");
    for (size_t d = 0; d < sizes.size(); ++d) {
      TORCH_CHECK(mask->size(d) == sizes[d] || mask->size(d) == 1, "the mask and the scores differ in size");
    }
    const bool known = mask->scalar_type() == at::kBFloat16 || mask->scalar_type() == at::kFloat;
    mask_ = known ? *mask : mask->to(at::kFloat);
    for (int64_t d = 0; d < 4; ++d) strides_[d] = mask_.size(d) == 1 ? 0 : mask_.stride(d);
  }

  explicit operator bool() const { return mask_.defined(); }

  void row(int64_t batch, int64_t head, int64_t token, int64_t keys, float* to) const {
    const int64_t first = batch * strides_[0] + head * strides_[1] + token * strides_[2];
    if (mask_.scalar_type() == at::kFloat) {
      read_bias(mask_.const_data_ptr<float>() + first, strides_[3], keys, to);
    } else {
      const auto* bits = reinterpret_cast<const uint16_t*>(mask_.const_data_ptr<BFloat16>());
      read_bias(bits + first, strides_[3], keys, to);
    }
  }

 private:
  at::Tensor mask_;
  int64_t strides_[4] = {};
};

} // namespace ipex_sq
