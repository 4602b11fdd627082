// Linears that torch has no good operator for, on oneDNN's brgemm kernels, which torch exports to
// C++ alone: int8 products of a few rows or with a scale for each row, and fp32 logits from bf16.
//
// brgemm multiplies A [M, K] with a tile of B in the layout of the dot-product instructions: pairs
// of bf16, or fours of int8, that one instruction adds up stand next to each other.

#include <ATen/ATen.h>
#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/native/CPUBlas.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "int8_product.h"

namespace {

using namespace ipex_sq;
using at::native::cpublas::brgemm;

constexpr int64_t kFewRows = 32;  // from here on it pays to bring the weight into B's layout
constexpr int64_t kWidened = 4096; // rows of a weight in fp32 at a time

// One of the weights that the same levels are multiplied with, and its output of the type that was
// asked for.
struct Product {
  Int8Weight weight;
  void* out;
};

template <typename T>
void int8_tiles(const at::Tensor& levels, const std::vector<Product>& products) {
  const int64_t in_features = levels.size(-1);
  const int64_t rows = levels.numel() / in_features;
  const uint8_t* x = levels.const_data_ptr<uint8_t>();
  std::vector<std::pair<const Product*, int64_t>> tiles; // and their first columns
  bool stream = !products.empty();
  for (const auto& product : products) {
    const Int8Weight& weight = product.weight;
    for (int64_t n = 0; n < weight.tiles(); ++n) tiles.emplace_back(&product, n * kTile);
    stream = stream && streams(static_cast<const T*>(product.out), rows, weight.out_features);
  }
  over_tiles(tiles.size(), rows, 1, [&](int64_t tile, Rows block, int32_t* sums) {
    const auto& [product, first] = tiles[tile];
    const Int8Weight& weight = product->weight;
    weight.sum(x, in_features, block, first, sums);
    const int64_t columns = weight.columns(first);
    const TileScaling scale(weight.scaling, first, columns);
    T* to = static_cast<T*>(product->out) + block.first * weight.out_features + first;
    Floats outputs[kVectors];
    for (int64_t r = 0; r < block.count; ++r) {
      scale(sums + r * kTile, block.first + r, outputs);
      write_row(to + r * weight.out_features, outputs, columns, stream);
    }
  });
}

// levels [..., in] uint8; input_scale one fp32 number or [..., 1]; of each of the weights packed
// [out / 64, in / 4, 64, 4] int8, its rows' sums [out] int32, scale and bias [out] fp32; returns for
// each [..., out] fp32 or bf16.
std::vector<at::Tensor> int8_rows_together(
    const at::Tensor& levels,
    const at::Tensor& input_scale,
    const at::Tensor& input_zero_point,
    at::TensorList packed,
    at::TensorList weight_sums,
    at::TensorList weight_scales,
    const c10::List<std::optional<at::Tensor>>& biases,
    at::ScalarType dtype) {
  TORCH_CHECK(dtype == at::kFloat || dtype == at::kBFloat16, "outputs are fp32 or bf16, not ", dtype);
  std::vector<at::Tensor> outputs;
  std::vector<Product> products;
  for (const auto& weight : int8_weights(levels, input_scale, input_zero_point, packed, weight_sums, weight_scales, biases)) {
    outputs.push_back(empty_output(levels, weight.out_features, dtype));
    products.push_back({weight, outputs.back().mutable_data_ptr()});
  }
  if (dtype == at::kBFloat16) {
    int8_tiles<BFloat16>(levels, products);
  } else {
    int8_tiles<float>(levels, products);
  }
  return outputs;
}

// `int8_rows_together` of one weight. An operator of its own: torch.jit.trace, by which IPEX lowers a
// model, takes no list of optional tensors.
at::Tensor int8_rows(
    const at::Tensor& levels,
    const at::Tensor& input_scale,
    const at::Tensor& input_zero_point,
    const at::Tensor& packed,
    const at::Tensor& weight_sums,
    const at::Tensor& weight_scale,
    const std::optional<at::Tensor>& bias,
    at::ScalarType dtype) {
  c10::List<std::optional<at::Tensor>> biases;
  biases.push_back(bias);
  return int8_rows_together(
      levels, input_scale, input_zero_point, packed, weight_sums, weight_scale, biases, dtype)[0];
}

// One row of logits reads the weight once, as it is. A function of its own: inside a lambda the
// compiler does not vectorize it. w holds the bits of bf16.
float dot(const float* x, const uint16_t* w, int64_t size) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t k = 0; k < size; ++k) {
    const uint32_t bits = static_cast<uint32_t>(w[k]) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    sum += x[k] * value;
  }
  return sum;
}

struct Logits {
  const BFloat16* x;      // [rows, in_features]
  const BFloat16* weight; // [out_features, in_features]
  float* out;             // [rows, out_features]
  int64_t rows, in_features, out_features;

  int64_t pairs() const { return in_features / 2; }

