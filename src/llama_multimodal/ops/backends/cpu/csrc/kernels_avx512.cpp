// AVX-512 with VNNI: 16 outputs a vector, four inputs a lane.
#define LANES 16
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

// The 16 rows' values of one block as unsigned bytes: w[i] holds inputs 4i to 4i + 3 of every row.
template <bool INT4>
INLINE void load_block(const uint8_t* values, __m512i* w) {
  if (!INT4) {
    for (int i = 0; i < kFours; i++) w[i] = _mm512_loadu_si512(values + 64 * i);
    return;
  }
  const __m512i low = _mm512_set1_epi8(15);
  for (int i = 0; i < kFours / 2; i++) {
    const __m512i both = _mm512_loadu_si512(values + 64 * i);
    w[2 * i] = _mm512_and_si512(both, low);
    w[2 * i + 1] = _mm512_and_si512(_mm512_srli_epi16(both, 4), low);
  }
}

// PAST_CACHES: how what lies ahead is asked for: a page ahead into the second cache, or two past the outer ones.
template <bool PAST_CACHES>
struct Product {
  static constexpr int kMostRows = 16;  // half the registers

  static INLINE void ask_ahead(const void* from) {
    const char* const at = static_cast<const char*>(from);
    if constexpr (PAST_CACHES)
      __builtin_prefetch(at + 2 * kBytesAhead, 0, 0);
    else
      __builtin_prefetch(at + kBytesAhead, 0, 2);
  }

  template <bool INT4, bool ZEROS, Rounding ROUNDING, int ROWS>
  static void dot(const PackedWeight& weight, int64_t tile, const RoundedX& x, float* sums) {
    constexpr int DIGITS = 3 - ROUNDING;
    constexpr int64_t bytes = kBlock * 16 / (INT4 ? 2 : 1);
    const int64_t blocks = weight.blocks, groups = blocks / weight.blocks_per_group;
    const uint8_t* values = weight.values + tile * blocks * bytes;
    const uint16_t* scales = weight.scales + tile * groups * 16;
    const uint8_t* zeros = ZEROS ? weight.zeros + tile * groups * 16 : nullptr;
    const int8_t* digits = static_cast<const int8_t*>(x.digits);
    __m512 out[ROWS];
    for (int t = 0; t < ROWS; t++) out[t] = _mm512_setzero_ps();

    for (int64_t group = 0, block = 0; group < groups; group++, scales += 16) {
      ask_ahead(scales);
      const __m512 scale = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(scales)));
      __m512 zero = _mm512_setzero_ps();
      if (ZEROS) {
        zero = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(zeros))));
        zeros += 16;
      }
      for (const int64_t end = block + weight.blocks_per_group; block < end; block++, values += bytes) {
        __m512i w[kFours];
        for (int64_t line = 0; line < bytes; line += 64) ask_ahead(values + line);
        load_block<INT4>(values, w);
        for (int t = 0; t < ROWS; t++) {
          const BlockOfX& head = x.blocks[block * ROWS + t];
          const int8_t* q = digits + (block * ROWS + t) * DIGITS * kBlock;
          __m512i acc[DIGITS];
          for (int d = 0; d < DIGITS; d++) acc[d] = _mm512_set1_epi32(head.start[d]);
          for (int i = 0; i < kFours; i++)
            for (int d = 0; d < DIGITS; d++) {
              int32_t four;
              memcpy(&four, q + d * kBlock + 4 * i, 4);
              acc[d] = _mm512_dpbusd_epi32(acc[d], w[i], _mm512_set1_epi32(four));
            }
          __m512 total = _mm512_setzero_ps();
          for (int d = 0; d < DIGITS; d++) {
            __m512 part = _mm512_cvtepi32_ps(acc[d]);  // exact: below 2^24
            if (ZEROS) part = _mm512_fnmadd_ps(zero, _mm512_set1_ps(head.total[d]), part);
            total = d ? _mm512_fmadd_ps(total, _mm512_set1_ps(255.0f), part) : part;
          }
          out[t] = _mm512_fmadd_ps(total, _mm512_mul_ps(scale, _mm512_set1_ps(head.step)), out[t]);
        }
      }
    }
    for (int t = 0; t < ROWS; t++) _mm512_storeu_ps(sums + t * llama_mm::kTileRows, out[t]);
  }
};

