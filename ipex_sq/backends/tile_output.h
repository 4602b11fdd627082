// int8 sums that brgemm leaves for one tile of 64 columns, scaled, to rows in memory.

#pragma once

#include <ATen/ATen.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <tuple>
#include <type_traits>

namespace ipex_sq {

using at::BFloat16;
using Floats = at::vec::Vectorized<float>;
using Integers = at::vec::Vectorized<int32_t>;

constexpr int64_t kTile = 64; // columns of one call of brgemm
constexpr int64_t kVector = 16; // words of 32 bits in a register
constexpr int64_t kVectors = kTile / kVector;
constexpr int64_t kLine = 64; // bytes that memory is written in
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

inline bool streams(const uint8_t*, int64_t, int64_t) {
  return false;
}

// What a Linear does to another's output before it multiplies it: an activation, then rounding to
// levels around a zero point. In the steps, and with the roundings, of the operators that it replaces.
struct Rounding {
  bool narrow; // the output was bf16 between the two
  bool gelu; // or else ReLU
  const float* multiplier; // of the columns
  float zero_point;

  Floats activate(Floats x) const {
    if (!gelu) return at::vec::maximum(x, Floats(0.0f));
    return x * Floats(0.5f) * ((x * Floats(0.70710678118654752f)).erf() + Floats(1.0f));
  }

  // The first `columns` of a row, at most 64; `first` is their place in it.
  void write(uint8_t* to, Floats (&row)[kVectors], int64_t first, int64_t columns) const {
    for (int64_t v = 0; v < kVectors; v += 2) {
      if (narrow) {
        const auto both = at::vec::convert_from_float<BFloat16>(row[v], row[v + 1]);
        std::tie(row[v], row[v + 1]) = at::vec::convert_to_float<BFloat16>(both);
      }
    }
    for (int64_t v = 0; v < kVectors; ++v) {
      const int64_t count = std::min(kVector, columns - v * kVector);
      if (count <= 0) return;
      const Floats factor = Floats::loadu(multiplier + first + v * kVector, count);
      const Floats level = (activate(row[v]) * factor).round() + Floats(zero_point);
      const Floats held = at::vec::minimum(at::vec::maximum(level, Floats(0.0f)), Floats(255.0f));
      const __mmask16 mask = static_cast<__mmask16>((1u << count) - 1);
      _mm512_mask_cvtepi32_storeu_epi8(to + v * kVector, mask, _mm512_cvtps_epi32(held));
    }
  }
};

// Sums of one tile in int32 to outputs: y = (sum - zero_point * row sum) * scale + bias.
struct Epilogue {
  int32_t zero_point;
  const float* scales; // of the rows
  bool scale_for_each; // or one for all
  const int32_t* weight_sums;
  const float* weight_scales;
  const float* biases;
  Rounding rounding{}; // of outputs that are levels

  // `count` rows from `row` on, of the columns from `first` on; `to` is where the first one goes.
  template <typename T>
  void operator()(const int32_t* sums, T* to, int64_t stride, int64_t row, int64_t count, int64_t first, int64_t columns, bool stream) const {
    Integers offset[kVectors];
    Floats scale[kVectors], bias[kVectors];
    for (int64_t v = 0; v < kVectors; ++v) {
      const int64_t at = first + v * kVector;
      const int64_t valid = std::clamp<int64_t>(columns - v * kVector, 0, kVector);
      offset[v] = Integers::loadu(weight_sums + at, valid) * Integers(zero_point);
      scale[v] = Floats::loadu(weight_scales + at, valid);
      bias[v] = biases ? Floats::loadu(biases + at, valid) : Floats(0.0f);
    }
    for (int64_t r = 0; r < count; ++r) {
      const Floats of_row(scales[scale_for_each ? row + r : 0]);
      Floats out[kVectors];
      for (int64_t v = 0; v < kVectors; ++v) {
        const Integers sum = Integers::loadu(sums + r * kTile + v * kVector) - offset[v];
        out[v] = at::vec::fmadd(Floats(_mm512_cvtepi32_ps(sum)), of_row * scale[v], bias[v]);
      }
      if constexpr (std::is_same_v<T, uint8_t>) {
        rounding.write(to + r * stride, out, first, columns);
      } else {
        write_row(to + r * stride, out, columns, stream);
      }
    }
  }
};

} // namespace ipex_sq
