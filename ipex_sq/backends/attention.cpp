// Attention over few tokens in bf16: both products on oneDNN's brgemm, and the softmax between them
// on scores that have not left the core's cache. Causal rows skip the keys that come after them.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/native/CPUBlas.h>
#include <torch/library.h>

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <tuple>
#include <vector>

#ifdef __AVX512BF16__ // without, brgemm does not multiply bf16 either

namespace {

using at::BFloat16;
using at::native::cpublas::brgemm;

constexpr int64_t kRows = 64; // most queries of one product
constexpr int64_t kVector = 16; // fp32 in a register
constexpr int64_t kKeys = 2 * kVector; // keys come in multiples of this: one register of bf16
constexpr float kLog2E = 1.44269504f;
constexpr float kLeast = std::numeric_limits<float>::lowest() / 2;

int64_t blocks_of(int64_t n, int64_t size) {
  return (n + size - 1) / size;
}

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

// 2^x to 3e-6 of itself, of which bf16 keeps 4e-3; below 2^-120 it is 0, and NaN stays. Numbers that
// are too small to be normal would cost a hundred times as much.
__m512 exp2(__m512 x) {
  const __mmask16 some = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-120.0f), _CMP_NLT_UQ);
  const __m512 whole = _mm512_maskz_roundscale_ps(some, x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 part = _mm512_maskz_sub_ps(some, x, whole); // -0.5 to 0.5
  __m512 y = _mm512_set1_ps(9.58276e-3f);
  y = _mm512_fmadd_ps(y, part, _mm512_set1_ps(5.590643e-2f));
  y = _mm512_fmadd_ps(y, part, _mm512_set1_ps(2.4024101e-1f));
  y = _mm512_fmadd_ps(y, part, _mm512_set1_ps(6.9312419e-1f));
  y = _mm512_fmadd_ps(y, part, _mm512_set1_ps(1.0f));
  return _mm512_maskz_scalef_ps(some, y, whole);
}

// 2^(score * factor - top). The product is rounded as it is in `top`: the largest becomes 1 however
// large it is. Without a rounding in its name the compiler would make one operation of the two.
__m512 below(const float* scores, __m512 factor, __m512 top) {
  const __m512 scaled =
      _mm512_mul_round_ps(_mm512_loadu_ps(scores), factor, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  return exp2(_mm512_sub_ps(scaled, top));
}

void store(BFloat16* to, __m512 low, __m512 high, __mmask32 mask) {
  const __m512bh both = _mm512_cvtne2ps_pbh(high, low);
  _mm512_mask_storeu_epi16(to, mask, reinterpret_cast<const __m512i&>(both));
}

// One row of scores to weights that are not divided by their sum yet. Of `width` scores `valid`
// count; `bias`, in units of log 2, is added to those. `scale` takes scores to these units and is
// positive. Returns the largest in these units and the sum of the weights.
std::tuple<float, float> softmax_row(float* scores, const float* bias, float scale, int64_t valid, int64_t width, BFloat16* weights) {
  const float none = -std::numeric_limits<float>::infinity();
  std::fill(scores + valid, scores + width, none);
  __m512 factor = _mm512_set1_ps(scale);
  __m512 largest = _mm512_set1_ps(none);
  for (int64_t k = 0; k < width; k += kVector) {
    __m512 score = _mm512_loadu_ps(scores + k);
    if (bias) {
      score = _mm512_fmadd_ps(score, factor, _mm512_loadu_ps(bias + k));
      _mm512_storeu_ps(scores + k, score);
    }
    largest = _mm512_max_ps(largest, score);
  }
  if (bias) factor = _mm512_set1_ps(1.0f);
  const float top = _mm512_reduce_max_ps(largest) * (bias ? 1.0f : scale);
  const __m512 most = _mm512_set1_ps(top);
  __m512 sum = _mm512_setzero_ps();
  for (int64_t k = 0; k < width; k += kKeys) {
    const __m512 low = below(scores + k, factor, most);
    const __m512 high = below(scores + k + kVector, factor, most);
    sum = _mm512_add_ps(sum, _mm512_add_ps(low, high));
    store(weights + k, low, high, ~__mmask32(0));
  }
  return {top, _mm512_reduce_add_ps(sum)};
}

void scaled_row(const float* from, float scale, int64_t size, BFloat16* to) {
  const __m512 factor = _mm512_set1_ps(scale);
  for (int64_t n = 0; n < size; n += kKeys) {
    const __mmask32 mask = size - n < kKeys ? (__mmask32(1) << (size - n)) - 1 : ~__mmask32(0);
    const __m512 low = _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), from + n);
    const __m512 high = _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask >> kVector), from + n + kVector);
    store(to + n, _mm512_mul_ps(low, factor), _mm512_mul_ps(high, factor), mask);
  }
}

float wide(float x) {
  return x;
}

float wide(uint16_t bits_of_bf16) {
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
  explicit Bias(const std::optional<at::Tensor>& mask) {
    if (!mask) return;
    TORCH_CHECK(mask->dim() == 4, "the mask must have four dimensions");
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
  Attention{q, k, v, bias, causal, static_cast<float>(scale), output.mutable_data_ptr<BFloat16>(),
            largest.mutable_data_ptr<float>(), sums.mutable_data_ptr<float>()}.run();
  return {output.transpose(1, 2), largest, sums};
}

} // namespace

#endif

TORCH_LIBRARY_FRAGMENT(ipex_sq, library) {
  library.def(
      "short_attention(Tensor query, Tensor key, Tensor value, Tensor? mask, bool causal, "
      "float scale) -> (Tensor, Tensor, Tensor)");
#ifdef __AVX512BF16__
  library.impl("short_attention", torch::dispatch(c10::DispatchKey::CPU, short_attention));
#endif
}
