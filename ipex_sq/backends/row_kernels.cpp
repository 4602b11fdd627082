// Linears of one row, or of a few: a step of generate().
//
// oneDNN takes 30 us to set a product up, more than reading a small weight takes, and reads bf16
// weights at half the rate of memory. These loops are compiled for this CPU. The int8 sums are
// exact, as oneDNN's are.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <cstring>

namespace {

constexpr int64_t kRowsPerTask = 64;

// Functions of their own: inside the lambdas below the compiler does not vectorize them.

int32_t dot(const uint8_t* x, const int8_t* w, int64_t size) {
  int32_t sum = 0;
  for (int64_t k = 0; k < size; ++k) {
    sum += static_cast<int32_t>(x[k]) * static_cast<int32_t>(w[k]);
  }
  return sum;
}

// w holds the bits of bf16.
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

at::Tensor empty_output(const at::Tensor& input, const at::Tensor& weight, at::ScalarType dtype) {
  TORCH_CHECK(input.size(-1) == weight.size(1), "input and weight differ in width");
  TORCH_CHECK(input.is_contiguous() && weight.is_contiguous(), "both must be contiguous");
  auto sizes = input.sizes().vec();
  sizes.back() = weight.size(0);
  return at::empty(sizes, input.options().dtype(dtype));
}

// levels [..., in] uint8; weight [out, in] int8; weight_sums [out] int32, its row sums;
// weight_scale and bias [out] fp32; returns [..., out] fp32 or bf16.
at::Tensor int8_rows(
    const at::Tensor& levels,
    const at::Tensor& input_scale,
    const at::Tensor& input_zero_point,
    const at::Tensor& weight,
    const at::Tensor& weight_sums,
    const at::Tensor& weight_scale,
    const std::optional<at::Tensor>& bias,
    at::ScalarType dtype) {
  auto output = empty_output(levels, weight, dtype);
  const int64_t in_features = weight.size(1);
  const int64_t out_features = weight.size(0);
  const int64_t count = levels.numel() / in_features;
  const uint8_t* x = levels.const_data_ptr<uint8_t>();
  const int8_t* weights = weight.const_data_ptr<int8_t>();
  const int32_t* sums = weight_sums.const_data_ptr<int32_t>();
  const float* scales = weight_scale.const_data_ptr<float>();
  const float* biases = bias ? bias->const_data_ptr<float>() : nullptr;
  const float scale = *input_scale.const_data_ptr<float>();
  const int32_t zero_point = *input_zero_point.const_data_ptr<int32_t>();
  const bool narrow = dtype == at::kBFloat16;
  float* wide_out = narrow ? nullptr : output.mutable_data_ptr<float>();
  c10::BFloat16* narrow_out = narrow ? output.mutable_data_ptr<c10::BFloat16>() : nullptr;
  at::parallel_for(0, out_features, kRowsPerTask, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t item = 0; item < count; ++item) {
        const int32_t sum = dot(x + item * in_features, weights + row * in_features, in_features);
        float y = static_cast<float>(sum - zero_point * sums[row]) * (scale * scales[row]);
        if (biases) y += biases[row];
        if (narrow) {
          narrow_out[item * out_features + row] = y;
        } else {
          wide_out[item * out_features + row] = y;
        }
      }
    }
  });
  return output;
}

// x [..., in] bf16, one row; weight [out, in] bf16; returns [..., out] bf16, summed in fp32.
at::Tensor bf16_row(const at::Tensor& x, const at::Tensor& weight) {
  TORCH_CHECK(x.numel() == weight.size(1), "one row is needed");
  auto output = empty_output(x, weight, at::kBFloat16);
  const int64_t in_features = weight.size(1);
  const auto wide = x.to(at::kFloat);
  const float* inputs = wide.const_data_ptr<float>();
  const auto* weights =
      reinterpret_cast<const uint16_t*>(weight.const_data_ptr<c10::BFloat16>());
  c10::BFloat16* out = output.mutable_data_ptr<c10::BFloat16>();
  at::parallel_for(0, weight.size(0), kRowsPerTask, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      out[row] = dot(inputs, weights + row * in_features, in_features);
    }
  });
  return output;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(ipex_sq, library) {
  library.def(
      "int8_rows(Tensor levels, Tensor input_scale, Tensor input_zero_point, Tensor weight, "
      "Tensor weight_sums, Tensor weight_scale, Tensor? bias, ScalarType dtype) -> Tensor");
  library.impl(
      "int8_rows", torch::dispatch(c10::DispatchKey::CompositeExplicitAutograd, int8_rows));
  library.def("bf16_row(Tensor x, Tensor weight) -> Tensor");
  library.impl(
      "bf16_row", torch::dispatch(c10::DispatchKey::CompositeExplicitAutograd, bf16_row));
}
