// Inputs of int8 products to levels, in one pass: by a static scale, or each row by its own.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "int8_product.h"

namespace {

using namespace ipex_sq;

constexpr float kMaximum = 255;      // of a level
constexpr float kTokenMaximum = 127; // levels on either side of
constexpr int32_t kTokenZero = 128;

// A channel in parts, of inputs rounded per token: which of the copies are its own.
struct TokenPart {
  int64_t channel, first, end;

  // Of a share, the levels of all parts, laid end to end.
  void write(float share, float scale, uint8_t* levels, uint8_t* copies) const {
    const float parts = static_cast<float>(end - first + 1);
    float rest = std::nearbyint(share * parts / scale);
    levels[channel] = taken(rest);
    for (int64_t n = first; n < end; ++n) copies[n] = taken(rest);
  }

 private:
  // What one part holds of the rest, and it no longer.
  static uint8_t taken(float& rest) {
    const float held = std::min(std::max(rest, -kTokenMaximum), kTokenMaximum);
    rest -= held;
    return static_cast<uint8_t>(static_cast<int32_t>(held) + kTokenZero);
  }
};

std::vector<TokenPart> token_parts(const std::optional<at::Tensor>& channels, int64_t in_features) {
  std::vector<TokenPart> parts;
  if (!channels) return parts;
  check_channels(*channels, in_features);
  const int64_t* of = channels->const_data_ptr<int64_t>();
  for (int64_t n = 0; n < channels->numel(); ++n) {
    if (n == 0 || of[n] != of[n - 1]) parts.push_back({of[n], n, n});
    parts.back().end = n + 1;
  }
  return parts;
}

// One row of x times the multiplier, rounded around 128 by its absmax / 127; returns that scale. The
// same divisions as quantize_tokens has. A row with NaN has NaN for its scale, so that its outputs are
// NaN too: as integers, absolute values have the same order, and NaN is the largest. A function of its
// own: inside a lambda the compiler does not vectorize it.
template <typename T>
float round_row(const T* x, const float* multiplier, float least, float* wide, uint8_t* to, int64_t size) {
  int32_t most = 0;
#pragma omp simd reduction(max : most)
  for (int64_t k = 0; k < size; ++k) {
    wide[k] = static_cast<float>(x[k]) * multiplier[k];
    int32_t bits;
    std::memcpy(&bits, wide + k, sizeof(bits));
    most = std::max(most, bits & std::numeric_limits<int32_t>::max());
  }
  float absmax;
  std::memcpy(&absmax, &most, sizeof(absmax));
  const float scale = std::max(absmax / kTokenMaximum, least);
  if (!std::isfinite(scale)) {
    std::memset(to, kTokenZero, size);
    return scale;
  }
  for (int64_t k = 0; k < size; ++k) {
    to[k] = static_cast<uint8_t>(static_cast<int32_t>(std::nearbyint(wide[k] / scale)) + kTokenZero);
  }
  return scale;
}

template <typename T>
void round_rows(
    const at::Tensor& x,
    const at::Tensor& multiplier,
    float least,
    const std::vector<TokenPart>& parts,
    at::Tensor& levels,
    at::Tensor& scales) {
  const int64_t size = x.size(-1), width = levels.size(-1);
  const T* from = x.const_data_ptr<T>();
  const float* factors = multiplier.const_data_ptr<float>();
  uint8_t* to = levels.mutable_data_ptr<uint8_t>();
  float* steps = scales.mutable_data_ptr<float>();
  at::parallel_for(0, scales.numel(), kRowsPerCall, [&](int64_t begin, int64_t end) {
    std::vector<float> wide(size);
    for (int64_t row = begin; row < end; ++row) {
      uint8_t* place = to + row * width;
      steps[row] = round_row(from + row * size, factors, least, wide.data(), place, size);
      if (std::isfinite(steps[row])) {
        for (const auto& part : parts) part.write(wide[part.channel], steps[row], place, place + size);
      } else {
        std::memset(place + size, kTokenZero, width - size);
      }
    }
  });
}

// x [..., in] fp32 or bf16; multiplier [in] fp32, which makes shares of channels in parts; least, the
// smallest scale; channels [copies] int64 or none; returns levels [..., in + copies] uint8 around 128 and
// their scales [..., 1] fp32.
std::tuple<at::Tensor, at::Tensor> round_tokens(
    const at::Tensor& x,
    const at::Tensor& multiplier,
    double least,
    const std::optional<at::Tensor>& channels) {
  check(x, multiplier.numel());
  TORCH_CHECK(multiplier.is_contiguous(), "multipliers must be contiguous");
  const auto parts = token_parts(channels, x.size(-1));
  auto levels = empty_output(x, x.size(-1) + (channels ? channels->numel() : 0), at::kByte);
  auto scales = empty_output(x, 1, at::kFloat);
  if (x.scalar_type() == at::kBFloat16) {
    round_rows<BFloat16>(x, multiplier, least, parts, levels, scales);
  } else {
    round_rows<float>(x, multiplier, least, parts, levels, scales);
  }
  return {levels, scales};
}

// Levels around a zero point; of NaN the level is 0. A function of its own: see `round_row`.
template <typename T>
void static_row(const T* x, const float* multiplier, float zero_point, uint8_t* to, int64_t size) {
  for (int64_t k = 0; k < size; ++k) {
    const float level = std::nearbyint(static_cast<float>(x[k]) * multiplier[k]) + zero_point;
    to[k] = static_cast<uint8_t>(static_cast<int32_t>(std::min(std::max(0.0f, level), kMaximum)));
  }
}

// Channels with further parts: what the parts before each copy do not hold.
struct Copies {
  const int64_t* channels;
  const float* held_low;
  const float* held_high;
  int64_t count;

