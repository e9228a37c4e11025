// Attention of the query heads that share one key head over some keys, with a running softmax.
//
// Shapes: G query heads, at most 4 · D head dim
#pragma once

#include "kernels.h"
#include "vec.h"

namespace {

typedef float Weights[llama_mm::kKeysAtOnce];  // of a query head
constexpr int64_t kLine = 64;                   // bytes that come from memory together

// The same key, value or scale of another head.
template <typename T>
INLINE const T* at(const void* first, int64_t bytes) {
  return reinterpret_cast<const T*>(static_cast<const char*>(first) + bytes);
}

INLINE void ask(llama_mm::Ahead& ahead) {
  if (ahead.count == 0) return;
  const char* const from = at<char>(*ahead.next, ahead.at);
  for (int64_t line = 0; line < ahead.size; line += kLine) __builtin_prefetch(from + line, 0, 2);
  ahead.at += ahead.size;
  if (ahead.at >= ahead.bytes) ahead.at = 0, ahead.next++, ahead.count--;
}

// Scores of COUNT keys from the first-th on, for every head.
template <typename T, int G, int COUNT>
INLINE void score(const void* const* keys, int64_t offset, const float* q, int64_t dim, Weights* weights, int first) {
  constexpr int sums = (G * COUNT + 3) / 4 * 4;
  const int64_t whole = dim / LANES * LANES;
  const T* k[COUNT];
  for (int j = 0; j < COUNT; j++) k[j] = at<T>(keys[first + j], offset);
  Floats acc[sums] = {};
  for (int64_t d = 0; d < whole; d += LANES) {
    Floats key[COUNT];
    for (int j = 0; j < COUNT; j++) key[j] = load(k[j] + d);
    for (int g = 0; g < G; g++) {
      const Floats query = load(q + g * dim + d);
      for (int j = 0; j < COUNT; j++) acc[g * COUNT + j] += query * key[j];
    }
  }
  float found[sums];
  for (int i = 0; i < sums; i += 4) sum_four(acc + i, found + i);
  for (int g = 0; g < G; g++) memcpy(weights[g] + first, found + g * COUNT, sizeof(float) * COUNT);
  if (whole == dim) return;
  for (int g = 0; g < G; g++)
    for (int j = 0; j < COUNT; j++)
      for (int64_t d = whole; d < dim; d++) weights[g][first + j] += q[g * dim + d] * widen(k[j][d]);
}

// acc += weights · values, for WIDTH vectors of the head dim from d on.
template <typename T, int G, int WIDTH>
INLINE void add_values(const void* const* values, int64_t offset, int count, const Weights* weights, int64_t dim,
                       int64_t d, float* acc, llama_mm::Ahead& ahead) {
  Floats out[G][WIDTH];
  for (int g = 0; g < G; g++)
    for (int i = 0; i < WIDTH; i++) out[g][i] = load(acc + g * dim + d + i * LANES);
  for (int j = 0; j < count; j++) {
    if (d == 0) ask(ahead);
    for (int i = 0; i < WIDTH; i++) {
      const Floats x = load(at<T>(values[j], offset) + d + i * LANES);
      for (int g = 0; g < G; g++) out[g][i] += weights[g][j] * x;
    }
  }
  for (int g = 0; g < G; g++)
    for (int i = 0; i < WIDTH; i++) store(acc + g * dim + d + i * LANES, out[g][i]);
}

template <typename T, int G>
void attend_heads(const llama_mm::Keys& keys, const llama_mm::Offsets& to, const float* q, int64_t dim, float* acc,
                  float* max, float* total, llama_mm::Ahead& k_ahead, llama_mm::Ahead& v_ahead) {
  constexpr int some = LANES == 16 || G <= 2 ? 4 : 2;  // keys that the registers hold sums for
  constexpr bool in_8_bits = sizeof(T) == 1;
  alignas(64) Weights weights[G];
  const int count = keys.count, lanes = (count + LANES - 1) / LANES * LANES;
  int first = 0;
  for (; first + some <= count; first += some) {
    for (int j = 0; j < some; j++) ask(k_ahead);
    score<T, G, some>(keys.k, to.k, q, dim, weights, first);
  }
  for (; first < count; first++) score<T, G, 1>(keys.k, to.k, q, dim, weights, first);
  for (int g = 0; g < G; g++) {
    if (in_8_bits)
      for (int j = 0; j < count; j++) weights[g][j] *= *at<float>(keys.k_scales[j], to.scale);
    if (keys.bias)
      for (int j = 0; j < count; j++) weights[g][j] += keys.bias[j];
    for (int j = count; j < lanes; j++) weights[g][j] = -__builtin_inff();
    Floats most = splat(max[g]);
    for (int j = 0; j < lanes; j += LANES) most = larger(load(weights[g] + j), most);
    const float top = largest(most), shift = top == -__builtin_inff() ? 0.0f : top;  // -inf: every key so far is hidden
    Floats added = {};
    for (int j = 0; j < lanes; j += LANES) {
      const Floats weight = exp2_of_negative(load(weights[g] + j) - shift);
      store(weights[g] + j, weight);
      added += weight;
    }
    const float correction = exp2_of_negative(splat(max[g] - shift))[0];
    total[g] = total[g] * correction + sum(added);
    if (max[g] != top)
      for (int64_t d = 0; d < dim; d++) acc[g * dim + d] *= correction;
    max[g] = top;
    if (in_8_bits)  // the sum of the weights has them as they are
      for (int j = 0; j < count; j++) weights[g][j] *= *at<float>(keys.v_scales[j], to.scale);
  }
  int64_t d = 0;
  constexpr int width = G == 1 ? 4 : 2;  // enough sums at once to hide the latency of an addition
  for (; d + width * LANES <= dim; d += width * LANES)
    add_values<T, G, width>(keys.v, to.v, count, weights, dim, d, acc, v_ahead);
  for (; d + LANES <= dim; d += LANES) add_values<T, G, 1>(keys.v, to.v, count, weights, dim, d, acc, v_ahead);
  for (; d < dim; d++)
    for (int g = 0; g < G; g++)
      for (int j = 0; j < count; j++) acc[g * dim + d] += weights[g][j] * widen(at<T>(keys.v[j], to.v)[d]);
}

template <typename T>
void attend(const llama_mm::Keys& keys, const llama_mm::Offsets& offsets, const llama_mm::Softmax& state,
            llama_mm::Ahead& k_ahead, llama_mm::Ahead& v_ahead) {
  for (int head = 0; head < state.heads; head += llama_mm::kMaxHeads) {
    const auto run = [&](auto* of_heads) {
      of_heads(keys, offsets, state.q + head * state.dim, state.dim, state.acc + head * state.dim, state.max + head,
               state.sum + head, k_ahead, v_ahead);
    };
    switch (state.heads - head) {
      case 1: run(attend_heads<T, 1>); break;
      case 2: run(attend_heads<T, 2>); break;
      case 3: run(attend_heads<T, 3>); break;
      default: run(attend_heads<T, 4>);
    }
  }
}

}  // namespace
