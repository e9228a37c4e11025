// AVX2: 8 outputs a vector, two vectors a tile; x in 16 bits, so that int8 weights do not saturate.
#define LANES 8
#include <immintrin.h>

#include "attend.h"
#include "dot_bf16.h"
#include "dot_tile.h"
#include "kernels.h"
#include "round_row.h"
#include "unpack_tile.h"

namespace {

using llama_mm::BlockOfX;
using llama_mm::PackedWeight;
using llama_mm::RoundedX;
constexpr int kBlock = llama_mm::kBlock, kFours = kBlock / 4;

template <bool INT4, bool ZEROS, int DIGITS, int ROWS>
void dot_half(const PackedWeight& weight, int64_t tile, int half, const RoundedX& x, float* sums) {
  constexpr int64_t bytes = kBlock * 16 / (INT4 ? 2 : 1);
  const int64_t blocks = weight.blocks, groups = blocks / weight.blocks_per_group;
  const uint8_t* values = weight.values + tile * blocks * bytes + 32 * half;
  const uint16_t* scales = weight.scales + tile * groups * 16 + 8 * half;
  const uint8_t* zeros = ZEROS ? weight.zeros + tile * groups * 16 + 8 * half : nullptr;
  const int16_t* digits = static_cast<const int16_t*>(x.digits);
  const __m256i byte = _mm256_set1_epi16(255), nibbles = _mm256_set1_epi8(15);
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
        for (int d = 0; d < DIGITS; d++)
          acc[t][d] = ZEROS ? _mm256_setzero_si256() : _mm256_set1_epi32(x.blocks[t * blocks + block].start[d]);
      for (int i = 0; i < kFours; i++) {
        __m256i w = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values + 64 * (INT4 ? i / 2 : i)));
        if (INT4) w = _mm256_and_si256(i & 1 ? _mm256_srli_epi16(w, 4) : w, nibbles);
        const __m256i even = _mm256_and_si256(w, byte), odd = _mm256_srli_epi16(w, 8);
        for (int t = 0; t < ROWS; t++)
          for (int d = 0; d < DIGITS; d++) {
            int32_t pair[2];
            memcpy(pair, digits + ((t * blocks + block) * DIGITS + d) * kBlock + 4 * i, 8);
            const __m256i both = _mm256_add_epi32(_mm256_madd_epi16(even, _mm256_set1_epi32(pair[0])),
                                                  _mm256_madd_epi16(odd, _mm256_set1_epi32(pair[1])));
            acc[t][d] = _mm256_add_epi32(acc[t][d], both);
          }
      }
      for (int t = 0; t < ROWS; t++) {
        const BlockOfX& head = x.blocks[t * blocks + block];
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
  for (int t = 0; t < ROWS; t++)
    for (int n = 0; n < 8; n++) sums[(8 * half + n) * llama_mm::kMaxRows + t] = out[t][n];
}

struct Product {
  template <bool INT4, bool ZEROS, int DIGITS, int ROWS>
  static void dot(const PackedWeight& weight, int64_t tile, const RoundedX& x, float* sums) {
    for (int half = 0; half < 2; half++) dot_half<INT4, ZEROS, DIGITS, ROWS>(weight, tile, half, x, sums);
  }
};

}  // namespace

namespace llama_mm {
extern const Kernels kAvx2 = {"avx2",      {4, 2},    round_row<int16_t>, dot_tile<Product, 1>,
                              unpack_tile, order_row, dot_bf16,           {attend<float>, attend<uint16_t>}};
}
