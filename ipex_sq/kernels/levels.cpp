// int8 products whose outputs are at once what the next product takes: levels. What stands between
// two Linears of a block, an activation and perhaps a factor, is computed from sums in registers, and
// neither written nor read.

#include <ATen/ATen.h>
#include <torch/library.h>

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <string_view>
#include <vector>

#include "activation.h"
#include "int8_product.h"

namespace {

using namespace ipex_sq;

constexpr float kMaximum = 255; // of a level

// Static rounding for the next product: times a multiplier, around a zero point. Channels with further
// parts have copies behind the others: what the parts before do not hold.
struct Rounding {
  const float* multiplier; // [out]
  float zero_point;
  const int64_t* channels; // [copies], sorted
  const float* held_low;
  const float* held_high;
  int64_t copies;
  uint8_t* to; // [rows, out + copies]
  int64_t width; // out + copies

  // Values of one row, of the columns from `first` on.
  void write(int64_t row, const __m512 (&values)[kVectors], int64_t first, int64_t columns) const {
    uint8_t* place = to + row * width + first;
    for (int64_t v = 0; v < kVectors && v * kVector < columns; ++v) {
      const __mmask16 valid = first_words(std::min(kVector, columns - v * kVector));
      const __m512 level = _mm512_add_ps(
          _mm512_roundscale_ps(scaled(values[v], first + v * kVector, valid), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC),
          _mm512_set1_ps(zero_point));
      // NaN is 0, as the second operand is returned then.
      const __m512 held = _mm512_min_ps(_mm512_max_ps(level, _mm512_setzero_ps()), _mm512_set1_ps(kMaximum));
      _mm512_mask_cvtepi32_storeu_epi8(place + v * kVector, valid, _mm512_cvtps_epi32(held));
    }
  }

  // The copies of a tile's channels, which are `begin` to `end - 1`.
  void write_copies(int64_t row, const __m512 (&values)[kVectors], int64_t first, int64_t begin, int64_t end) const {
    alignas(kLine) float products[kTile];
    for (int64_t v = 0; v < kVectors; ++v) {
      const int64_t valid = std::clamp<int64_t>(width - copies - first - v * kVector, 0, kVector);
      _mm512_store_ps(products + v * kVector, scaled(values[v], first + v * kVector, first_words(valid)));
    }
    for (int64_t n = begin; n < end; ++n) {
      const float all = std::nearbyint(products[channels[n] - first]);
      const float rest = all - std::min(std::max(all, held_low[n]), held_high[n]);
      const float held = std::min(std::max(0.0f, rest + zero_point), kMaximum); // NaN is 0
      to[row * width + (width - copies) + n] = static_cast<uint8_t>(static_cast<int32_t>(held));
    }
  }

  // Number of copies of channels before `channel`.
  int64_t before(int64_t channel) const {
    return std::lower_bound(channels, channels + copies, channel) - channels;
  }

 private:
  __m512 scaled(__m512 value, int64_t column, __mmask16 valid) const {
    return _mm512_mul_ps(value, _mm512_maskz_loadu_ps(valid, multiplier + column));
  }
};

// The levels of activation(first weight's output), times the second weight's if there is one.
template <typename Activation>
void levels_of_tiles(const at::Tensor& levels, const std::vector<Int8Weight>& weights, const Activation& activation, const Rounding& rounding) {
  const int64_t in_features = levels.size(-1);
  const uint8_t* x = levels.const_data_ptr<uint8_t>();
  const Int8Weight& activated = weights.front();
  const Int8Weight* factor = weights.size() > 1 ? &weights[1] : nullptr;
  over_tiles(activated.tiles(), levels.numel() / in_features, weights.size(), [&](int64_t tile, Rows rows, int32_t* sums) {
    const int64_t first = tile * kTile, columns = activated.columns(first);
    int32_t* others = sums + rows.count * kTile;
    activated.sum(x, in_features, rows, first, sums);
    if (factor) factor->sum(x, in_features, rows, first, others);
    const TileScaling scale(activated.scaling, first, columns);
    const TileScaling scale_factor((factor ? *factor : activated).scaling, first, columns);
    const int64_t begin = rounding.before(first), end = rounding.before(first + columns);
    Floats outputs[kVectors], factors[kVectors];
    __m512 values[kVectors];
    for (int64_t r = 0; r < rows.count; ++r) {
      const int64_t row = rows.first + r;
      scale(sums + r * kTile, row, outputs);
      for (int64_t v = 0; v < kVectors; ++v) values[v] = activation(outputs[v]);
      if (factor) {
        scale_factor(others + r * kTile, row, factors);
        for (int64_t v = 0; v < kVectors; ++v) values[v] = _mm512_mul_ps(values[v], factors[v]);
      }
      rounding.write(row, values, first, columns);
      if (begin < end) rounding.write_copies(row, values, first, begin, end);
    }
  });
}

// levels [..., in] uint8 with their scale and zero point; of one or two weights what `int8_rows_together`
// takes; the name of the activation of the first; of the next product's input the multiplier [out], the
// zero point, and channels [copies] with what their parts hold, or none. Returns [..., out + copies] uint8.
at::Tensor int8_levels(
    const at::Tensor& levels,
    const at::Tensor& input_scale,
    const at::Tensor& input_zero_point,
    at::TensorList packed,
    at::TensorList weight_sums,
    at::TensorList weight_scales,
    const c10::List<std::optional<at::Tensor>>& biases,
    std::string_view activation,
    const at::Tensor& multiplier,
    const at::Tensor& zero_point,
    const std::optional<at::Tensor>& channels,
    const std::optional<at::Tensor>& held_low,
    const std::optional<at::Tensor>& held_high) {
  TORCH_CHECK(packed.size() == 1 || packed.size() == 2, "one weight, or two");
  check_rounding(multiplier, zero_point, channels, held_low, held_high);
  const auto weights = int8_weights(levels, input_scale, input_zero_point, packed, weight_sums, weight_scales, biases);
  for (const auto& weight : weights) {
    TORCH_CHECK(multiplier.numel() == weight.out_features, "a factor for each column");
  }
  const int64_t copies = channels ? channels->numel() : 0;
  auto output = empty_output(levels, multiplier.numel() + copies, at::kByte);
  const Rounding rounding{
      multiplier.const_data_ptr<float>(),
      static_cast<float>(*zero_point.const_data_ptr<int32_t>()),
      copies ? channels->const_data_ptr<int64_t>() : nullptr,
      copies ? held_low->const_data_ptr<float>() : nullptr,
      copies ? held_high->const_data_ptr<float>() : nullptr,
      copies,
      output.mutable_data_ptr<uint8_t>(),
      output.size(-1)};
  const bool known = with_activation(activation, [&](const auto& function) { levels_of_tiles(levels, weights, function, rounding); });
  TORCH_CHECK(known, "no activation is named ", activation);
  return output;
}

} // namespace

TORCH_LIBRARY_FRAGMENT(ipex_sq, library) {
  library.def(
      "int8_levels(Tensor levels, Tensor input_scale, Tensor input_zero_point, Tensor[] packed, "
      "Tensor[] weight_sums, Tensor[] weight_scales, Tensor?[] biases, str activation, Tensor multiplier, "
      "Tensor zero_point, Tensor? channels, Tensor? held_low, Tensor? held_high) -> Tensor");
  library.impl("int8_levels", torch::dispatch(c10::DispatchKey::CPU, int8_levels));
}
