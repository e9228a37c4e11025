// Few rows of x against a bf16 weight as it lies, [N, K]: fp32 products and sums of the exact values.
#pragma once

#include "kernels.h"
#include "vec.h"

namespace {

constexpr int kPair = 2 * LANES;  // a load of bf16 values gives the even and the odd ones as two vectors of fp32

using llama_mm::kOutputs;

constexpr bool kManyRegisters = LANES == 16;
constexpr int kDotRows = kManyRegisters ? 8 : 6;  // in one pass

// Fewer rows wait for memory, which likes long streams of what is read next. So many compute longer than it takes, if
// the next group of outputs is asked for meanwhile, a line or so at a time over all passes.
constexpr bool computes_longer(int rows) { return rows >= 5; }

// Inputs at a time, so that x of many rows stays in the first cache, beside weights.
constexpr int64_t inputs_for(int rows) { return computes_longer(rows) ? 512 : int64_t{1} << 40; }

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
constexpr int outputs_for(int rows) {
  if (rows <= 2) return 1;
  if (kManyRegisters) return rows > 6 ? 3 : 4;
  return rows == 3 ? 4 : 2;
}

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
    Floats row = load(x + t * x_stride);
    // Or GCC loads it for each output; of six rows AVX2 has to.
#if defined(__AVX512F__)
    if (OUTPUTS == 3) asm("" : "+v"(row));
#elif defined(__AVX2__)
    if (OUTPUTS == 2 && ROWS < 6) asm("" : "+x"(row));
#endif
    for (int n = 0; n < OUTPUTS; n++) sums[n][t] += weights[n] * row;
  }
}

// `count` inputs, whole pairs of vectors; ahead: the weights to ask for, of the first of ASKED outputs.
template <int ROWS, int OUTPUTS, int ASKED>
INLINE void add_block(const uint16_t* weight, int64_t inputs, const uint16_t* ahead, const float* x, int64_t x_stride,
                      int64_t count, Floats (*sums)[ROWS]) {
  Floats evens[OUTPUTS][ROWS], odds[OUTPUTS][ROWS] = {};
  memcpy(evens, sums, sizeof(evens));
  // With many sums one chain of additions each hides the latency, and two would not fit the registers.
  constexpr bool one_chain = OUTPUTS * ROWS > 8;
  auto& last = one_chain ? evens : odds;
  for (int64_t k = 0; k < count; k += kPair) {
    Words pairs[OUTPUTS];
    for (int n = 0; n < ASKED; n++) __builtin_prefetch(ahead + n * inputs + k, 0, 2);
    for (int n = 0; n < OUTPUTS; n++) pairs[n] = load_pair(weight + n * inputs + k);
    add_rows<ROWS, OUTPUTS>(x + k, x_stride, pairs, [](Words pair) { return pair << 16; }, evens);
    add_rows<ROWS, OUTPUTS>(x + k + LANES, x_stride, pairs, [](Words pair) { return pair & 0xffff0000u; }, last);
  }
  for (int n = 0; n < OUTPUTS; n++)
    for (int t = 0; t < ROWS; t++) sums[n][t] = one_chain ? evens[n][t] : evens[n][t] + odds[n][t];
}

template <int ROWS, int OUTPUTS, int ASKED>
void dot_outputs(const uint16_t* weight, int64_t inputs, int outputs, const float* x, int64_t x_stride, int pass,
                 float* sums) {
  const uint16_t* const next_group = weight + (kOutputs + pass * (kOutputs / OUTPUTS) * ASKED) * inputs;
  constexpr int64_t block = inputs_for(ROWS);
  const int64_t whole = inputs - inputs % kPair;
  Floats parts[kOutputs][ROWS] = {};
  for (int64_t k = 0; k < whole; k += block) {
    const int64_t count = whole - k < block ? whole - k : block;
    int n = 0;
    for (; n + OUTPUTS <= outputs; n += OUTPUTS) {
      const uint16_t* const from = weight + n * inputs + k;
      const uint16_t* const next = computes_longer(ROWS) ? next_group + n / OUTPUTS * ASKED * inputs + k
                                   : OUTPUTS == 1        ? from + kBytesAhead / 2
                                                         : from + OUTPUTS * inputs;
      add_block<ROWS, OUTPUTS, ASKED>(from, inputs, next, x + k, x_stride, count, parts + n);
    }
    for (; n < outputs; n++) {
      const uint16_t* const from = weight + n * inputs + k;
      add_block<ROWS, 1, 1>(from, inputs, from + inputs, x + k, x_stride, count, parts + n);
    }
  }
  for (int t = 0; t < ROWS; t++, x += x_stride, sums += kOutputs) {
    for (int n = 0; n < outputs; n += 4) {
      Floats four[4] = {};
      for (int i = 0; i < 4 && n + i < outputs; i++) four[i] = parts[n + i][t];
      sum_four(four, sums + n);
    }
    for (int n = 0; n < outputs; n++)
      for (int64_t rest = whole; rest < inputs; rest++) sums[n] += widen(weight[n * inputs + rest]) * x[rest];
  }
}

template <int ROWS>
void dot_some(const uint16_t* weight, int64_t inputs, int outputs, const float* x, int64_t x_stride, int pass,
              int passes, float* sums) {
  constexpr int together = outputs_for(ROWS);
  const auto dot = passes == 1 || !computes_longer(ROWS) ? dot_outputs<ROWS, together, together>
                   : passes == 2                         ? dot_outputs<ROWS, together, (together + 1) / 2>
                                                         : dot_outputs<ROWS, together, (together + 2) / 3>;
  dot(weight, inputs, outputs, x, x_stride, pass, sums);
}

void dot_bf16(const uint16_t* weight, int64_t inputs, int outputs, const float* x, int64_t x_stride, int rows,
              int pass, int passes, float* sums) {
  switch (rows) {
    case 1: return dot_some<1>(weight, inputs, outputs, x, x_stride, pass, passes, sums);
    case 2: return dot_some<2>(weight, inputs, outputs, x, x_stride, pass, passes, sums);
    case 3: return dot_some<3>(weight, inputs, outputs, x, x_stride, pass, passes, sums);
    case 4: return dot_some<4>(weight, inputs, outputs, x, x_stride, pass, passes, sums);
    case 5: return dot_some<5>(weight, inputs, outputs, x, x_stride, pass, passes, sums);
    case 6: return dot_some<6>(weight, inputs, outputs, x, x_stride, pass, passes, sums);
    case 7: return dot_some<kManyRegisters ? 7 : 6>(weight, inputs, outputs, x, x_stride, pass, passes, sums);
    default: return dot_some<kDotRows>(weight, inputs, outputs, x, x_stride, pass, passes, sums);
  }
}

}  // namespace
