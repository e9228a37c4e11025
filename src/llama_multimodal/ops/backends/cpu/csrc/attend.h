// Attention of the query heads that share one key head over a run of keys, with a running softmax.
//
// Shapes: G query heads, at most 4 · D head dim
#pragma once

#include "kernels.h"
#include "vec.h"

namespace {

constexpr int kChunk = 32;  // keys between two corrections of the running maximum; their values stay in the first cache
// Keys that are asked for early, where one takes more than the two lines that are anyway; of dense ones the next
// page's.
constexpr int kKeysAhead = 8;

// Scores of KEYS keys from k on, for every head: weights[head][0 .. KEYS).
template <typename T, int G, int KEYS>
INLINE void score(const T* k, int64_t stride, const float* q, int64_t dim, float (*weights)[kChunk], int first) {
  constexpr int count = (G * KEYS + 3) / 4 * 4;
  const int64_t whole = dim / LANES * LANES;
  Floats acc[count] = {};
  for (int64_t d = 0; d < whole; d += LANES) {
    Floats key[KEYS];
    for (int j = 0; j < KEYS; j++) key[j] = load(k + j * stride + d);
    for (int g = 0; g < G; g++) {
      const Floats query = load(q + g * dim + d);
      for (int j = 0; j < KEYS; j++) acc[g * KEYS + j] += query * key[j];
    }
  }
  float sums[count];
  for (int i = 0; i < count; i += 4) sum_four(acc + i, sums + i);
  for (int g = 0; g < G; g++)
    for (int j = 0; j < KEYS; j++) {
      float total = sums[g * KEYS + j];
      for (int64_t d = whole; d < dim; d++) total += q[g * dim + d] * widen(k[j * stride + d]);
      weights[g][first + j] = total;
    }
}

// acc += weights · values, for WIDTH vectors of the head dim from d on.
template <typename T, int G, int WIDTH>
INLINE void add_values(const T* v, int64_t stride, int count, const float (*weights)[kChunk], int64_t dim, int64_t d,
                       float* acc) {
  Floats out[G][WIDTH];
  for (int g = 0; g < G; g++)
    for (int i = 0; i < WIDTH; i++) out[g][i] = load(acc + g * dim + d + i * LANES);
  for (int j = 0; j < count; j++)
    for (int i = 0; i < WIDTH; i++) {
      const Floats x = load(v + j * stride + d + i * LANES);
      for (int g = 0; g < G; g++) out[g][i] += weights[g][j] * x;
    }
  for (int g = 0; g < G; g++)
    for (int i = 0; i < WIDTH; i++) store(acc + g * dim + d + i * LANES, out[g][i]);
}

template <typename T, int G>
void attend_chunk(const T* k, const T* v, const llama_mm::Run& run, int count, const float* bias, const float* q,
                  int64_t dim, const float* k_scales, const float* v_scales, float* acc, float* max, float* total) {
  constexpr int keys = LANES == 16 || G <= 2 ? 4 : 2;  // that the registers hold sums for
  alignas(64) float weights[G][kChunk];
  const int64_t bytes = dim * static_cast<int64_t>(sizeof(T));
  const bool dense = run.k_stride == dim && run.v_stride == dim;
  const int ahead = dense ? static_cast<int>(kBytesAhead / bytes) : kKeysAhead;
  int first = 0;
  for (; first + keys <= count; first += keys) {
    if (dense || bytes > 128)
      for (int j = first + ahead; j < first + ahead + keys; j++)
        for (int64_t d = 0; d < dim; d += 64 / static_cast<int64_t>(sizeof(T))) {
          __builtin_prefetch(k + j * run.k_stride + d);
          __builtin_prefetch(v + j * run.v_stride + d);
        }
    score<T, G, keys>(k + first * run.k_stride, run.k_stride, q, dim, weights, first);
  }
  for (; first < count; first++) score<T, G, 1>(k + first * run.k_stride, run.k_stride, q, dim, weights, first);
  if (k_scales)
    for (int g = 0; g < G; g++)
      for (int j = 0; j < count; j++) weights[g][j] *= k_scales[j * run.scale_stride];
  if (bias)
    for (int g = 0; g < G; g++)
      for (int j = 0; j < count; j++) weights[g][j] += bias[j];
  for (int g = 0; g < G; g++) {
    for (int j = count; j < kChunk; j++) weights[g][j] = -__builtin_inff();
    Floats most = splat(max[g]);
    for (int j = 0; j < kChunk; j += LANES) most = larger(load(weights[g] + j), most);
    const float top = largest(most), shift = top == -__builtin_inff() ? 0.0f : top;  // -inf: every key so far is hidden
    Floats added = {};
    for (int j = 0; j < kChunk; j += LANES) {
      const Floats weight = exp2_of_negative(load(weights[g] + j) - shift);
      store(weights[g] + j, weight);
      added += weight;
    }
    const float correction = exp2_of_negative(splat(max[g] - shift))[0];
    total[g] = total[g] * correction + sum(added);
    if (max[g] != top)
      for (int64_t d = 0; d < dim; d++) acc[g * dim + d] *= correction;
    max[g] = top;
  }
  if (v_scales)  // the sum of the weights has them as they are
    for (int g = 0; g < G; g++)
      for (int j = 0; j < count; j++) weights[g][j] *= v_scales[j * run.scale_stride];
  int64_t d = 0;
  constexpr int width = G == 1 ? 4 : 2;  // enough sums at once to hide the latency of an addition
  for (; d + width * LANES <= dim; d += width * LANES)
    add_values<T, G, width>(v, run.v_stride, count, weights, dim, d, acc);
  for (; d + LANES <= dim; d += LANES) add_values<T, G, 1>(v, run.v_stride, count, weights, dim, d, acc);
  for (; d < dim; d++)
    for (int g = 0; g < G; g++)
      for (int j = 0; j < count; j++) acc[g * dim + d] += weights[g][j] * widen(v[j * run.v_stride + d]);
}

template <typename T>
void attend(const llama_mm::Run& run, const llama_mm::Softmax& state) {
  const T* k = static_cast<const T*>(run.k);
  const T* v = static_cast<const T*>(run.v);
  for (int64_t first = 0; first < run.count; first += kChunk, k += kChunk * run.k_stride, v += kChunk * run.v_stride) {
    const int count = static_cast<int>(run.count - first < kChunk ? run.count - first : kChunk);
    const float* bias = run.bias ? run.bias + first : nullptr;
    const float* k_scales = run.k_scales ? run.k_scales + first * run.scale_stride : nullptr;
    const float* v_scales = run.v_scales ? run.v_scales + first * run.scale_stride : nullptr;
    for (int head = 0; head < state.heads; head += llama_mm::kMaxHeads) {
      const float* q = state.q + head * state.dim;
      float *acc = state.acc + head * state.dim, *max = state.max + head, *total = state.sum + head;
      const auto run_chunk = [&](auto* chunk) {
        chunk(k, v, run, count, bias, q, state.dim, k_scales, v_scales, acc, max, total);
      };
      switch (state.heads - head) {
        case 1: run_chunk(attend_chunk<T, 1>); break;
        case 2: run_chunk(attend_chunk<T, 2>); break;
        case 3: run_chunk(attend_chunk<T, 3>); break;
        default: run_chunk(attend_chunk<T, 4>);
      }
    }
  }
}

}  // namespace
