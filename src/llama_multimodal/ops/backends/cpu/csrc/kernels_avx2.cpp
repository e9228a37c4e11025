// AVX2: 8 outputs a vector, two vectors a tile; x in 16 bits, or in bytes where it is rounded to 8.
#define LANES 8
#include <immintrin.h>

#include "attend.h"
#include "dot_bf16.h"
#include "dot_tile.h"
#include "elementwise.h"
#include "kernels.h"
#include "round_row.h"
#include "unpack_tile.h"

namespace {

using llama_mm::BlockOfX;
using llama_mm::PackedWeight;
using llama_mm::RoundedX;
using llama_mm::Rounding;
constexpr int kBlock = llama_mm::kBlock, kFours = kBlock / 4;

template <bool INT4>
INLINE __m256i load_four(const uint8_t* values, int i) {  // inputs 4i to 4i + 3 of 8 rows, as unsigned bytes
  const __m256i w = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values + 64 * (INT4 ? i / 2 : i)));
  return INT4 ? _mm256_and_si256(i & 1 ? _mm256_srli_epi16(w, 4) : w, _mm256_set1_epi8(15)) : w;
}

// One block's products with digits of 16 bits, [t, digit] onto acc.
template <bool INT4, int DIGITS, int ROWS>
INLINE void add_words(const uint8_t* values, const int16_t* digits, __m256i (*acc)[DIGITS]) {
  const __m256i byte = _mm256_set1_epi16(255);
  for (int i = 0; i < kFours; i++) {
    const __m256i w = load_four<INT4>(values, i);
    const __m256i even = _mm256_and_si256(w, byte), odd = _mm256_srli_epi16(w, 8);
    for (int t = 0; t < ROWS; t++)
      for (int d = 0; d < DIGITS; d++) {
        int32_t pair[2];
        memcpy(pair, digits + (t * DIGITS + d) * kBlock + 4 * i, 8);
        const __m256i both = _mm256_add_epi32(_mm256_madd_epi16(even, _mm256_set1_epi32(pair[0])),
                                              _mm256_madd_epi16(odd, _mm256_set1_epi32(pair[1])));
        acc[t][d] = _mm256_add_epi32(acc[t][d], both);
      }
  }
}

// The same with bytes. Sums of two products must fit 16 bits: an int8 weight, which lies with 128 added, is multiplied
// without them and by its magnitude, and the 128 are added for the whole block.
template <bool INT4, int ROWS>
INLINE void add_bytes(const uint8_t* values, const int8_t* digits, __m256i (*acc)[1]) {
  const __m256i ones = _mm256_set1_epi16(1), middle = _mm256_set1_epi8(-128);
  __m256i pairs[ROWS];
  for (int t = 0; t < ROWS; t++) pairs[t] = _mm256_setzero_si256();
  for (int i = 0; i < kFours; i++) {
    const __m256i w = load_four<INT4>(values, i), value = _mm256_xor_si256(w, middle);
    const __m256i magnitude = INT4 ? w : _mm256_abs_epi8(value);
    for (int t = 0; t < ROWS; t++) {
      int32_t four;
      memcpy(&four, digits + t * kBlock + 4 * i, 4);
      const __m256i q = _mm256_set1_epi32(four);
      const __m256i two = _mm256_maddubs_epi16(magnitude, INT4 ? q : _mm256_sign_epi8(q, value));
      if (INT4)  // 16 products of at most 15 · 127 still fit
        pairs[t] = _mm256_add_epi16(pairs[t], two);
      else
        acc[t][0] = _mm256_add_epi32(acc[t][0], _mm256_madd_epi16(two, ones));
    }
  }
  if (INT4)
    for (int t = 0; t < ROWS; t++) acc[t][0] = _mm256_add_epi32(acc[t][0], _mm256_madd_epi16(pairs[t], ones));
}

