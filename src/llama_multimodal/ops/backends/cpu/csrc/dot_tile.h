// `dot_tile` of an instruction set, from a product that is compiled for every kind of weight and number of rows.
//
// Product::dot<INT4, ZEROS, DIGITS, ROWS>(weight, tile, x, sums) sums one tile's outputs against ROWS rows of x.
#pragma once

#include "kernels.h"

namespace {  // as in vec.h: each instruction set has its own

using llama_mm::DType;
using llama_mm::PackedWeight;
using llama_mm::RoundedX;

template <typename Product, bool INT4, bool ZEROS, int DIGITS>
void dot_rows(const PackedWeight& weight, int64_t tile, const RoundedX& x, int rows, float* sums) {
  switch (rows) {
    case 1: return Product::template dot<INT4, ZEROS, DIGITS, 1>(weight, tile, x, sums);
    case 2: return Product::template dot<INT4, ZEROS, DIGITS, 2>(weight, tile, x, sums);
    case 3: return Product::template dot<INT4, ZEROS, DIGITS, 3>(weight, tile, x, sums);
    case 4: return Product::template dot<INT4, ZEROS, DIGITS, 4>(weight, tile, x, sums);
    case 5: return Product::template dot<INT4, ZEROS, DIGITS, 5>(weight, tile, x, sums);
    case 6: return Product::template dot<INT4, ZEROS, DIGITS, 6>(weight, tile, x, sums);
    case 7: return Product::template dot<INT4, ZEROS, DIGITS, 7>(weight, tile, x, sums);
    default: return Product::template dot<INT4, ZEROS, DIGITS, 8>(weight, tile, x, sums);
  }
}

// A value of x has BF16_DIGITS digits in bf16, one more in fp32.
template <typename Product, int BF16_DIGITS, bool INT4, bool ZEROS>
void dot_digits(const PackedWeight& weight, int64_t tile, const RoundedX& x, int rows, DType dtype, float* sums) {
  if (dtype == llama_mm::kBFloat16) return dot_rows<Product, INT4, ZEROS, BF16_DIGITS>(weight, tile, x, rows, sums);
  dot_rows<Product, INT4, ZEROS, BF16_DIGITS + 1>(weight, tile, x, rows, sums);
}

template <typename Product, int BF16_DIGITS>
void dot_tile(const PackedWeight& weight, int64_t tile, const RoundedX& x, int rows, DType dtype, float* sums) {
  if (weight.int4) {
    if (weight.zeros) return dot_digits<Product, BF16_DIGITS, true, true>(weight, tile, x, rows, dtype, sums);
    return dot_digits<Product, BF16_DIGITS, true, false>(weight, tile, x, rows, dtype, sums);
  }
  if (weight.zeros) return dot_digits<Product, BF16_DIGITS, false, true>(weight, tile, x, rows, dtype, sums);
  dot_digits<Product, BF16_DIGITS, false, false>(weight, tile, x, rows, dtype, sums);
}

}  // namespace
