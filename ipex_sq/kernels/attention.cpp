// Attention over few tokens in bf16: both products on oneDNN's brgemm, and the softmax between them
// on scores that have not left the core's cache. Causal rows skip the keys that come after them.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/native/CPUBlas.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <tuple>
#include <vector>

#ifdef __AVX512BF16__ // without, brgemm does not multiply bf16 either

#include "softmax.h"
#include "step_attention.h"

namespace {

using namespace ipex_sq;
using at::native::cpublas::brgemm;

constexpr int64_t kRows = 64; // most queries of one product

// [batch, heads, tokens, size] with the last dimension dense and pairs that can be read as words.
at::Tensor readable(const at::Tensor& x) {
  const auto strides = x.strides();
  const bool even = std::all_of(strides.begin(), strides.end() - 1, [](int64_t s) { return s % 2 == 0; });
  return strides.back() == 1 && even ? x : x.contiguous();
}

// Keys [keys, size] to the words [size / 2, width] that brgemm reads; columns past `keys` are 0.
void pack_keys(const BFloat16* from, int64_t stride, int64_t keys, int64_t size, int64_t width, uint32_t* to) {
  const auto* words = reinterpret_cast<const uint32_t*>(from);
  const int64_t row = stride / 2;
  const int64_t pairs = size / 2;
  int64_t key = 0;
  for (; key + kVector <= keys && pairs % kVector == 0; key += kVector) {
    for (int64_t pair = 0; pair < pairs; pair += kVector) {
      at::vec::transpose_mxn<float, kVector, kVector>(
          reinterpret_cast<const float*>(words + key * row + pair), row,
          reinterpret_cast<float*>(to + pair * width + key), width);
    }
  }
  for (int64_t pair = 0; pair < pairs; ++pair) {
    for (int64_t k = key; k < keys; ++k) to[pair * width + k] = words[k * row + pair];
    std::fill(to + pair * width + keys, to + (pair + 1) * width, 0);
  }
}

// Two rows of values to words. A function of its own: inside a loop nest it is not vectorized.
void interleave(const uint16_t* even, const uint16_t* odd, int64_t size, uint32_t* to) {
  for (int64_t n = 0; n < size; ++n) {
    to[n] = static_cast<uint32_t>(even[n]) | static_cast<uint32_t>(odd[n]) << 16;
  }
}

// Values [keys, size] to the words [width / 2, size]; rows past `keys` are 0.
void pack_values(const BFloat16* from, int64_t stride, int64_t keys, int64_t size, int64_t width, uint32_t* to) {
  const auto* bits = reinterpret_cast<const uint16_t*>(from);
  const std::vector<uint16_t> none(size, 0);
  for (int64_t key = 0; key < width; key += 2) {
    const uint16_t* even = key < keys ? bits + key * stride : none.data();
    const uint16_t* odd = key + 1 < keys ? bits + (key + 1) * stride : none.data();
    interleave(even, odd, size, to + key / 2 * size);
  }
}

void scaled_row(const float* from, float scale, int64_t size, BFloat16* to) {
  const __m512 factor = _mm512_set1_ps(scale);
  for (int64_t n = 0; n < size; n += kKeys) {
    const __mmask32 mask = first_of(size - n);
    const __m512 low = _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), from + n);
    const __m512 high = _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask >> kVector), from + n + kVector);
    store(to + n, _mm512_mul_ps(low, factor), _mm512_mul_ps(high, factor), mask);
  }
}

struct Attention {
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
    const int64_t blocks = blocks_of(tokens, kRows);
    const int64_t rows = blocks_of(tokens, blocks); // of a block: all but the last are as large
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
    Scratch(const Attention& of, int64_t rows)
        : width(blocks_of(of.key.size(2), kKeys) * kKeys),
          keys(of.key.size(3) / 2 * width),
          values(width / 2 * of.key.size(3)),
          scores(rows * width),
          bias(of.bias ? width : 0),
          products(rows * of.key.size(3)),
          weights(rows * width) {}

    void pack(const Attention& of, int64_t group) {
      const int64_t text = group / of.key.size(1), head = group % of.key.size(1);
      const auto at = [&](const at::Tensor& x) {
        return x.const_data_ptr<BFloat16>() + text * x.stride(0) + head * x.stride(1);
      };
      const int64_t count = of.key.size(2), size = of.key.size(3);
      pack_keys(at(of.key), of.key.stride(2), count, size, width, keys.data());
      pack_values(at(of.value), of.value.stride(2), count, size, width, values.data());
    }

    int64_t width; // of a row of scores: the keys, filled up
    std::vector<uint32_t> keys, values;
    std::vector<float> scores, bias, products;
    std::vector<BFloat16> weights;
  };

  void block(Scratch& with, int64_t head, int64_t first, int64_t rows) const {
    const int64_t heads = query.size(1), tokens = query.size(2), size = query.size(3);
    const int64_t text = head / heads, own = head % heads;
    const int64_t keys = key.size(2);
    const int64_t seen = causal ? std::min(keys, first + rows) : keys;
    const int64_t width = blocks_of(seen, kKeys) * kKeys; // of what these rows need
    const BFloat16* from = query.const_data_ptr<BFloat16>() + text * query.stride(0) + own * query.stride(1);
    brgemm(rows, width, size, query.stride(2), with.width, width, false, from + first * query.stride(2),
           reinterpret_cast<const BFloat16*>(with.keys.data()), with.scores.data());
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t token = first + row;
      const int64_t valid = causal ? std::min(keys, token + 1) : keys;
      if (bias) bias.row(text, own, token, valid, with.bias.data());
      const auto [top, sum] = softmax_row(with.scores.data() + row * width, bias ? with.bias.data() : nullptr,
                                          scale * kLog2E, valid, width, with.weights.data() + row * width);
      largest[head * tokens + token] = top / kLog2E;
      sums[head * tokens + token] = sum;
    }
    brgemm(rows, size, width, width, size, size, false, with.weights.data(),
           reinterpret_cast<const BFloat16*>(with.values.data()), with.products.data());
    for (int64_t row = 0; row < rows; ++row) {
      BFloat16* to = output + ((text * tokens + first + row) * heads + own) * size;
      const float sum = sums[head * tokens + first + row];
      scaled_row(with.products.data() + row * size, 1.0f / sum, size, to);
    }
  }
};

