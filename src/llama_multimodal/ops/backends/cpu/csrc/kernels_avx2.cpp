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

constexpr int kSums = 8;  // vectors of sums that are kept in registers

INLINE __m256i load(const uint8_t* values) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values)); }

// Inputs 4i to 4i + 7 of 8 rows, i even, as unsigned bytes: four inputs a lane, in two vectors.
template <bool INT4>
INLINE void load_eight(const uint8_t* values, int i, __m256i* w) {
  const __m256i low = _mm256_set1_epi8(15), both = load(values + (INT4 ? 32 : 64) * i);
  w[0] = INT4 ? _mm256_and_si256(both, low) : both;
  w[1] = INT4 ? _mm256_and_si256(_mm256_srli_epi16(both, 4), low) : load(values + 64 * (i + 1));
}

INLINE __m256i broadcast(const void* four) {
  int32_t bits;
  memcpy(&bits, four, 4);
  return _mm256_set1_epi32(bits);
}

// One block's products with digits of 16 bits, onto acc [half, t, digit]; digits: those of its first row. Not unrolled:
// GCC would spill the products of a whole block.
template <bool INT4, int DIGITS, int ROWS, int HALVES>
INLINE void add_words(const uint8_t* values, const int16_t* digits, __m256i (*acc)[ROWS][DIGITS]) {
  const __m256i byte = _mm256_set1_epi16(255);
#pragma GCC unroll 1
  for (int i = 0; i < kFours; i += 2)
    for (int half = 0; half < HALVES; half++) {
      __m256i w[2], even[2], odd[2];
      load_eight<INT4>(values + 32 * half, i, w);
      for (int k = 0; k < 2; k++) even[k] = _mm256_and_si256(w[k], byte), odd[k] = _mm256_srli_epi16(w[k], 8);
      for (int t = 0; t < ROWS; t++)
        for (int d = 0; d < DIGITS; d++) {
          const int16_t* q = digits + (t * DIGITS + d) * kBlock + 4 * i;
          __m256i part[4];
          for (int k = 0; k < 2; k++) {
            part[2 * k] = _mm256_madd_epi16(even[k], broadcast(q + 4 * k));
            part[2 * k + 1] = _mm256_madd_epi16(odd[k], broadcast(q + 4 * k + 2));
          }
          const __m256i sum = _mm256_add_epi32(_mm256_add_epi32(part[0], part[1]), _mm256_add_epi32(part[2], part[3]));
          acc[half][t][d] = _mm256_add_epi32(acc[half][t][d], sum);
        }
    }
}

// The same with bytes. Sums of two products must fit 16 bits: an int8 weight, which lies with 128 added, is multiplied
// without them and by its magnitude, and the 128 are added for the whole block.
template <bool INT4, int ROWS, int HALVES>
INLINE void add_bytes(const uint8_t* values, const int8_t* digits, __m256i (*acc)[ROWS][1]) {
  const __m256i ones = _mm256_set1_epi16(1), middle = _mm256_set1_epi8(-128);
  __m256i pairs[HALVES][ROWS];
  for (int half = 0; half < HALVES; half++)
    for (int t = 0; t < ROWS; t++) pairs[half][t] = _mm256_setzero_si256();
#pragma GCC unroll 1
  for (int i = 0; i < kFours; i += 2)
    for (int half = 0; half < HALVES; half++) {
      __m256i w[2];
      load_eight<INT4>(values + 32 * half, i, w);
      for (int t = 0; t < ROWS; t++) {
        const int8_t* q = digits + t * kBlock + 4 * i;
        if (INT4) {  // 16 products of at most 15 · 127 still fit
          const __m256i two = _mm256_add_epi16(_mm256_maddubs_epi16(w[0], broadcast(q)),
                                               _mm256_maddubs_epi16(w[1], broadcast(q + 4)));
          pairs[half][t] = _mm256_add_epi16(pairs[half][t], two);
        } else {
          __m256i four[2];
          for (int k = 0; k < 2; k++) {
            const __m256i value = _mm256_xor_si256(w[k], middle);
            const __m256i signed_q = _mm256_sign_epi8(broadcast(q + 4 * k), value);
            four[k] = _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_abs_epi8(value), signed_q), ones);
          }
          acc[half][t][0] = _mm256_add_epi32(acc[half][t][0], _mm256_add_epi32(four[0], four[1]));
        }
      }
    }
  if (INT4)
    for (int half = 0; half < HALVES; half++)
      for (int t = 0; t < ROWS; t++)
        acc[half][t][0] = _mm256_add_epi32(acc[half][t][0], _mm256_madd_epi16(pairs[half][t], ones));
}

