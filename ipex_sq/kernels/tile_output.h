// int8 sums that brgemm leaves for one tile of 64 columns, scaled, to rows in memory.

#pragma once

#include <ATen/ATen.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <optional>

#include "tile.h"

namespace ipex_sq {

using at::BFloat16;
using Floats = at::vec::Vectorized<float>;
using Integers = at::vec::Vectorized<int32_t>;

constexpr int64_t kBeyondCaches = int64_t(64) << 20; // bytes

// Whether rows of `width` numbers are written past the caches. An output that no cache holds would
// be read from memory line by line before it is written over.
inline bool streams(const float* to, int64_t rows, int64_t width) {
  const int64_t bytes = width * static_cast<int64_t>(sizeof(float));
  return rows * bytes >= kBeyondCaches && bytes % kLine == 0 && reinterpret_cast<uintptr_t>(to) % kLine == 0;
}

inline bool streams(const BFloat16*, int64_t, int64_t) {
  return false; // only logits are so large, and they are fp32
}

// To be called by every thread that has streamed, before others read.
inline void end_of_stream() {
  _mm_sfence();
}

inline void write_vector(float* to, Floats x, int64_t count, bool stream) {
  if (count == kVector && stream) {
    _mm512_stream_ps(to, x);
  } else {
    x.store(to, static_cast<int>(count));
  }
}

// The first `columns` of a row, at most 64.
inline void write_row(float* to, const Floats (&row)[kVectors], int64_t columns, bool stream) {
  for (int64_t v = 0; v < kVectors; ++v) {
    const int64_t count = std::min(kVector, columns - v * kVector);
    if (count > 0) write_vector(to + v * kVector, row[v], count, stream);
  }
}

inline void write_row(BFloat16* to, const Floats (&row)[kVectors], int64_t columns, bool) {
  for (int64_t v = 0; v < kVectors; v += 2) {
    const int64_t count = std::min(2 * kVector, columns - v * kVector);
    if (count <= 0) return;
    const auto both = at::vec::convert_from_float<BFloat16>(row[v], row[v + 1]);
    both.store(to + v * kVector, static_cast<int>(count));
  }
}

// What makes outputs of sums in int32: y = (sum - zero_point * row sum) * scale + bias.
struct Scaling {
  int32_t zero_point;
  const float* scales; // of the rows
  bool scale_for_each; // or one for all
  const int32_t* weight_sums;
  const float* weight_scales;
  const float* biases;

  Scaling(
      const at::Tensor& levels,
      const at::Tensor& input_scale,
      const at::Tensor& input_zero_point,
      const at::Tensor& sums_of_weight,
      const at::Tensor& weight_scale,
      const std::optional<at::Tensor>& bias)
      : zero_point(*input_zero_point.const_data_ptr<int32_t>()),
        scales(input_scale.const_data_ptr<float>()),
        scale_for_each(input_scale.numel() > 1),
        weight_sums(sums_of_weight.const_data_ptr<int32_t>()),
        weight_scales(weight_scale.const_data_ptr<float>()),
        biases(bias ? bias->const_data_ptr<float>() : nullptr) {
    TORCH_CHECK(!scale_for_each || input_scale.numel() * levels.size(-1) == levels.numel(),
                "one scale, or one for each row");
    const int64_t width = weight_scale.numel();
    TORCH_CHECK(input_zero_point.numel() == 1, "one zero point is needed");
    TORCH_CHECK(input_scale.numel() > 0 || levels.numel() == 0, "a scale is needed");
    TORCH_CHECK(sums_of_weight.numel() == width && (!bias || bias->numel() == width),
                "sums, scale and bias of a weight differ in length");
    TORCH_CHECK(input_scale.is_contiguous() && sums_of_weight.is_contiguous() && weight_scale.is_contiguous() &&
                    (!bias || bias->is_contiguous()),
                "scales, sums and bias must be contiguous");
  }
};

// A `Scaling` in registers, of `columns` columns from `first` on.
class TileScaling {
 public:
  TileScaling(const Scaling& of, int64_t first, int64_t columns) : of_(of) {
    for (int64_t v = 0; v < kVectors; ++v) {
      const int64_t at = first + v * kVector;
      const int64_t valid = std::clamp<int64_t>(columns - v * kVector, 0, kVector);
      offset_[v] = Integers::loadu(of.weight_sums + at, valid) * Integers(of.zero_point);
      scale_[v] = Floats::loadu(of.weight_scales + at, valid);
      bias_[v] = of.biases ? Floats::loadu(of.biases + at, valid) : Floats(0.0f);
    }
  }

  // The outputs of row `row`, whose sums are at `sums`.
  void operator()(const int32_t* sums, int64_t row, Floats (&out)[kVectors]) const {
    const Floats of_row(of_.scales[of_.scale_for_each ? row : 0]);
    for (int64_t v = 0; v < kVectors; ++v) {
      const Integers sum = Integers::loadu(sums + v * kVector) - offset_[v];
      out[v] = at::vec::fmadd(Floats(_mm512_cvtepi32_ps(sum)), of_row * scale_[v], bias_[v]);
    }
  }

 private:
  const Scaling& of_;
  Integers offset_[kVectors];
  Floats scale_[kVectors], bias_[kVectors];
};

} // namespace ipex_sq
