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

void widen_values(const uint16_t* x, int64_t count, float* out) {
  int64_t k = 0;
  for (; k + LANES <= count; k += LANES) store(out + k, load(x + k));
  for (; k < count; k++) out[k] = widen(x[k]);
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

void finish_row(const float* sums, const float* bias, int64_t there, uint16_t* out) {
  uint16_t row[kTogether];
  uint16_t* const to = there < kTogether ? row : out;
  for (int p = 0; p < kTogether; p += LANES) put(to + p, load(sums + p) + load(bias + p));
  if (to == row) memcpy(out, row, static_cast<size_t>(there) * sizeof(*row));
}

}  // namespace
