// Attention of many tokens: both products on oneDNN's brgemm, and the softmax between them on scores
// that have not left the core's cache. Causal rows skip the keys that come after them.
//
// PyTorch makes a kernel of brgemm for every shape that it is called with, and each thread keeps its
// own for good. So that prompts of any length share a few, products are of 64 or 32 keys with rows in
// multiples of 16, and all that they read and write has rows of a fixed length: scores and weights lie
// in blocks [rows, 64 keys], one after the other.

#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/native/CPUBlas.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "softmax.h"

namespace ipex_sq {

constexpr int64_t kMostRows = 64; // queries of one product
constexpr int64_t kRowStep = 16; // they come in multiples of this

// Keys [keys, size] to the words that brgemm reads, a block [size / 2, 64] for each 64; those past
// `keys` are 0 up to `width`.
inline void pack_keys(const BFloat16* from, int64_t stride, int64_t keys, int64_t size, int64_t width, uint32_t* to) {
  const auto* words = reinterpret_cast<const uint32_t*>(from);
  const int64_t row = stride / 2;
  const int64_t pairs = size / 2;
  for (int64_t key = 0; key < width; key += kVector) {
    const uint32_t* own = words + key * row;
    uint32_t* place = to + key / kBlock * kBlock * pairs + key % kBlock;
    if (key + kVector <= keys && pairs % kVector == 0) {
      for (int64_t pair = 0; pair < pairs; pair += kVector) {
        at::vec::transpose_mxn<float, kVector, kVector>(
            reinterpret_cast<const float*>(own + pair), row, reinterpret_cast<float*>(place + pair * kBlock), kBlock);
      }
    } else {
      const int64_t count = std::clamp<int64_t>(keys - key, 0, kVector);
      for (int64_t pair = 0; pair < pairs; ++pair) {
        for (int64_t k = 0; k < kVector; ++k) place[pair * kBlock + k] = k < count ? own[k * row + pair] : 0;
      }
    }
  }
}

// Two rows of values to words. A function of its own: inside a loop nest it is not vectorized.
inline void interleave(const uint16_t* even, const uint16_t* odd, int64_t size, uint32_t* to) {
  for (int64_t n = 0; n < size; ++n) {
    to[n] = static_cast<uint32_t>(even[n]) | static_cast<uint32_t>(odd[n]) << 16;
  }
}

// Values [keys, size] to the words [width / 2, size]; rows past `keys` are 0.
inline void pack_values(const BFloat16* from, int64_t stride, int64_t keys, int64_t size, int64_t width, uint32_t* to) {
  const auto* bits = reinterpret_cast<const uint16_t*>(from);
  const std::vector<uint16_t> none(size, 0);
  for (int64_t key = 0; key < width; key += 2) {
    const uint16_t* even = key < keys ? bits + key * stride : none.data();
    const uint16_t* odd = key + 1 < keys ? bits + (key + 1) * stride : none.data();
    interleave(even, odd, size, to + key / 2 * size);
  }
}

// Rows `stride` apart to rows without gaps. Calls of memcpy for each took a twentieth of the attention.
inline void copy_rows(const BFloat16* from, int64_t stride, int64_t rows, int64_t size, BFloat16* to) {
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t n = 0; n < size; n += kKeys) {
      const __mmask32 mask = first_of(size - n);
      _mm512_mask_storeu_epi16(to + row * size + n, mask, _mm512_maskz_loadu_epi16(mask, from + row * stride + n));
    }
  }
}

inline void scaled_row(const float* from, float scale, int64_t size, BFloat16* to) {
  const __m512 factor = _mm512_set1_ps(scale);
  for (int64_t n = 0; n < size; n += kKeys) {
    const __mmask32 mask = first_of(size - n);
    const __m512 low = _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), from + n);
    const __m512 high = _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask >> kVector), from + n + kVector);
    store(to + n, _mm512_mul_ps(low, factor), _mm512_mul_ps(high, factor), mask);
  }
}

struct PromptAttention {
  const at::Tensor& query; // [batch, heads, tokens, size]
  const at::Tensor& key;   // [batch, groups, keys, size]
  const at::Tensor& value;
  const Bias& bias;
  bool causal;
  float scale;
  BFloat16* output; // [batch, tokens, heads, size]
  float* largest; // [batch, heads, tokens]
  float* sums;