  template <typename T>
  void row(const T* x, const float* multiplier, float zero_point, uint8_t* to) const {
    for (int64_t n = 0; n < count; ++n) {
      const int64_t channel = channels[n];
      const float all = std::nearbyint(static_cast<float>(x[channel]) * multiplier[channel]);
      const float rest = all - std::min(std::max(all, held_low[n]), held_high[n]);
      to[n] = static_cast<uint8_t>(static_cast<int32_t>(std::min(std::max(0.0f, rest + zero_point), kMaximum)));
    }
  }
};

template <typename T>
void static_rows(const at::Tensor& x, const at::Tensor& multiplier, float zero_point, const Copies& copies, at::Tensor& levels) {
  const int64_t size = x.size(-1), width = levels.size(-1);
  const T* from = x.const_data_ptr<T>();
  const float* factors = multiplier.const_data_ptr<float>();
  uint8_t* to = levels.mutable_data_ptr<uint8_t>();
  at::parallel_for(0, x.numel() / size, kRowsPerCall, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      static_row(from + row * size, factors, zero_point, to + row * width, size);
      copies.row(from + row * size, factors, zero_point, to + row * width + size);
    }
  });
}

// x [..., in] fp32 or bf16; multiplier [in] fp32; channels [copies] int64 with what their parts hold
// [copies] fp32, or none; returns levels [..., in + copies] uint8.
at::Tensor round_static(
    const at::Tensor& x,
    const at::Tensor& multiplier,
    const at::Tensor& zero_point,
    const std::optional<at::Tensor>& channels,
    const std::optional<at::Tensor>& held_low,
    const std::optional<at::Tensor>& held_high) {
  check(x, multiplier.numel());
  check_rounding(multiplier, zero_point, channels, held_low, held_high);
  Copies copies{};
  if (channels) {
    copies = {channels->const_data_ptr<int64_t>(), held_low->const_data_ptr<float>(),
              held_high->const_data_ptr<float>(), channels->numel()};
  }
  auto levels = empty_output(x, x.size(-1) + copies.count, at::kByte);
  const auto zero = static_cast<float>(*zero_point.const_data_ptr<int32_t>());
  if (x.scalar_type() == at::kBFloat16) {
    static_rows<BFloat16>(x, multiplier, zero, copies, levels);
  } else {
    static_rows<float>(x, multiplier, zero, copies, levels);
  }
  return levels;
}

} // namespace

TORCH_LIBRARY_FRAGMENT(ipex_sq, library) {
  library.def("round_tokens(Tensor x, Tensor multiplier, float least, Tensor? channels=None) -> (Tensor, Tensor)");
  library.def(
      "round_static(Tensor x, Tensor multiplier, Tensor zero_point, Tensor? channels, "
      "Tensor? held_low, Tensor? held_high) -> Tensor");
  library.impl("round_static", torch::dispatch(c10::DispatchKey::CPU, round_static));
  library.impl("round_tokens", torch::dispatch(c10::DispatchKey::CPU, round_tokens));
}
