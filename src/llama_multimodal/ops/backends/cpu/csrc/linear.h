// Linear layers of many rows: in fp32 products with a bf16 weight, and on a matrix unit. What an instruction set provides,
// and the drivers (linear.cpp, packed_linear.cpp) use.
//
// Shapes: K inputs · O outputs that are computed together
#pragma once

#include <cstdint>

#include "kernels.h"

namespace llama_mm {

constexpr int kRowsTogether = 6;  // of x

struct WideProduct {
  int outputs;  // O
  // O rows of a weight, or `there` of them and zeros → fp32 [inputs, O].
  void (*order_weights)(const uint16_t* weight, int64_t stride, int64_t there, int64_t inputs, float* out);
  void (*widen)(const uint16_t* x, int64_t count, float* out);
  // sums [kRowsTogether, O] of as many rows of x against ordered weights; added to what is there, or put there.
  void (*multiply)(const float* x, int64_t stride, const float* weight, int64_t inputs, bool add, float* sums);
  // out [there] = sums + bias, in bf16; both have O values.
  void (*finish)(const float* sums, const float* bias, int64_t there, uint16_t* out);
};

// What the instruction set in use has, or null.
const WideProduct* wide_product();

// Linear layers on a matrix unit: x: bf16 [T, K], T, N and K at least 1, K a multiple of 32; bias: fp32 [N], N rounded up
// to 32; out: bf16 [T, N]. 0, or 1 where there is no memory.
struct TileLinear {
  int least_plain;  // rows from which on it is the faster one
  int (*plain)(const uint16_t* x, int64_t rows, int64_t inputs, const uint16_t* weight, const float* bias,
               int64_t outputs, uint16_t* out, int threads);  // weight: bf16 [N, K]
  int least_packed;
  int least_rounded;  // of a packed weight, where x would be rounded to 8 bits otherwise
  int (*packed)(const uint16_t* x, int64_t rows, int64_t inputs, const PackedWeight& weight, const float* bias,
                int64_t outputs, uint16_t* out, int threads);
};

// What the instruction set in use has for such an x, or null.
const TileLinear* tile_linear(DType x, int64_t inputs);

}  // namespace llama_mm