  void of_one_row() const {
    std::vector<float> wide(x, x + in_features);
    const auto* bits = reinterpret_cast<const uint16_t*>(weight);
    at::parallel_for(0, out_features, kTile, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        out[n] = dot(wide.data(), bits + n * in_features, in_features);
      }
    });
  }

  // The product transposed: the weight is A and the few rows are B.
  void of_few_rows() const {
    const int64_t wide = (rows + kVector - 1) / kVector * kVector;
    std::vector<uint32_t> packed(pairs() * wide, 0);
    const auto* words = reinterpret_cast<const uint32_t*>(x);
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t k = 0; k < pairs(); ++k) packed[k * wide + row] = words[row * pairs() + k];
    }
    const auto* b = reinterpret_cast<const BFloat16*>(packed.data());
    const int64_t tiles = (out_features + kTile - 1) / kTile;
    at::parallel_for(0, tiles, kTilesPerGroup, [&](int64_t begin, int64_t end) {
      std::vector<float> sums(kTile * wide);
      for (int64_t first = begin * kTile; first < std::min(end * kTile, out_features);
           first += kTile) {
        const int64_t columns = std::min(kTile, out_features - first);
        brgemm(columns, wide, in_features, in_features, wide, wide, false,
               weight + first * in_features, b, sums.data());
        for (int64_t row = 0; row < rows; ++row) {
          float* to = out + row * out_features + first;
          for (int64_t n = 0; n < columns; ++n) to[n] = sums[n * wide + row];
        }
      }
      at::native::cpublas::brgemm_release();
    });
  }

  // Tile by tile the weight is brought into B's layout, and all rows are multiplied with it.
  void of_many_rows() const {
    const int64_t width = kTile * kTilesPerGroup;
    at::parallel_for(0, (out_features + width - 1) / width, 1, [&](int64_t begin, int64_t end) {
      std::vector<uint32_t> packed(pairs() * width);
      std::vector<float> sums(kRowsPerCall * kTile);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t last = std::min((task + 1) * width, out_features);
        for (int64_t n = task * width; n < last; n += kTile) {
          pack(packed.data() + (n - task * width) * pairs(), n, std::min(kTile, last - n));
        }
        for (int64_t row = 0; row < rows; row += kRowsPerCall) {
          for (int64_t n = task * width; n < last; n += kTile) {
            const auto* b = reinterpret_cast<const BFloat16*>(
                packed.data() + (n - task * width) * pairs());
            multiply(b, row, n, std::min(kTile, last - n), sums.data());
          }
        }
      }
      at::native::cpublas::brgemm_release();
    });
  }

 private:
  void pack(uint32_t* to, int64_t first, int64_t columns) const {
    const auto* from = reinterpret_cast<const uint32_t*>(weight + first * in_features);
    int64_t k = 0;
    for (; columns == kTile && k + kVector <= pairs(); k += kVector) {
      for (int64_t n = 0; n < kTile; n += kVector) {
        at::vec::transpose_mxn<float, kVector, kVector>(
            reinterpret_cast<const float*>(from + n * pairs() + k), pairs(),
            reinterpret_cast<float*>(to + k * kTile + n), kTile);
      }
    }
    for (; k < pairs(); ++k) {
      for (int64_t n = 0; n < columns; ++n) to[k * kTile + n] = from[n * pairs() + k];
    }
  }

  void multiply(const BFloat16* b, int64_t row, int64_t first, int64_t columns, float* sums) const {
    const int64_t count = std::min(kRowsPerCall, rows - row);
    float* to = out + row * out_features + first;
    const bool whole = columns == kTile;
    brgemm(count, kTile, in_features, in_features, kTile, whole ? out_features : kTile, false,
           x + row * in_features, b, whole ? to : sums);
    for (int64_t r = 0; r < count && !whole; ++r) {
      std::memcpy(to + r * out_features, sums + r * kTile, columns * sizeof(float));
    }
  }
};

// The logits, where oneDNN is switched off. A part of the weight at a time is widened.
void logits_by_pytorch(const at::Tensor& x, const at::Tensor& weight, at::Tensor& output) {
  const at::Tensor wide = x.to(at::kFloat);
  for (int64_t first = 0; first < weight.size(0); first += kWidened) {
    const int64_t rows = std::min(kWidened, weight.size(0) - first);
    output.narrow(-1, first, rows).copy_(at::linear(wide, weight.narrow(0, first, rows).to(at::kFloat)));
  }
}

// x [..., in] bf16, in even but for one row; weight [out, in] bf16; returns [..., out] fp32.
at::Tensor bf16_logits(const at::Tensor& x, const at::Tensor& weight) {
  TORCH_CHECK(weight.dim() == 2 && weight.is_contiguous(), "the weight must be a contiguous matrix");
  check(x, weight.size(1));
  auto output = empty_output(x, weight.size(0), at::kFloat);
  const Logits logits{
      x.const_data_ptr<BFloat16>(),
      weight.const_data_ptr<BFloat16>(),
      output.mutable_data_ptr<float>(),
      x.numel() / x.size(-1),
      weight.size(1),
      weight.size(0)};
  TORCH_CHECK(logits.rows == 1 || weight.size(1) % 2 == 0, "an even width is needed");
  if (output.numel() == 0) return output;
  if (!at::globalContext().userEnabledMkldnn()) {
    logits_by_pytorch(x, weight, output);
  } else if (logits.rows == 1) {
    logits.of_one_row();
  } else if (logits.rows <= kFewRows) {
    logits.of_few_rows();
  } else {
    logits.of_many_rows();
  }
  return output;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(ipex_sq, library) {
  library.def(
      "int8_rows(Tensor levels, Tensor input_scale, Tensor input_zero_point, Tensor packed, "
      "Tensor weight_sums, Tensor weight_scale, Tensor? bias, ScalarType dtype) -> Tensor");
  library.impl("int8_rows", torch::dispatch(c10::DispatchKey::CPU, int8_rows));
  library.def(
      "int8_rows_together(Tensor levels, Tensor input_scale, Tensor input_zero_point, "
      "Tensor[] packed, Tensor[] weight_sums, Tensor[] weight_scales, Tensor?[] biases, "
      "ScalarType dtype) -> Tensor[]");
  library.impl("int8_rows_together", torch::dispatch(c10::DispatchKey::CPU, int8_rows_together));
  library.def("bf16_logits(Tensor x, Tensor weight) -> Tensor");
  library.impl("bf16_logits", torch::dispatch(c10::DispatchKey::CPU, bf16_logits));
}