template <bool INT4, bool ZEROS, Rounding ROUNDING, int ROWS>
void dot_half(const PackedWeight& weight, int64_t tile, int half, const RoundedX& x, float* sums) {
  constexpr int64_t bytes = kBlock * 16 / (INT4 ? 2 : 1);
  constexpr bool in_bytes = ROUNDING == llama_mm::kTo8Bits;
  constexpr int DIGITS = in_bytes ? 1 : 2 - ROUNDING;
  const int64_t blocks = weight.blocks, groups = blocks / weight.blocks_per_group;
  const uint8_t* values = weight.values + tile * blocks * bytes + 32 * half;
  const uint16_t* scales = weight.scales + tile * groups * 16 + 8 * half;
  const uint8_t* zeros = ZEROS ? weight.zeros + tile * groups * 16 + 8 * half : nullptr;
  __m256 out[ROWS];
  for (int t = 0; t < ROWS; t++) out[t] = _mm256_setzero_ps();

  for (int64_t group = 0, block = 0; group < groups; group++, scales += 16) {
    const __m256 scale = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(scales)));
    __m256 zero = _mm256_setzero_ps();
    if (ZEROS) {
      zero = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(zeros))));
      zeros += 16;
    }
    for (const int64_t end = block + weight.blocks_per_group; block < end; block++, values += bytes) {
      __m256i acc[ROWS][DIGITS];
      for (int t = 0; t < ROWS; t++)
        for (int d = 0; d < DIGITS; d++) {
          const BlockOfX& head = x.blocks[block * ROWS + t];
          const int32_t added = in_bytes && !INT4 ? 128 * static_cast<int32_t>(head.total[d]) : 0;
          acc[t][d] = _mm256_set1_epi32(head.start[d] + added);
        }
      const int64_t at = block * ROWS * DIGITS * kBlock;
      if constexpr (in_bytes)
        add_bytes<INT4, ROWS>(values, static_cast<const int8_t*>(x.digits) + at, acc);
      else
        add_words<INT4, DIGITS, ROWS>(values, static_cast<const int16_t*>(x.digits) + at, acc);
      for (int t = 0; t < ROWS; t++) {
        const BlockOfX& head = x.blocks[block * ROWS + t];
        __m256 total = _mm256_setzero_ps();
        for (int d = 0; d < DIGITS; d++) {
          __m256 part = _mm256_cvtepi32_ps(acc[t][d]);
          if (ZEROS) part = _mm256_fnmadd_ps(zero, _mm256_set1_ps(head.total[d]), part);
          total = d ? _mm256_fmadd_ps(total, _mm256_set1_ps(255.0f), part) : part;
        }
        out[t] = _mm256_fmadd_ps(total, _mm256_mul_ps(scale, _mm256_set1_ps(head.step)), out[t]);
      }
    }
  }
  for (int t = 0; t < ROWS; t++) _mm256_storeu_ps(sums + t * llama_mm::kTileRows + 8 * half, out[t]);
}

struct Product {
  static constexpr int kMostRows = 8;

  template <bool INT4, bool ZEROS, Rounding ROUNDING, int ROWS>
  static void dot(const PackedWeight& weight, int64_t tile, const RoundedX& x, float* sums) {
    for (int half = 0; half < 2; half++) dot_half<INT4, ZEROS, ROUNDING, ROWS>(weight, tile, half, x, sums);
  }
};

void round_words_or_bytes(const float* x, int64_t blocks, Rounding rounding, int middle, int rows, RoundedX to) {
  if (rounding == llama_mm::kTo8Bits) return round_row<int8_t>(x, blocks, rounding, middle, rows, to);
  round_row<int16_t>(x, blocks, rounding, middle, rows, to);
}

}  // namespace

namespace llama_mm {
extern const Kernels kAvx2 = {"avx2", Product::kMostRows, {4, 2, 1}, round_words_or_bytes, dot_tile<Product>,
                              nullptr, 0, unpack_tile, order_row, dot_bf16,
                              {attend<float>, attend<uint16_t>, attend<int8_t>, attend<Fp8>},
                              {elementwise<float>(), elementwise<uint16_t>()}};
}
