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

// Outputs at a time: one stream is what the memory's prefetchers follow best; with more rows of x, as many as leave
// their sums in registers, so that x is read and weights are widened less often.
constexpr int outputs_for(int rows) { return rows <= 2 ? 1 : LANES == 16 || rows == 3 ? 4 : 2; }

// By value: a copy straight into an array goes through memory in two halves with AVX2, and waits for both.
INLINE Words load_pair(const uint16_t* from) {
  Words pair;
  memcpy(&pair, from, sizeof(pair));
  return pair;
}

// sums[…][t] += a vector of row t of x times the half of each pair of weights that `half` gives.
template <int ROWS, int OUTPUTS, typename Half>
INLINE void add_rows(const float* x, int64_t x_stride, const Words* pairs, Half half, Floats (*sums)[ROWS]) {
  Floats weights[OUTPUTS];
  for (int n = 0; n < OUTPUTS; n++) weights[n] = bits<Floats>(half(pairs[n]));
  for (int t = 0; t < ROWS; t++) {
    const Floats row = load(x + t * x_stride);
    for (int n = 0; n < OUTPUTS; n++) sums[n][t] += weights[n] * row;
  }
}

template <int ROWS, int OUTPUTS>
void dot_rows(const uint16_t* weight, int64_t inputs, const float* x, int64_t x_stride, float* sums) {
  Floats evens[OUTPUTS][ROWS] = {}, odds[OUTPUTS][ROWS] = {};
  // With many sums one chain of additions each hides the latency, and two would not fit the registers.
  auto& last = OUTPUTS * ROWS > 8 ? evens : odds;
  int64_t k = 0;
  for (; k + kPair <= inputs; k += kPair) {
    Words pairs[OUTPUTS];
    for (int n = 0; n < OUTPUTS; n++) {
      const uint16_t* at = weight + n * inputs + k;
      __builtin_prefetch(at + (OUTPUTS > 1 ? OUTPUTS * inputs : kBytesAhead / 2), 0, 2);
      pairs[n] = load_pair(at);
    }
    add_rows<ROWS, OUTPUTS>(x + k, x_stride, pairs, [](Words pair) { return pair << 16; }, evens);
    add_rows<ROWS, OUTPUTS>(x + k + LANES, x_stride, pairs, [](Words pair) { return pair & 0xffff0000u; }, last);
  }
  for (int t = 0; t < ROWS; t++) {
    float total[OUTPUTS];
    Floats both[OUTPUTS];
    for (int n = 0; n < OUTPUTS; n++) both[n] = evens[n][t] + odds[n][t];
    if constexpr (OUTPUTS == 4) {
      sum_four(both, total);
    } else {
      for (int n = 0; n < OUTPUTS; n++) total[n] = sum(both[n]);
    }
    for (int n = 0; n < OUTPUTS; n++) {
      for (int64_t rest = k; rest < inputs; rest++)
        total[n] += widen(weight[n * inputs + rest]) * x[t * x_stride + rest];
      sums[t * llama_mm::kOutputs + n] = total[n];
    }
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
    default: return dot_outputs<6>(weight, inputs, outputs, x, x_stride, sums);
  }
}

}  // namespace
