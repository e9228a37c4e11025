// A key or value of one head to 8 bits and a scale, bit for bit as ops/quantized_blocks.py rounds it.
#pragma once

#include <cmath>

#include "scalar.h"

namespace {

// The nearest e4m3 of a magnitude up to 448, ties to even.
inline uint8_t to_fp8(float x) {
  if (x < 0x1p-6f) return static_cast<uint8_t>(std::nearbyint(x * 512.0f));  // subnormal, or the least that is not
  uint32_t word;
  memcpy(&word, &x, sizeof(word));
  return static_cast<uint8_t>(((word + 0x7ffffu + (word >> 20 & 1u)) >> 20) - (120u << 3));
}

// x [dim] of `dtype` from the i-th on. What is not finite gets a scale that makes NaN of the whole row.
inline void quantize_row(const void* x, llama_mm::DType dtype, int64_t i, int64_t dim, llama_mm::DType to, uint8_t* out,
                         float* scale) {
  const float limit = to == llama_mm::kInt8 ? 127.0f : 448.0f;
  float largest = 0.0f;
  bool nan = false;
  for (int64_t d = 0; d < dim; d++) {
    const float magnitude = std::fabs(get(x, dtype, i + d));
    nan |= magnitude != magnitude;
    largest = magnitude > largest ? magnitude : largest;
  }
  *scale = nan ? NAN : largest / limit;
  const float step = *scale > 0.0f ? *scale : 1.0f;
  for (int64_t d = 0; d < dim; d++) {
    float value = get(x, dtype, i + d) / step;
    value = value != value ? 0.0f : value < -limit ? -limit : value > limit ? limit : value;
    if (to == llama_mm::kInt8)
      out[d] = static_cast<uint8_t>(static_cast<int8_t>(std::nearbyint(value)));
    else
      out[d] = static_cast<uint8_t>(to_fp8(std::fabs(value)) | (std::signbit(value) ? 0x80 : 0));
  }
}

}  // namespace
