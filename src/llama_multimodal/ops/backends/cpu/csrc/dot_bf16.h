// Few rows of x against a bf16 weight as it lies, [N, K]: fp32 products and sums of the exact values.
#pragma once

#include "kernels.h"
#include "vec.h"

namespace {

constexpr int kPair = 2 * LANES;  // a load of bf16 values gives the even and the odd ones as two vectors of fp32

// Each 2·LANES inputs: the even ones, then the odd ones. The rest keeps its order.
void order_row(const float* x, int64_t inputs, float* out) {
  int64_t k = 0;
  for (; k + kPair <= inputs; k += kPair)
    for (int i = 0; i < LANES; i++) {
      out[k + i] = x[k + 2 * i];
      out[k + LANES + i] = x[k + 2 * i + 1];
    }
  for (; k < inputs; k++) out[k] = x[k];
}

// Outputs at a time: one stream is what the memory's prefetchers follow best, but with more rows of x, x must be read
// less often.
constexpr int outputs_for(int rows) { return rows <= 2 ? 1 : rows <= 4 ? 4 : 2; }

template <int ROWS, int OUTPUTS>
void dot_rows(const uint16_t* weight, int64_t inputs, const float* x, int64_t x_stride, float* sums) {
  Floats evens[OUTPUTS][ROWS] = {}, odds[OUTPUTS][ROWS] = {};
  // With many sums one chain of additions each hides the latency, and two would not fit the registers.
  auto& last = OUTPUTS * ROWS > 8 ? evens : odds;
  int64_t k = 0;
  for (; k + kPair <= inputs; k += kPair)
    for (int n = 0; n < OUTPUTS; n++) {
      const uint16_t* at = weight + n * inputs + k;
      __builtin_prefetch(at + (OUTPUTS > 1 ? OUTPUTS * inputs : kBytesAhead / 2), 0, 2);
      Words pair;
      memcpy(&pair, at, sizeof(pair));
      const Floats even = bits<Floats>(pair << 16), odd = bits<Floats>(pair & 0xffff0000u);
      for (int t = 0; t < ROWS; t++) {
        evens[n][t] += even * load(x + t * x_stride + k);
        last[n][t] += odd * load(x + t * x_stride + k + LANES);
      }
    }
  for (int n = 0; n < OUTPUTS; n++)
    for (int t = 0; t < ROWS; t++) {
      float& total = sums[t * llama_mm::kOutputs + n];
      total = sum(evens[n][t] + odds[n][t]);
      for (int64_t rest = k; rest < inputs; rest++) total += widen(weight[n * inputs + rest]) * x[t * x_stride + rest];
    }
}

template <int ROWS>
void dot_outputs(const uint16_t* weight, int64_t inputs, int outputs, const float* x, int64_t x_stride, float* sums) {
  constexpr int step = outputs_for(ROWS);
  int n = 0;
  for (; n + step <= outputs; n += step)
    dot_rows<ROWS, step>(weight + n * inputs, inputs, x, x_stride, sums + n);
  for (; n < outputs; n++) dot_rows<ROWS, 1>(weight + n * inputs, inputs, x, x_stride, sums + n);
}

void dot_bf16(const uint16_t* weight, int64_t inputs, int outputs, const float* x, int64_t x_stride, int rows,
              float* sums) {
  switch (rows) {
    case 1: return dot_outputs<1>(weight, inputs, outputs, x, x_stride, sums);
    case 2: return dot_outputs<2>(weight, inputs, outputs, x, x_stride, sums);
    case 3: return dot_outputs<3>(weight, inputs, outputs, x, x_stride, sums);
    case 4: return dot_outputs<4>(weight, inputs, outputs, x, x_stride, sums);
    case 5: return dot_outputs<5>(weight, inputs, outputs, x, x_stride, sums);
    case 6: return dot_outputs<6>(weight, inputs, outputs, x, x_stride, sums);
    case 7: return dot_outputs<7>(weight, inputs, outputs, x, x_stride, sums);
    default: return dot_outputs<8>(weight, inputs, outputs, x, x_stride, sums);
  }
}

}  // namespace
