// The products of linear.h.
#pragma once

#include "interleave.h"
#include "linear.h"
#include "vec.h"

namespace {

using llama_mm::kRowsTogether;

void order_weights(const uint16_t* weight, int64_t stride, int64_t there, int64_t inputs, float* out) {
  interleave(weight, stride, there, inputs, out);
}

void multiply_rows(const float* x, int64_t stride, const float* weight, int64_t inputs, bool add, float* sums) {
  Floats sum[kRowsTogether][kVectors] = {};
  add_products<kRowsTogether>(x, stride, weight, inputs, sum);
  for (int t = 0; t < kRowsTogether; t++)
    for (int p = 0; p < kVectors; p++) {
      float* to = sums + t * kTogether + p * LANES;
      store(to, add ? load(to) + sum[t][p] : sum[t][p]);
    }
}

}  // namespace
