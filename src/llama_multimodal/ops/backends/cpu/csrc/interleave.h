// Rows side by side, as products in fp32 read them: [rows, columns] → fp32 [columns, kTogether].
#pragma once

#include "vec.h"

namespace {

constexpr int kVectors = LANES == 16 ? 4 : 2;  // whose sums, for six rows of the other factor, fill the registers
constexpr int kTogether = kVectors * LANES;    // rows that lie interleaved

// LANES vectors of 32-bit lanes: vector r's lane c becomes vector c's lane r.
#if defined(__AVX512F__)
INLINE void transpose(__m512i* x) {
  __m512i y[16];
  for (int i = 0; i < 16; i += 2) {
    y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
    y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int half = 0; half < 2; half++) {
      x[i + 2 * half] = _mm512_unpacklo_epi64(y[i + half], y[i + half + 2]);
      x[i + 2 * half + 1] = _mm512_unpackhi_epi64(y[i + half], y[i + half + 2]);
    }
  for (int i = 0; i < 4; i++) {
    y[i] = _mm512_shuffle_i32x4(x[i], x[i + 4], 0x88);
    y[i + 4] = _mm512_shuffle_i32x4(x[i], x[i + 4], 0xdd);
    y[i + 8] = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0x88);
    y[i + 12] = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; i++) {
    x[i] = _mm512_shuffle_i32x4(y[i], y[i + 8], 0x88);
    x[i + 8] = _mm512_shuffle_i32x4(y[i], y[i + 8], 0xdd);
    x[i + 4] = _mm512_shuffle_i32x4(y[i + 4], y[i + 12], 0x88);
    x[i + 12] = _mm512_shuffle_i32x4(y[i + 4], y[i + 12], 0xdd);
  }
}
typedef __m512i Lanes;
#elif defined(__AVX2__)
INLINE void transpose(__m256i* x) {
  __m256i y[8];
  for (int i = 0; i < 8; i += 2) {
    y[i] = _mm256_unpacklo_epi32(x[i], x[i + 1]);
    y[i + 1] = _mm256_unpackhi_epi32(x[i], x[i + 1]);
  }
  for (int i = 0; i < 8; i += 4)
    for (int half = 0; half < 2; half++) {
      x[i + 2 * half] = _mm256_unpacklo_epi64(y[i + half], y[i + half + 2]);
      x[i + 2 * half + 1] = _mm256_unpackhi_epi64(y[i + half], y[i + half + 2]);
    }
  for (int i = 0; i < 4; i++) {
    y[i] = _mm256_permute2x128_si256(x[i], x[i + 4], 0x20);
    y[i + 4] = _mm256_permute2x128_si256(x[i], x[i + 4], 0x31);
  }
  for (int i = 0; i < 8; i++) x[i] = y[i];
}
typedef __m256i Lanes;
#endif

// LANES rows of which `there` are there, the others zeros; `to` is their first lane.
template <typename T>
INLINE void interleave_plain(const T* rows, int64_t stride, int64_t there, int64_t from, int64_t columns, float* to) {
  for (int64_t d = from; d < columns; d++)
    for (int lane = 0; lane < LANES; lane++)
      to[d * kTogether + lane] = lane < there ? widen(rows[lane * stride + d]) : 0.0f;
}

INLINE void interleave_lanes(const float* rows, int64_t stride, int64_t there, int64_t columns, float* to) {
  interleave_plain(rows, stride, there, 0, columns, to);
}

// A lane of 32 bits holds two columns of a bf16 row: they are transposed as one.
INLINE void interleave_lanes(const uint16_t* rows, int64_t stride, int64_t there, int64_t columns, float* to) {
  int64_t d = 0;
  if (there >= LANES)
    for (; d + 2 * LANES <= columns; d += 2 * LANES) {
      Lanes pairs[LANES];
      for (int lane = 0; lane < LANES; lane++) memcpy(pairs + lane, rows + lane * stride + d, sizeof(Lanes));
      transpose(pairs);
      for (int i = 0; i < LANES; i++) {
        const Words both = bits<Words>(pairs[i]);
        store(to + (d + 2 * i) * kTogether, bits<Floats>(both << 16));
        store(to + (d + 2 * i + 1) * kTogether, bits<Floats>(both & 0xffff0000u));
      }
    }
  interleave_plain(rows, stride, there, d, columns, to);
}

// kTogether rows, or `there` of them and zeros.
template <typename T>
void interleave(const T* rows, int64_t stride, int64_t there, int64_t columns, float* out) {
  for (int first = 0; first < kTogether; first += LANES)
    interleave_lanes(rows + first * stride, stride, there - first, columns, out + first);
}

// sum[row][…] += ROWS rows of x [ROWS, columns] times kTogether interleaved rows [columns, kTogether].
template <int ROWS>
INLINE void add_products(const float* x, int64_t stride, const float* interleaved, int64_t columns,
                         Floats (*sum)[kVectors]) {
  for (int64_t d = 0; d < columns; d++, interleaved += kTogether) {
    Floats row[kVectors];
    for (int p = 0; p < kVectors; p++) row[p] = load(interleaved + p * LANES);
    for (int t = 0; t < ROWS; t++) {
      const Floats value = splat(x[t * stride + d]);
      for (int p = 0; p < kVectors; p++) sum[t][p] += value * row[p];
    }
  }
}

}  // namespace
