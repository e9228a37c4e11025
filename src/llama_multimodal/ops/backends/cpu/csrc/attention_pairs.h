// Attention of many queries in products of bf16 pairs, with AVX-512: what the kernels share, with the matrix unit or not.
// Sums, scores and softmax are in fp32, and only a weight is rounded to bf16 before it meets the values, as torch does.
//
// Shapes: S keys · D head dim, Dp rounded up to the kernel's padding
#pragma once

#include <immintrin.h>

#include <cmath>

#include "attention.h"
#include "pairs.h"
#include "vec.h"

namespace {

using llama_mm::kTile;

// kTile rows (fewer at the end) → [kTile/16, Dp/2, 16, 2].
INLINE void order_pairs_of_inputs(const void* from, int64_t stride, int64_t count, int64_t dim, int64_t padding,
                                  void* to) {
  const int64_t padded = llama_mm::padded_dim(dim, padding);
  const uint16_t* rows = static_cast<const uint16_t*>(from);
  uint16_t* out = static_cast<uint16_t*>(to);
  for (int64_t first = 0; first < kTile; first += 16, out += 16 * padded)
    for (int64_t d = 0; d < padded; d += 32)
      order_pairs(rows + first * stride, stride, count - first, d, dim, (padded - d) / 2, out + d * 16);
}

// The values of keys `key` and the one behind it, of 16 inputs from d on: [16, 2]; zeros where there is none.
INLINE __m512i pair_of_values(const void* v, int64_t stride, int64_t key, int64_t count, int64_t d, int64_t dim) {
  auto widened = [=](int64_t key) {
    const uint16_t* row = static_cast<const uint16_t*>(v) + key * stride;
    return key < count ? _mm512_cvtepu16_epi32(_mm512_castsi512_si256(load_32(row, d, dim))) : _mm512_setzero_si512();
  };
  return _mm512_or_si512(widened(key), _mm512_slli_epi32(widened(key + 1), 16));
}

// 2^x for x <= 0, within 3e-6: a weight is rounded to 8 bits behind it.
INLINE __m512 exp2_below(__m512 x) {
  const __m512 f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);  // what is above a whole number
  __m512 p = _mm512_set1_ps(1.35341678e-02f);  // least relative error over 0 to 1, fitted
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.20114638e-02f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.41442755e-01f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.93003833e-01f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.00000262e+00f));
  return _mm512_scalef_ps(p, x);  // by the whole number below x
}

}  // namespace