// A tile's outputs, or with HALVES 1 the first or the last 8 of them, against SOME of the ROWS rows of x, from `first` on.
template <bool INT4, bool ZEROS, Rounding ROUNDING, int ROWS, int SOME, int HALVES>
void dot_part(const PackedWeight& weight, int64_t tile, int half, const RoundedX& x, int first, float* sums) {
  constexpr int64_t bytes = kBlock * 16 / (INT4 ? 2 : 1);
  constexpr bool in_bytes = ROUNDING == llama_mm::kTo8Bits;
  constexpr int DIGITS = in_bytes ? 1 : 2 - ROUNDING;
  const int64_t blocks = weight.blocks, groups = blocks / weight.blocks_per_group;
  const uint8_t* values = weight.values + tile * blocks * bytes + 32 * half;
  const uint16_t* scales = weight.scales + tile * groups * 16 + 8 * half;
  const uint8_t* zeros = ZEROS ? weight.zeros + tile * groups * 16 + 8 * half : nullptr;
  __m256 out[HALVES][SOME];
  for (int h = 0; h < HALVES; h++)
    for (int t = 0; t < SOME; t++) out[h][t] = _mm256_setzero_ps();

  for (int64_t group = 0, block = 0; group < groups; group++, scales += 16) {
    __builtin_prefetch(reinterpret_cast<const char*>(scales) + kBytesAhead, 0, 2);
    __m256 scale[HALVES], zero[HALVES];
    for (int h = 0; h < HALVES; h++) {
      scale[h] = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(scales + 8 * h)));
      if (ZEROS) {
        const __m128i eight = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(zeros + 8 * h));
        zero[h] = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(eight));
      }
    }
    if (ZEROS) zeros += 16;
    for (const int64_t end = block + weight.blocks_per_group; block < end; block++, values += bytes) {
      for (int64_t line = 0; line < bytes; line += 64) __builtin_prefetch(values + kBytesAhead + line, 0, 2);
      const BlockOfX* heads = x.blocks + block * ROWS + first;
      __m256i acc[HALVES][SOME][DIGITS];
      for (int h = 0; h < HALVES; h++)
        for (int t = 0; t < SOME; t++)
          for (int d = 0; d < DIGITS; d++) {
            const int32_t added = in_bytes && !INT4 ? 128 * static_cast<int32_t>(heads[t].total[d]) : 0;
            acc[h][t][d] = _mm256_set1_epi32(heads[t].start[d] + added);
          }
      const int64_t at = (block * ROWS + first) * DIGITS * kBlock;
      if constexpr (in_bytes)
        add_bytes<INT4, SOME, HALVES>(values, static_cast<const int8_t*>(x.digits) + at, acc);
      else
        add_words<INT4, DIGITS, SOME, HALVES>(values, static_cast<const int16_t*>(x.digits) + at, acc);
      for (int h = 0; h < HALVES; h++)
        for (int t = 0; t < SOME; t++) {
          __m256 total = _mm256_setzero_ps();
          for (int d = 0; d < DIGITS; d++) {
            __m256 part = _mm256_cvtepi32_ps(acc[h][t][d]);
            if (ZEROS) part = _mm256_fnmadd_ps(zero[h], _mm256_set1_ps(heads[t].total[d]), part);
            total = d ? _mm256_fmadd_ps(total, _mm256_set1_ps(255.0f), part) : part;
          }
          out[h][t] = _mm256_fmadd_ps(total, _mm256_mul_ps(scale[h], _mm256_set1_ps(heads[t].step)), out[h][t]);
        }
    }
  }
  for (int h = 0; h < HALVES; h++)
    for (int t = 0; t < SOME; t++)
      _mm256_storeu_ps(sums + (first + t) * llama_mm::kTileRows + 8 * (half + h), out[h][t]);
}

struct Product {
  static constexpr int kMostRows = 8;

  template <bool INT4, bool ZEROS, Rounding ROUNDING, int ROWS>
  static void dot(const PackedWeight& weight, int64_t tile, const RoundedX& x, float* sums) {
    constexpr int DIGITS = ROUNDING == llama_mm::kTo8Bits ? 1 : 2 - ROUNDING;
    constexpr int SOME = ROWS < kSums / DIGITS ? ROWS : kSums / DIGITS, REST = ROWS % SOME;
    constexpr int HALVES = 2 * SOME * DIGITS <= kSums ? 2 : 1;
    for (int half = 0; half < 2; half += HALVES) {
      for (int first = 0; first + SOME <= ROWS; first += SOME)
        dot_part<INT4, ZEROS, ROUNDING, ROWS, SOME, HALVES>(weight, tile, half, x, first, sums);
      if constexpr (REST > 0)
        dot_part<INT4, ZEROS, ROUNDING, ROWS, REST, HALVES>(weight, tile, half, x, ROWS - REST, sums);
    }
  }
};

void round_words_or_bytes(const float* x, int64_t blocks, Rounding rounding, int middle, int rows, RoundedX to) {
  if (rounding == llama_mm::kTo8Bits) return round_row<int8_t>(x, blocks, rounding, middle, rows, to);
  round_row<int16_t>(x, blocks, rounding, middle, rows, to);
}

}  // namespace

namespace llama_mm {
extern const Kernels kAvx2 = {"avx2", Product::kMostRows, {4, 2, 1}, round_words_or_bytes, dot_tile<Product>,
                              nullptr, 0, unpack_tile, order_row, kDotRows, dot_bf16,
                              {attend<float>, attend<uint16_t>, attend<int8_t>, attend<Fp8>},
                              {elementwise<float>(), elementwise<uint16_t>()}};
}
