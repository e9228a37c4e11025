// No special instructions: any processor, and the twin that the others are held against.
#define LANES 4
#include "kernels.h"

#include "attend.h"
#include "dot_bf16.h"
#include "elementwise.h"
#include "round_row.h"
#include "unpack_tile.h"

namespace {

using llama_mm::BlockOfX;
using llama_mm::PackedWeight;
using llama_mm::RoundedX;
using llama_mm::Rounding;
constexpr int kBlock = llama_mm::kBlock, kRows = llama_mm::kTileRows;

// Σ w · q of one block for 16 outputs, onto acc.
INLINE void dot_block(const uint8_t* values, bool int4, const int16_t* q, int32_t* acc) {
  for (int four = 0; four < kBlock / 4; four++, q += 4) {
    const uint8_t* w = values + 64 * (int4 ? four / 2 : four);
    const int shift = int4 && four & 1 ? 4 : 0, mask = int4 ? 15 : 255;
    for (int row = 0; row < kRows; row++) {
      const uint8_t* at = w + 4 * row;
      acc[row] += (at[0] >> shift & mask) * q[0] + (at[2] >> shift & mask) * q[1] + (at[1] >> shift & mask) * q[2] +
                  (at[3] >> shift & mask) * q[3];
    }
  }
}

void dot_tile(const PackedWeight& weight, int64_t tile, const RoundedX& x, int rows, Rounding rounding, float* sums) {
  const int count = rounding == llama_mm::kForFloat32 ? 2 : 1;
  const int64_t bytes = kBlock * kRows / (weight.int4 ? 2 : 1);
  const int64_t blocks = weight.blocks, groups = blocks / weight.blocks_per_group;
  const uint8_t* values = weight.values + tile * blocks * bytes;
  for (int i = 0; i < rows * kRows; i++) sums[i] = 0.0f;
  for (int64_t block = 0; block < blocks; block++, values += bytes) {
    const int64_t group = (tile * groups + block / weight.blocks_per_group) * kRows;
    for (int t = 0; t < rows; t++) {
      const BlockOfX& head = x.blocks[block * rows + t];
      const int16_t* q = static_cast<const int16_t*>(x.digits) + (block * rows + t) * count * kBlock;
      float total[kRows] = {};
      for (int d = 0; d < count; d++) {
        int32_t acc[kRows];
        for (int row = 0; row < kRows; row++) acc[row] = head.start[d];
        dot_block(values, weight.int4, q + d * kBlock, acc);
        for (int row = 0; row < kRows; row++) {
          const float zero = weight.zeros ? weight.zeros[group + row] : 0.0f;
          total[row] = total[row] * 255.0f + (static_cast<float>(acc[row]) - zero * head.total[d]);
        }
      }
      for (int row = 0; row < kRows; row++)
        sums[t * kRows + row] += total[row] * (half_to_float(weight.scales[group + row]) * head.step);
    }
  }
}

}  // namespace

namespace llama_mm {
extern const Kernels kPlain = {"plain", 8, {4, 2, 2}, round_row<int16_t>, dot_tile,
                               nullptr, 0, unpack_tile, order_row, kDotRows, dot_bf16,
                               {attend<float>, attend<uint16_t>, attend<int8_t>, attend<Fp8>},
                               {elementwise<float>(), elementwise<uint16_t>()}};
}