constexpr int kPairRows = 6;  // two sums and two outputs of each in registers

// Two tiles at once: a broadcast of x serves both, and a load of the weight six rows.
template <bool INT4, bool ZEROS>
void dot_two(const PackedWeight& weight, int64_t tile, const RoundedX& x, float* sums) {
  constexpr int64_t bytes = kBlock * 16 / (INT4 ? 2 : 1);
  const int64_t blocks = weight.blocks, groups = blocks / weight.blocks_per_group;
  const uint8_t* values = weight.values + tile * blocks * bytes;
  const uint16_t* scales = weight.scales + tile * groups * 16;
  const uint8_t* zeros = ZEROS ? weight.zeros + tile * groups * 16 : nullptr;
  const int8_t* q = static_cast<const int8_t*>(x.digits);
  const BlockOfX* heads = x.blocks;
  const __m512i low = _mm512_set1_epi8(15);
  __m512 out[kPairRows][2];
  for (int t = 0; t < kPairRows; t++) out[t][0] = out[t][1] = _mm512_setzero_ps();

  for (int64_t group = 0, block = 0; group < groups; group++) {
    __m512 scale[2], zero[2];
    for (int n = 0; n < 2; n++) {
      const int64_t at = (n * groups + group) * 16;
      scale[n] = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(scales + at)));
      if (ZEROS)
        zero[n] = _mm512_cvtepi32_ps(
            _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(zeros + at))));
    }
    for (const int64_t end = block + weight.blocks_per_group; block < end;
         block++, heads += kPairRows, q += kPairRows * kBlock) {
      __m512i acc[kPairRows][2];
      for (int t = 0; t < kPairRows; t++) acc[t][0] = acc[t][1] = _mm512_set1_epi32(heads[t].start[0]);
      const uint8_t* at = values + block * bytes;
      for (int i = 0; i < kFours; i++) {
        __m512i w[2];
        for (int n = 0; n < 2; n++) {
          const uint8_t* from = at + n * blocks * bytes + 64 * (INT4 ? i / 2 : i);
          w[n] = _mm512_loadu_si512(from);
          if (INT4) w[n] = _mm512_and_si512(i % 2 ? _mm512_srli_epi16(w[n], 4) : w[n], low);
        }
        for (int t = 0; t < kPairRows; t++) {
          int32_t four;
          memcpy(&four, q + t * kBlock + 4 * i, 4);
          const __m512i row = _mm512_set1_epi32(four);
          for (int n = 0; n < 2; n++) acc[t][n] = _mm512_dpbusd_epi32(acc[t][n], w[n], row);
        }
      }
      for (int t = 0; t < kPairRows; t++)
        for (int n = 0; n < 2; n++) {
          __m512 part = _mm512_cvtepi32_ps(acc[t][n]);
          if (ZEROS) part = _mm512_fnmadd_ps(zero[n], _mm512_set1_ps(heads[t].total[0]), part);
          out[t][n] = _mm512_fmadd_ps(part, _mm512_mul_ps(scale[n], _mm512_set1_ps(heads[t].step)), out[t][n]);
        }
    }
  }
  for (int t = 0; t < kPairRows; t++)
    for (int n = 0; n < 2; n++) _mm512_storeu_ps(sums + (n * kPairRows + t) * llama_mm::kTileRows, out[t][n]);
}

void dot_pair(const PackedWeight& weight, int64_t tile, const RoundedX& x, float* sums) {
  const auto dot = weight.int4 ? weight.zeros ? dot_two<true, true> : dot_two<true, false>
                               : weight.zeros ? dot_two<false, true> : dot_two<false, false>;
  dot(weight, tile, x, sums);
}

}  // namespace

namespace llama_mm {
extern const DotTile kDotTilePastCaches = dot_tile<Product<true>>;
extern const Kernels kAvx512 = {"avx512", Product<false>::kMostRows, {3, 2, 1}, round_row<int8_t>,
                                dot_tile<Product<false>>, dot_pair, kPairRows, unpack_tile, order_row, kDotRows, dot_bf16,
                                {attend<float>, attend<uint16_t>, attend<int8_t>, attend<Fp8>},
                                {elementwise<float>(), elementwise<uint16_t>()}};
}
