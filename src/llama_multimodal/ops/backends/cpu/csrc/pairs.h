// Vectors of bf16 pairs with AVX-512: what products of pairs read and write.
#pragma once

#include <immintrin.h>

#include "interleave.h"
#include "vec.h"

namespace {

// 32 values of a row from d on, zeros past its end.
INLINE __m512i load_32(const uint16_t* row, int64_t d, int64_t dim) {
  const int64_t left = dim - d;
  const __mmask32 there = left >= 32 ? ~0u : left <= 0 ? 0u : (1u << left) - 1;
  return _mm512_maskz_loadu_epi16(there, row + d);
}

// [low, high] → their bf16 values side by side, a pair in every lane.
INLINE __m512i pair_up(__m512 low, __m512 high) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                         5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(high, low));
}

// 16 rows (fewer at the end), 32 of their `dim` values from d on → the first `count` pairs, [count, 16, 2].
INLINE void order_pairs(const uint16_t* rows, int64_t stride, int64_t there, int64_t d, int64_t dim, int64_t count,
                        uint16_t* out) {
  __m512i x[16];
  for (int64_t row = 0; row < 16; row++)
    x[row] = row < there ? load_32(rows + row * stride, d, dim) : _mm512_setzero_si512();
  transpose(x);
  for (int64_t i = 0; i < 16 && i < count; i++) _mm512_storeu_si512(out + i * 32, x[i]);
}

}  // namespace
