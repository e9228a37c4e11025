// Attention of many queries with products in fp32, of bf16 or fp32 tensors: for instruction sets without products of
// bf16 pairs, and for processors that multiply pairs at half the rate of fp32.
//
// Shapes: T queries · S keys · D head dim, Dp rounded up to 16 · kKeys keys that are looked at together
#pragma once

#include "attention.h"
#include "interleave.h"
#include "vec.h"

namespace {

using llama_mm::kKeys;
using llama_mm::kTile;

constexpr int kQueries = 6;  // whose sums lie in registers together

// Queries → fp32 [Q, Dp].
template <typename T>
void order_queries(const void* q, int64_t stride, int64_t count, int64_t dim, void* out) {
  const int64_t padded = llama_mm::padded_dim(dim);
  float* to = static_cast<float*>(out);
  for (int64_t t = 0; t < kQueries; t++)
    for (int64_t d = 0; d < padded; d++)
      to[t * padded + d] = t < count && d < dim ? widen(static_cast<const T*>(q)[t * stride + d]) : 0.0f;
}

// kTile keys (fewer at the end) → fp32 [kTile/kTogether, Dp, kTogether].
template <typename T>
void order_keys(const void* k, int64_t stride, int64_t count, int64_t dim, void* out) {
  float* to = static_cast<float*>(out);
  for (int64_t first = 0; first < kTile; first += kTogether, to += kTogether * llama_mm::padded_dim(dim))
    interleave(static_cast<const T*>(k) + first * stride, stride, count - first, dim, to);
}

// kTile keys' values → fp32 [kTile, Dp].
template <typename T>
void order_values(const void* v, int64_t stride, int64_t count, int64_t dim, void* out) {
  const int64_t padded = llama_mm::padded_dim(dim);
  float* to = static_cast<float*>(out);
  for (int64_t key = 0; key < kTile; key++, to += padded) {
    const T* from = static_cast<const T*>(v) + key * stride;
    for (int64_t d = 0; d < padded; d++) to[d] = key < count && d < dim ? widen(from[d]) : 0.0f;
  }
}

// scores[query][0 .. kTogether) of kQueries queries [kQueries, Dp] against ordered keys, in powers of two and
// with their bias; top[query]: the largest so far in each lane.
INLINE void score(const float* q, const float* keys, int64_t dim, float scale, const float* bias, float* scores,
                  Floats* top) {
  Floats sum[kQueries][kVectors] = {};
  add_products<kQueries>(q, llama_mm::padded_dim(dim), keys, dim, sum);
  for (int p = 0; p < kVectors; p++) {
    const Floats added = load(bias + p * LANES);
    for (int t = 0; t < kQueries; t++) {
      const Floats x = sum[t][p] * scale + added;
      store(scores + t * kKeys + p * LANES, x);
      top[t] = larger(x, top[t]);  // without NaNs: the weights will show them
    }
  }
}

// acc[query][0 .. PARTS · LANES) = factor · acc + weights [kQueries, kKeys] times ordered values, `keys` of them.
template <int PARTS>
INLINE void add_values(const float* weights, const float* values, int64_t padded, int keys, const float* factor,
                       float* acc) {
  Floats sum[kQueries][PARTS];
  for (int t = 0; t < kQueries; t++)
    for (int p = 0; p < PARTS; p++) sum[t][p] = factor[t] * load(acc + t * padded + p * LANES);
  for (int i = 0; i < keys; i++, values += padded) {
    Floats value[PARTS];
    for (int p = 0; p < PARTS; p++) value[p] = load(values + p * LANES);
    for (int t = 0; t < kQueries; t++) {
      const Floats weight = splat(weights[t * kKeys + i]);
      for (int p = 0; p < PARTS; p++) sum[t][p] += weight * value[p];
    }
  }
  for (int t = 0; t < kQueries; t++)
    for (int p = 0; p < PARTS; p++) store(acc + t * padded + p * LANES, sum[t][p]);
}

// Scores → weights of one query: the running maximum and sum go on, the result is what to multiply older sums by.
INLINE float soften(float* scores, int keys, float top, float* max, float* total) {
  const float before = *max, shift = top <= llama_mm::kHidden ? 0.0f : top;
  Floats added = {};
  for (int i = 0; i < keys; i += LANES) {
    const Floats weight = exp2_of_negative(load(scores + i) - shift);
    store(scores + i, weight);
    added += weight;
  }
  const float factor = exp2_of_negative(splat(before - shift))[0];  // 0 where nothing was seen before
  *max = top;
  *total = *total * factor + sum(added);
  return factor;
}

void attend_in_fp32(const llama_mm::QueryGroup& group, const llama_mm::KeyBlock& block) {
  alignas(64) float scores[kQueries][kKeys];
  const int64_t padded = llama_mm::padded_dim(group.dim);
  const int seen = llama_mm::seen_keys(block, kQueries), keys = (seen + kTile - 1) / kTile * kTile;
  const float* ordered = static_cast<const float*>(block.keys);
  Floats top[kQueries];
  for (int t = 0; t < kQueries; t++) top[t] = splat(2 * llama_mm::kHidden);
  for (int first = 0; first < keys; first += kTogether)
    score(static_cast<const float*>(group.q), ordered + first * padded, group.dim, group.scale, block.bias + first,
          &scores[0][first], top);
  float factor[kQueries];
  for (int t = 0; t < kQueries; t++) {
    const int later = block.causal_from + t + 1;
    const float here = later < keys ? llama_mm::hide_later(scores[t], later, keys) : largest(top[t]);
    factor[t] = soften(scores[t], keys, here > group.max[t] ? here : group.max[t], group.max + t, group.sum + t);
  }
  const float* values = static_cast<const float*>(block.values);
  float* acc = group.acc;
  for (int64_t left = padded / LANES; left > 0;) {
    const int64_t parts = left < kVectors ? left : kVectors == 4 && (left == 5 || left == 6) ? 3 : kVectors;
    switch (parts) {
      case 4: add_values<4>(scores[0], values, padded, seen, factor, acc); break;
      case 3: add_values<3>(scores[0], values, padded, seen, factor, acc); break;
      case 2: add_values<2>(scores[0], values, padded, seen, factor, acc); break;
      default: add_values<1>(scores[0], values, padded, seen, factor, acc);
    }
    left -= parts, values += LANES * parts, acc += LANES * parts;
  }
}

template <typename T>
constexpr llama_mm::Attention in_fp32() {
  constexpr llama_mm::DType type = sizeof(T) == 4 ? llama_mm::kFloat32 : llama_mm::kBFloat16;
  return {4, kQueries, 16, 16, order_queries<T>, order_keys<T>, order_values<T>, attend_in_fp32,
          llama_mm::put_rows<type>};
}

}  // namespace
