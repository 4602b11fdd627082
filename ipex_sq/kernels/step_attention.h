// Attention of one token over those before it: keys and values are read once, as they lie, by the
// instructions that multiply bf16. There is nothing to bring into another order for brgemm.

#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "softmax.h"

namespace ipex_sq {

constexpr int64_t kAtOnce = 4; // heads whose products with one pair of values are summed together

inline __m512bh as_bf16(__m512i x) {
  return reinterpret_cast<__m512bh&>(x);
}

inline __m512bh load_bf16(const BFloat16* from, __mmask32 mask) {
  return as_bf16(_mm512_maskz_loadu_epi16(mask, from));
}

// The sums of 16 registers, in turn. Halves of pairs are added until one register is left.
inline __m512 sum_each(__m512* x) {
#pragma GCC unroll 8
  for (int64_t n = 0; n < 8; ++n) {
    x[n] = _mm512_add_ps(_mm512_unpacklo_ps(x[2 * n], x[2 * n + 1]), _mm512_unpackhi_ps(x[2 * n], x[2 * n + 1]));
  }
#pragma GCC unroll 4
  for (int64_t n = 0; n < 4; ++n) {
    const __m512d even = _mm512_castps_pd(x[2 * n]), odd = _mm512_castps_pd(x[2 * n + 1]);
    x[n] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(even, odd)), _mm512_castpd_ps(_mm512_unpackhi_pd(even, odd)));
  }
#pragma GCC unroll 2
  for (int64_t left = 2; left > 0; left /= 2) {
#pragma GCC unroll 2
    for (int64_t n = 0; n < left; ++n) {
      x[n] = _mm512_add_ps(_mm512_shuffle_f32x4(x[2 * n], x[2 * n + 1], 0x88),
                           _mm512_shuffle_f32x4(x[2 * n], x[2 * n + 1], 0xdd));
    }
  }
  return x[0];
}

// Scores of one query with 16 keys `stride` apart, of which `count` are there.
inline __m512 scores_of(const BFloat16* query, const BFloat16* keys, int64_t stride, int64_t count, int64_t size) {
  __m512 sums[kVector];
#pragma GCC unroll 16
  for (int64_t k = 0; k < kVector; ++k) sums[k] = _mm512_setzero_ps();
  for (int64_t n = 0; n < size; n += kKeys) {
    const __mmask32 mask = first_of(size - n);
    const __m512bh own = load_bf16(query + n, mask);
    const BFloat16* from = keys + n;
    if (count >= kVector) {
#pragma GCC unroll 16
      for (int64_t k = 0; k < kVector; ++k, from += stride) {
        sums[k] = _mm512_dpbf16_ps(sums[k], own, load_bf16(from, mask));
      }
    } else {
#pragma GCC unroll 16
      for (int64_t k = 0; k < kVector; ++k, from += stride) {
        sums[k] = _mm512_dpbf16_ps(sums[k], own, load_bf16(from, k < count ? mask : 0));
      }
    }
  }
  return sum_each(sums);
}

// Memory takes longer than the products: rows are asked for while those before them are summed.
inline void fetch(const BFloat16* rows, int64_t stride, int64_t count, int64_t size) {
  for (int64_t k = 0; k < count; ++k) {
    for (int64_t n = 0; n < size; n += kKeys) _mm_prefetch(reinterpret_cast<const char*>(rows + k * stride + n), _MM_HINT_T1);
  }
}

struct StepAttention {
  const at::Tensor& query; // [batch, heads, 1, size]
  const at::Tensor& key;   // [batch, groups, keys, size]
  const at::Tensor& value;
  const Bias& bias;
  int64_t keys; // how many of them are seen
  float scale;
  BFloat16* output; // [batch, 1, heads, size]
  float* largest; // [batch, heads, 1]
  float* sums;

  void run() const {
    const int64_t heads = query.size(1), groups = key.size(1);
    // Heads that share keys read them together, unless that left threads without work.
    const bool together = query.size(0) * groups >= 2 * at::get_num_threads();
    const int64_t share = together ? heads / groups : 1;
    at::parallel_for(0, query.size(0) * heads / share, 1, [&](int64_t begin, int64_t end) {
      Scratch scratch(*this, share);
      for (int64_t task = begin; task < end; ++task) {
        attend(scratch, task * share, share, std::min(task + 1, end - 1) * share);
      }
    });
  }

 private:
  struct Scratch {
    Scratch(const StepAttention& of, int64_t share)
        : width(blocks_of(of.keys, kKeys) * kKeys),
          scores(share * width),
          bias(of.bias ? width : 0),
          weights(share * width) {}

