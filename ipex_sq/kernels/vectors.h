// fp32 in registers of AVX-512: what several kernels do with them.

#pragma once

#include <immintrin.h>

#include <cstdint>

namespace ipex_sq {

constexpr int64_t kVector = 16; // words of 32 bits in a register

// 2^x to 3e-6 of itself, of which bf16 keeps 4e-3; below 2^-120 it is 0, and NaN stays. Numbers that
// are too small to be normal would cost a hundred times as much.
inline __m512 exp2(__m512 x) {
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

// The first `count`, at most 16.
inline __mmask16 first_words(int64_t count) {
  return static_cast<__mmask16>((uint32_t(1) << count) - 1);
}

} // namespace ipex_sq
