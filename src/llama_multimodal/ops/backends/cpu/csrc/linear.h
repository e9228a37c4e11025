// Products of many rows with a bf16 weight in fp32: what an instruction set provides, and the driver (linear.cpp) uses.
//
// Shapes: K inputs · O outputs that are computed together
#pragma once

#include <cstdint>

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

}  // namespace llama_mm
