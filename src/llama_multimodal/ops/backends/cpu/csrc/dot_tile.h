// `dot_tile` of an instruction set, from a product that is compiled for every kind of weight, rounding and number of rows.
//
// Product::dot<INT4, ZEROS, ROUNDING, ROWS>(weight, tile, x, sums) sums one tile's outputs against ROWS rows of x, up to 8
// of them, or Product::kMostRows at once.
#pragma once

#include "kernels.h"

namespace {  // as in vec.h: each instruction set has its own

using llama_mm::PackedWeight;
using llama_mm::RoundedX;
using llama_mm::Rounding;

template <typename Product, bool INT4, bool ZEROS, Rounding ROUNDING>
void dot_rows(const PackedWeight& weight, int64_t tile, const RoundedX& x, int rows, float* sums) {
  constexpr int most = Product::kMostRows;
  if (rows == most) return Product::template dot<INT4, ZEROS, ROUNDING, most>(weight, tile, x, sums);
  switch (rows) {
    case 1: return Product::template dot<INT4, ZEROS, ROUNDING, 1>(weight, tile, x, sums);
    case 2: return Product::template dot<INT4, ZEROS, ROUNDING, 2>(weight, tile, x, sums);
    case 3: return Product::template dot<INT4, ZEROS, ROUNDING, 3>(weight, tile, x, sums);
    case 4: return Product::template dot<INT4, ZEROS, ROUNDING, 4>(weight, tile, x, sums);
    case 5: return Product::template dot<INT4, ZEROS, ROUNDING, 5>(weight, tile, x, sums);
    case 6: return Product::template dot<INT4, ZEROS, ROUNDING, 6>(weight, tile, x, sums);
    case 7: return Product::template dot<INT4, ZEROS, ROUNDING, 7>(weight, tile, x, sums);
    default: return Product::template dot<INT4, ZEROS, ROUNDING, 8>(weight, tile, x, sums);
  }
}

template <typename Product, bool INT4, bool ZEROS>
void dot_rounded(const PackedWeight& weight, int64_t tile, const RoundedX& x, int rows, Rounding rounding,
                 float* sums) {
  switch (rounding) {
    case llama_mm::kForFloat32: return dot_rows<Product, INT4, ZEROS, llama_mm::kForFloat32>(weight, tile, x, rows, sums);
    case llama_mm::kForBFloat16: return dot_rows<Product, INT4, ZEROS, llama_mm::kForBFloat16>(weight, tile, x, rows, sums);
    default: return dot_rows<Product, INT4, ZEROS, llama_mm::kTo8Bits>(weight, tile, x, rows, sums);
  }
}

template <typename Product>
void dot_tile(const PackedWeight& weight, int64_t tile, const RoundedX& x, int rows, Rounding rounding, float* sums) {
  if (weight.int4) {
    if (weight.zeros) return dot_rounded<Product, true, true>(weight, tile, x, rows, rounding, sums);
    return dot_rounded<Product, true, false>(weight, tile, x, rows, rounding, sums);
  }
  if (weight.zeros) return dot_rounded<Product, false, true>(weight, tile, x, rows, rounding, sums);
  dot_rounded<Product, false, false>(weight, tile, x, rows, rounding, sums);
}

}  // namespace