    int64_t width; // of a row of scores: the keys, filled up
    std::vector<float> scores, bias;
    std::vector<BFloat16> weights;
  };

  static const BFloat16* at(const at::Tensor& x, int64_t text, int64_t head) {
    return x.const_data_ptr<BFloat16>() + text * x.stride(0) + head * x.stride(1);
  }

  // `share` heads from `first` of all texts on, which have the same keys; after them come those
  // from `next` on.
  void attend(Scratch& with, int64_t first, int64_t share, int64_t next) const {
    const int64_t heads = query.size(1), size = query.size(3);
    const int64_t text = first / heads;
    const int64_t group = first % heads / (heads / key.size(1));
    const BFloat16* from = at(key, text, group);
    const int64_t stride = key.stride(2);
    const int64_t next_group = next % heads / (heads / key.size(1));
    const BFloat16* next_keys = at(key, next / heads, next_group);
    const BFloat16* next_values = at(value, next / heads, next_group);
    for (int64_t n = 0; n < share; ++n) {
      const BFloat16* own = at(query, text, first % heads + n);
      float* scores = with.scores.data() + n * with.width;
      for (int64_t k = 0; k < keys; k += kVector) {
        const int64_t count = std::min(kVector, keys - k);
        if (n == 0) fetch(next_keys + k * stride, stride, count, size);
        if (n == std::min<int64_t>(1, share - 1)) fetch(next_values + k * value.stride(2), value.stride(2), count, size);
        const __m512 found = scores_of(own, from + k * stride, stride, count, size);
        _mm512_storeu_ps(scores + k, found);
      }
      if (bias) bias.row(text, first % heads + n, 0, keys, with.bias.data());
      const auto [top, sum] = softmax_row(scores, bias ? with.bias.data() : nullptr, scale * kLog2E, keys,
                                          with.width, kBlock, with.weights.data() + n * with.width);
      largest[first + n] = top / kLog2E;
      sums[first + n] = sum;
    }
    for (int64_t n = 0; n < share; n += kAtOnce) {
      const BFloat16* weights = with.weights.data() + n * with.width;
      for (int64_t at = 0; at < size; at += kKeys) {
        switch (std::min(kAtOnce, share - n)) {
          case 1: add_values<1>(weights, with.width, text, group, first + n, at); break;
          case 2: add_values<2>(weights, with.width, text, group, first + n, at); break;
          case 3: add_values<3>(weights, with.width, text, group, first + n, at); break;
          default: add_values<kAtOnce>(weights, with.width, text, group, first + n, at);
        }
      }
    }
  }

  // Of kCount heads from `first` on the outputs `from` to `from + 31`: two keys at a time.
  template <int64_t kCount>
  void add_values(const BFloat16* weights, int64_t width, int64_t text, int64_t group, int64_t first, int64_t from) const {
    const int64_t size = query.size(3), stride = value.stride(2);
    const __mmask32 mask = first_of(size - from);
    const BFloat16* values = at(value, text, group) + from;
    __m512 low[kCount], high[kCount];
    for (int64_t n = 0; n < kCount; ++n) low[n] = high[n] = _mm512_setzero_ps();
    for (int64_t k = 0; k < keys; k += 2) {
      const __m512i even = _mm512_maskz_loadu_epi16(mask, values + k * stride);
      const __m512i odd = _mm512_maskz_loadu_epi16(k + 1 < keys ? mask : 0, values + (k + 1) * stride);
      const __m512bh lower = as_bf16(_mm512_unpacklo_epi16(even, odd));
      const __m512bh upper = as_bf16(_mm512_unpackhi_epi16(even, odd));
      for (int64_t n = 0; n < kCount; ++n) {
        int32_t pair;
        std::memcpy(&pair, weights + n * width + k, sizeof(pair));
        const __m512bh both = as_bf16(_mm512_set1_epi32(pair));
        low[n] = _mm512_dpbf16_ps(low[n], lower, both);
        high[n] = _mm512_dpbf16_ps(high[n], upper, both);
      }
    }
    // Unpacking leaves four of eight values in each quarter of either register.
    const __m512i to_first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i to_second = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
    for (int64_t n = 0; n < kCount; ++n) {
      const __m512 factor = _mm512_set1_ps(1.0f / sums[first + n]);
      const __m512 front = _mm512_permutex2var_ps(low[n], to_first, high[n]);
      const __m512 back = _mm512_permutex2var_ps(low[n], to_second, high[n]);
      store(output + (first + n) * size + from, _mm512_mul_ps(front, factor), _mm512_mul_ps(back, factor), mask);
    }
  }
};

} // namespace ipex_sq
