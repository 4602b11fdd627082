// Sums of a few rows of levels with a tile of weights.
//
// They take as long as memory gives the tile, for which brgemm asks too late.

#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "tile.h"

namespace ipex_sq {

constexpr int64_t kFetchedAhead = 4096; // bytes of a weight: memory answers within the time they take
constexpr int64_t kMostFetched = 6; // rows whose sums a core holds in registers, with weights for them

// Calls f(0) to f(count - 1), each number a constant: arrays are kept in registers then.
template <typename F, int64_t... n>
[[gnu::always_inline]] inline void for_constants(std::integer_sequence<int64_t, n...>, const F& f) {
  (f(std::integral_constant<int64_t, n>()), ...);
}

template <int64_t count, typename F>
[[gnu::always_inline]] inline void unrolled(const F& f) {
  for_constants(std::make_integer_sequence<int64_t, count>(), f);
}

// Sums [rows, 64] of levels [rows, in_features] with a tile [in_features / 4, 64, 4].
template <int64_t rows>
void sum_fetched(const uint8_t* levels, const int8_t* tile, int64_t in_features, int32_t* sums) {
  __m512i of[rows * kVectors], weight[kVectors];
  unrolled<rows * kVectors>([&](auto n) { of[n] = _mm512_setzero_si512(); });
  for (int64_t k = 0; k < in_features; k += kFour) {
    unrolled<kVectors>([&](auto v) {
      const int8_t* line = tile + k * kTile + v * kLine;
      _mm_prefetch(reinterpret_cast<const char*>(line + kFetchedAhead), _MM_HINT_T0);
      weight[v] = _mm512_loadu_si512(line);
      asm("" : "+v"(weight[v])); // or the compiler has every row read it again
    });
    unrolled<rows>([&](auto r) {
      int32_t four;
      std::memcpy(&four, levels + r * in_features + k, sizeof(four));
      const __m512i x = _mm512_set1_epi32(four);
      unrolled<kVectors>([&](auto v) {
        constexpr int64_t n = decltype(r)::value * kVectors + decltype(v)::value;
        of[n] = _mm512_dpbusd_epi32(of[n], x, weight[v]);
      });
    });
  }
  unrolled<rows * kVectors>([&](auto n) { _mm512_storeu_si512(sums + n * kVector, of[n]); });
}

using SumFetched = decltype(&sum_fetched<1>);
constexpr SumFetched kSumFetched[kMostFetched] = {
    sum_fetched<1>, sum_fetched<2>, sum_fetched<3>, sum_fetched<4>, sum_fetched<5>, sum_fetched<6>};

} // namespace ipex_sq