  void run() const {
    const int64_t tokens = query.size(2);
    const int64_t blocks = blocks_of(tokens, kMostRows);
    // Of a block: all but the last are as large.
    const int64_t rows = blocks_of(blocks_of(tokens, blocks), kRowStep) * kRowStep;
    at::parallel_for(0, query.size(0) * query.size(1) * blocks, 1, [&](int64_t begin, int64_t end) {
      Scratch scratch(*this, rows);
      int64_t packed = -1;
      for (int64_t task = begin; task < end; ++task) {
        const int64_t head = task / blocks; // of all texts
        const int64_t group = head / (query.size(1) / key.size(1));
        if (group != packed) scratch.pack(*this, group);
        packed = group;
        const int64_t first = task % blocks * rows;
        if (first < tokens) block(scratch, head, first, std::min(rows, tokens - first));
      }
      at::native::cpublas::brgemm_release();
    });
  }

 private:
  struct Scratch {
    Scratch(const PromptAttention& of, int64_t rows)
        : width(blocks_of(of.key.size(2), kKeys) * kKeys),
          keys(of.key.size(3) / 2 * blocks_of(width, kBlock) * kBlock),
          values(width / 2 * of.key.size(3)),
          queries(rows * of.key.size(3)),
          scores(rows * blocks_of(width, kBlock) * kBlock),
          bias(of.bias ? width : 0),
          products(rows * of.key.size(3)),
          weights(scores.size()) {}

    void pack(const PromptAttention& of, int64_t group) {
      const int64_t text = group / of.key.size(1), head = group % of.key.size(1);
      const auto at = [&](const at::Tensor& x) {
        return x.const_data_ptr<BFloat16>() + text * x.stride(0) + head * x.stride(1);
      };
      const int64_t count = of.key.size(2), size = of.key.size(3);
      pack_keys(at(of.key), of.key.stride(2), count, size, width, keys.data());
      pack_values(at(of.value), of.value.stride(2), count, size, width, values.data());
    }

    int64_t width; // the keys, filled up
    std::vector<uint32_t> keys, values;
    std::vector<BFloat16> queries;
    std::vector<float> scores, bias, products;
    std::vector<BFloat16> weights;
  };

  void block(Scratch& with, int64_t head, int64_t first, int64_t rows) const {
    const int64_t heads = query.size(1), tokens = query.size(2), size = query.size(3);
    const int64_t text = head / heads, own = head % heads;
    const int64_t keys = key.size(2);
    const int64_t seen = causal ? std::min(keys, first + rows) : keys;
    const int64_t width = blocks_of(seen, kKeys) * kKeys; // of what these rows need
    const int64_t whole = blocks_of(rows, kRowStep) * kRowStep; // what comes after `rows` is not read
    const BFloat16* from = query.const_data_ptr<BFloat16>() + text * query.stride(0) + own * query.stride(1);
    copy_rows(from + first * query.stride(2), query.stride(2), rows, size, with.queries.data());
    for (int64_t k = 0; k < width; k += kBlock) {
      at::native::cpublas::brgemm(
          whole, std::min(kBlock, width - k), size, size, kBlock, kBlock, false, with.queries.data(),
          reinterpret_cast<const BFloat16*>(with.keys.data() + k * size / 2), with.scores.data() + k * whole);
    }
    const int64_t jump = whole * kBlock;
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t token = first + row;
      const int64_t valid = causal ? std::min(keys, token + 1) : keys;
      if (bias) bias.row(text, own, token, valid, with.bias.data());
      const auto [top, sum] = softmax_row(with.scores.data() + row * kBlock, bias ? with.bias.data() : nullptr,
                                          scale * kLog2E, valid, width, jump, with.weights.data() + row * kBlock);
      largest[head * tokens + token] = top / kLog2E;
      sums[head * tokens + token] = sum;
    }
    for (int64_t k = 0; k < width; k += kBlock) {
      at::native::cpublas::brgemm(
          whole, size, std::min(kBlock, width - k), kBlock, size, size, k > 0, with.weights.data() + k * whole,
          reinterpret_cast<const BFloat16*>(with.values.data() + k * size / 2), with.products.data());
    }
    for (int64_t row = 0; row < rows; ++row) {
      BFloat16* to = output + ((text * tokens + first + row) * heads + own) * size;
      const float sum = sums[head * tokens + first + row];
      scaled_row(with.products.data() + row * size, 1.0f / sum, size, to);
    }
  }
};

} // namespace ipex_sq
