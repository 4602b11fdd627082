// Products of int8 levels with packed weights, tile by tile, on all cores.

#pragma once

#include <ATen/ATen.h>
#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <optional>
#include <vector>

#include "few_rows.h"
#include "tile_output.h"

namespace ipex_sq {

constexpr int64_t kTilesPerGroup = 4; // their weights stay in a core's cache, and are 1 KiB of a row of logits
constexpr int64_t kRowsPerCall = 64;
constexpr int64_t kSharedOut = 128; // up to so many rows, cores share them out in calls of half as many
constexpr int64_t kMostProducts = std::numeric_limits<int32_t>::max() / (255 * 127); // in a sum, in any case

inline void check(const at::Tensor& x, int64_t in_features) {
  TORCH_CHECK(x.dim() > 0 && x.size(-1) == in_features, "input and weight differ in width");
  TORCH_CHECK(in_features > 0, "the input has no width");
  TORCH_CHECK(x.is_contiguous(), "the input must be contiguous");
}

inline void check_channels(const at::Tensor& channels, int64_t in_features) {
  TORCH_CHECK(channels.is_contiguous(), "channels must be contiguous");
  const int64_t copies = channels.numel();
  const int64_t* of = channels.const_data_ptr<int64_t>();
  TORCH_CHECK(std::is_sorted(of, of + copies), "channels must be sorted");
  TORCH_CHECK(copies == 0 || (of[0] >= 0 && of[copies - 1] < in_features), "channels beyond the input");
}

// What static rounding of [..., in_features] goes by. Kernels read inputs by the channels.
inline void check_rounding(
    const at::Tensor& multiplier,
    const at::Tensor& zero_point,
    const std::optional<at::Tensor>& channels,
    const std::optional<at::Tensor>& held_low,
    const std::optional<at::Tensor>& held_high) {
  TORCH_CHECK(multiplier.dim() == 1 && multiplier.is_contiguous(), "multipliers must be one contiguous row");
  TORCH_CHECK(zero_point.numel() == 1, "one zero point is needed");
  TORCH_CHECK(channels.has_value() == held_low.has_value() && channels.has_value() == held_high.has_value(),
              "channels come with what their parts hold");
  if (!channels) return;
  const int64_t copies = channels->numel();
  TORCH_CHECK(held_low->numel() == copies && held_high->numel() == copies, "two levels for each copy of a channel");
  TORCH_CHECK(held_low->is_contiguous() && held_high->is_contiguous(), "what channels hold must be contiguous");
  check_channels(*channels, multiplier.numel());
}

inline at::Tensor empty_output(const at::Tensor& x, int64_t out_features, at::ScalarType dtype) {
  auto sizes = x.sizes().vec();
  sizes.back() = out_features;
  return at::empty(sizes, x.options().dtype(dtype));
}

// Rows of levels [rows, in_features] that a tile is made of.
struct Rows {
  int64_t first, count;
};

// A weight, packed [out / 64, in / 4, 64, 4] int8, and what its sums are scaled by.
struct Int8Weight {
  const int8_t* packed;
  Scaling scaling;
  int64_t out_features;

  Int8Weight(
      const at::Tensor& levels,
      const at::Tensor& input_scale,
      const at::Tensor& input_zero_point,
      const at::Tensor& weight,
      const at::Tensor& weight_sums,
      const at::Tensor& weight_scale,
      const std::optional<at::Tensor>& bias)
      : packed(weight.const_data_ptr<int8_t>()),
        scaling(levels, input_scale, input_zero_point, weight_sums, weight_scale, bias),
        out_features(weight_scale.numel()) {
    TORCH_CHECK(weight.dim() == 4 && weight.size(2) == kTile && weight.size(3) == kFour && weight.is_contiguous(),
                "a packed weight is contiguous [out / 64, in / 4, 64, 4]");
    TORCH_CHECK(weight.size(0) == tiles(), "the weight and its scale differ in length");
    check(levels, weight.size(1) * kFour);
    TORCH_CHECK(levels.size(-1) <= kMostProducts, "int32 sums hold ", kMostProducts, " products of levels with weights, not ", levels.size(-1));
  }

  int64_t tiles() const { return (out_features + kTile - 1) / kTile; }

  // Of the tile whose first column is `first`.
  int64_t columns(int64_t first) const { return std::min(kTile, out_features - first); }

  // Sums [count, 64] of the tile whose first column is `first`.
  void sum(const uint8_t* levels, int64_t in_features, Rows rows, int64_t first, int32_t* sums) const {
    const uint8_t* x = levels + rows.first * in_features;
    const int8_t* tile = packed + first * in_features;
    if (rows.count <= kMostFetched) {
      kSumFetched[rows.count - 1](x, tile, in_features, sums);
    } else {
      at::native::cpublas::brgemm(rows.count, kTile, in_features, in_features, kTile, kTile, false, x, tile, sums);
    }
  }
};

// Of the weights that the same levels are multiplied with; each list has one item for each.
inline std::vector<Int8Weight> int8_weights(
    const at::Tensor& levels,
    const at::Tensor& input_scale,
    const at::Tensor& input_zero_point,
    at::TensorList packed,
    at::TensorList weight_sums,
    at::TensorList weight_scales,
    const c10::List<std::optional<at::Tensor>>& biases) {
  TORCH_CHECK(packed.size() == weight_sums.size() && packed.size() == weight_scales.size() && packed.size() == biases.size(),
              "sums, a scale and a bias or none for each weight");
  TORCH_CHECK(at::globalContext().userEnabledMkldnn(),
              "int8 products need oneDNN, and torch.backends.mkldnn.enabled is False: set it to True");
  std::vector<Int8Weight> weights;
  for (size_t n = 0; n < packed.size(); ++n) {
    weights.emplace_back(levels, input_scale, input_zero_point, packed[n], weight_sums[n], weight_scales[n], biases.get(n));
  }
  return weights;
}

// What sums are kept in: no vector of them lies in two lines of the cache.
struct alignas(kLine) Line {
  int32_t words[kVector];
};

// Calls work(tile, rows, scratch) for all tiles and blocks of rows; scratch holds the sums of
// `products` products.
template <typename Work>
void over_tiles(int64_t tiles, int64_t rows, int64_t products, const Work& work) {
  const int64_t most = rows > kSharedOut ? kRowsPerCall : kRowsPerCall / 2;
  const int64_t blocks = (rows + most - 1) / most;
  const int64_t least = rows > kMostFetched ? 1 : kTilesPerGroup; // tasks that another core is woken for
  // A group of tiles stays in the cache for all blocks of rows, and a block for the tiles of a group.
  at::parallel_for(0, tiles * blocks, least, [&](int64_t begin, int64_t end) {
    std::vector<Line> sums(products * std::min(rows, most) * kVectors);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t group = task / (kTilesPerGroup * blocks) * kTilesPerGroup; // its first tile
      const int64_t width = std::min(kTilesPerGroup, tiles - group);
      const int64_t place = task - group * blocks;
      const int64_t row = place / width * most;
      work(group + place % width, Rows{row, std::min(most, rows - row)}, sums.front().words);
    }
    end_of_stream();
    at::native::cpublas::brgemm_release();
  });
}

} // namespace ipex_sq