// query [batch, heads, tokens, size], key and value [batch, groups, keys, size] bf16, size even;
// mask [batch or 1, heads or 1, tokens or 1, keys or 1] is added to the scaled scores, scale > 0.
// Returns [batch, heads, tokens, size], in memory with heads inside tokens, and of the scores of
// each row [batch, heads, tokens] fp32 the largest and the sum of exp(score - largest).
std::tuple<at::Tensor, at::Tensor, at::Tensor> short_attention(
    const at::Tensor& query,
    const at::Tensor& key,
    const at::Tensor& value,
    const std::optional<at::Tensor>& mask,
    bool causal,
    double scale) {
  const int64_t batch = query.size(0), heads = query.size(1), tokens = query.size(2), size = query.size(3);
  TORCH_CHECK(size % 2 == 0 && scale > 0, "an even size and a positive scale are needed");
  TORCH_CHECK(key.sizes() == value.sizes() && key.size(3) == size && heads % key.size(1) == 0,
              "keys, values and queries do not fit together");
  const at::Tensor q = readable(query), k = readable(key), v = readable(value);
  auto output = at::empty({batch, tokens, heads, size}, query.options());
  auto largest = at::empty({batch, heads, tokens}, query.options().dtype(at::kFloat));
  auto sums = at::empty_like(largest);
  if (query.numel() == 0) return {output.transpose(1, 2), largest, sums};
  const Bias bias(mask);
  const float factor = static_cast<float>(scale);
  BFloat16* to = output.mutable_data_ptr<BFloat16>();
  float* tops = largest.mutable_data_ptr<float>();
  float* totals = sums.mutable_data_ptr<float>();
  if (tokens == 1) {
    // The one token sees the first key alone if it is to see those up to its own place.
    const int64_t keys = causal ? std::min<int64_t>(1, k.size(2)) : k.size(2);
    StepAttention{q, k, v, bias, keys, factor, to, tops, totals}.run();
  } else {
    Attention{q, k, v, bias, causal, factor, to, tops, totals}.run();
  }
  return {output.transpose(1, 2), largest, sums};
}

// A mode of PyTorch's dispatcher that nothing in PyTorch uses: of an extension that is no more.
constexpr auto kMode = c10::DispatchKey::DeferredInit;

thread_local int64_t most_tokens = 0;

// From now on this thread's attention of up to `most` tokens is `short_attention`, without its models'
// code being changed; 0 ends it. It has no gradients.
void replace_attention(int64_t most) {
  most_tokens = most;
  c10::impl::tls_set_dispatch_key_included(kMode, most > 0);
}

// In the place of PyTorch's operator of that name, in the mode.
std::tuple<at::Tensor, at::Tensor> attention_in_mode(
    const at::Tensor& query,
    const at::Tensor& key,
    const at::Tensor& value,
    double dropout_p,
    bool causal,
    const std::optional<at::Tensor>& mask,
    std::optional<double> scale) {
  const c10::impl::ExcludeDispatchKeyGuard outside(kMode);
  const int64_t size = query.size(3);
  const double factor = scale.value_or(1 / std::sqrt(static_cast<double>(size)));
  const bool few = query.size(2) == 1 || std::max(query.size(2), key.size(2)) <= most_tokens;
  const bool suits = query.scalar_type() == at::kBFloat16 && dropout_p == 0 && size % 2 == 0 && factor > 0;
  if (!few || !suits) {
    return at::_scaled_dot_product_flash_attention_for_cpu(query, key, value, dropout_p, causal, mask, scale);
  }
  std::optional<at::Tensor> added = mask;
  while (added && added->dim() < 4) added = added->unsqueeze(0);
  const auto [output, largest, sums] = short_attention(query, key, value, added, causal, factor);
  return {output, largest + sums.log()};
}

} // namespace

TORCH_LIBRARY_IMPL(_, DeferredInit, library) {
  library.fallback(torch::CppFunction::makeFallthrough());
}

TORCH_LIBRARY_IMPL(aten, DeferredInit, library) {
  library.impl("_scaled_dot_product_flash_attention_for_cpu", attention_in_mode);
}

#endif

TORCH_LIBRARY_FRAGMENT(ipex_sq, library) {
  library.def(
      "short_attention(Tensor query, Tensor key, Tensor value, Tensor? mask, bool causal, "
      "float scale) -> (Tensor, Tensor, Tensor)");
#ifdef __AVX512BF16__
  library.impl("short_attention", torch::dispatch(c10::DispatchKey::CPU, short_attention));
  library.def("replace_attention(int most_tokens) -> ()", replace_attention);
#endif
}
