// A tile of a packed weight back to values, for products with many rows of x.
#pragma once

#include "kernels.h"
#include "vec.h"

namespace {

typedef uint32_t Fours __attribute__((vector_size(LANES)));  // four values a word

template <bool INT4, typename T>
void unpack(const llama_mm::PackedWeight& weight, int64_t tile, T* out) {
  constexpr int kBlock = llama_mm::kBlock, kRows = llama_mm::kTileRows, bytes = kBlock * kRows / (INT4 ? 2 : 1);
  const int64_t groups = weight.blocks / weight.blocks_per_group;
  for (int row = 0; row < kRows; row++) {  // one after the other, so that they are written as streams
    const uint8_t* values = weight.values + tile * weight.blocks * bytes + row * 4;
    for (int64_t group = tile * groups; group < (tile + 1) * groups; group++) {
      const float scale = half_to_float(weight.scales[group * kRows + row]);
      const int zero = weight.zeros ? weight.zeros[group * kRows + row] : INT4 ? 8 : 128;
      for (int64_t block = 0; block < weight.blocks_per_group; block++, values += bytes, out += kBlock)
        for (int i = 0; i < kBlock; i += LANES) {
          Fours stored = {};
          for (int j = 0; j < LANES / 4; j++) {
            const int four = i / 4 + j;
            uint32_t word;
            memcpy(&word, values + (INT4 ? four / 2 : four) * 64, 4);
            if (INT4) word = (four & 1 ? word >> 4 : word) & 0x0f0f0f0fu;
            stored[j] = word;
          }
          const Ints from_zero = bits<Ints>(words(bits<Bytes>(stored))) - zero;
          put(out + i, __builtin_convertvector(from_zero, Floats) * scale);
        }
    }
  }
}

template <typename T>
void unpack_as(const llama_mm::PackedWeight& weight, int64_t tile, void* out) {
  if (weight.int4) return unpack<true>(weight, tile, static_cast<T*>(out));
  unpack<false>(weight, tile, static_cast<T*>(out));
}

void unpack_tile(const llama_mm::PackedWeight& weight, int64_t tile, llama_mm::DType dtype, void* out) {
  if (dtype == llama_mm::kFloat32) return unpack_as<float>(weight, tile, out);
  unpack_as<uint16_t>(weight, tile, out);
}

}  // namespace
