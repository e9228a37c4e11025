// Attention of many queries in bf16, with AVX-512's products of bf16 pairs.
//
// Shapes: T queries · S keys · D head dim, Dp rounded up to 16 · kKeys keys that are looked at together
#define LANES 16
#include "attention_pairs.h"

namespace {

using llama_mm::kKeys;

constexpr int kQueries = 6;  // whose sums lie in registers together
constexpr int kPadding = 16;

INLINE __m512 multiply(__m512 sum, __m512i a, __m512i b) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }

INLINE __m512i pair_of(const uint16_t* from) {  // two neighbours in every lane
  int32_t both;
  memcpy(&both, from, 4);
  return _mm512_set1_epi32(both);
}

// Queries → [Q, Dp].
void order_queries(const void* q, int64_t stride, int64_t count, int64_t dim, void* out) {
  const size_t row = static_cast<size_t>(llama_mm::padded_dim(dim, kPadding)) * 2;
  memset(out, 0, kQueries * row);
  for (int64_t t = 0; t < count; t++)
    memcpy(static_cast<char*>(out) + t * row, static_cast<const uint16_t*>(q) + t * stride,
           static_cast<size_t>(dim) * 2);
}

void order_keys(const void* k, int64_t stride, int64_t count, int64_t dim, void* out) {
  order_pairs_of_inputs(k, stride, count, dim, kPadding, out);
}

// kTile keys' values → [kTile/2, Dp, 2].
void order_values(const void* v, int64_t stride, int64_t count, int64_t dim, void* out) {
  const int64_t padded = llama_mm::padded_dim(dim, kPadding);
  uint16_t* to = static_cast<uint16_t*>(out);
  for (int64_t key = 0; key < kTile; key += 2)
    for (int64_t d = 0; d < padded; d += 16, to += 32)
      _mm512_storeu_si512(to, pair_of_values(v, stride, key, count, d, dim));
}

// scores[query][0 .. 64) of kQueries queries [kQueries, Dp] against 4 × 16 ordered keys, in powers of two and with
// their bias; top[query]: the largest so far in each lane.
INLINE void score(const uint16_t* q, const uint16_t* keys, int64_t padded, float scale, const float* bias,
                  float (*scores)[kKeys], __m512* top) {
  constexpr int parts = kTile / 16;
  __m512 sum[kQueries][parts];
  for (int t = 0; t < kQueries; t++)
    for (int p = 0; p < parts; p++) sum[t][p] = _mm512_setzero_ps();
  for (int64_t i = 0; i < padded / 2; i++) {
    __m512i key[parts];
    for (int p = 0; p < parts; p++) key[p] = _mm512_loadu_si512(keys + (p * padded / 2 + i) * 32);
    for (int t = 0; t < kQueries; t++) {
      const __m512i query = pair_of(q + t * padded + 2 * i);
      for (int p = 0; p < parts; p++) sum[t][p] = multiply(sum[t][p], query, key[p]);
    }
  }
  for (int p = 0; p < parts; p++) {
    const __m512 added = _mm512_loadu_ps(bias + 16 * p);
    for (int t = 0; t < kQueries; t++) {
      const __m512 x = _mm512_fmadd_ps(sum[t][p], _mm512_set1_ps(scale), added);
      _mm512_storeu_ps(scores[t] + 16 * p, x);
      top[t] = _mm512_max_ps(x, top[t]);  // without NaNs: the weights will show them
    }
  }
}

// acc[query][0 .. 16·PARTS) = factor · acc + weights [kQueries, kKeys] times ordered values, `keys` of them.
template <int PARTS>
INLINE void add_values(const uint16_t (*weights)[kKeys], const uint16_t* values, int64_t padded, int keys,
                       const float* factor, float* acc) {
  __m512 sum[kQueries][PARTS];
  for (int t = 0; t < kQueries; t++)
    for (int p = 0; p < PARTS; p++)
      sum[t][p] = _mm512_mul_ps(_mm512_set1_ps(factor[t]), _mm512_loadu_ps(acc + t * padded + 16 * p));
  for (int i = 0; i < keys; i += 2, values += 2 * padded) {
    __m512i value[PARTS];
    for (int p = 0; p < PARTS; p++) value[p] = _mm512_loadu_si512(values + 32 * p);
    for (int t = 0; t < kQueries; t++) {
      const __m512i weight = pair_of(weights[t] + i);
      for (int p = 0; p < PARTS; p++) sum[t][p] = multiply(sum[t][p], weight, value[p]);
    }
  }
  for (int t = 0; t < kQueries; t++)
    for (int p = 0; p < PARTS; p++) _mm512_storeu_ps(acc + t * padded + 16 * p, sum[t][p]);
}

// Scores → weights of one query: the running maximum and sum go on, the result is what to multiply older sums by.
INLINE float soften(const float* scores, int keys, float top, float* max, float* sum, uint16_t* weights) {
  const float before = *max, shift = top <= llama_mm::kHidden ? 0.0f : top;
  const __m512 down = _mm512_set1_ps(shift);
  __m512 total = _mm512_setzero_ps();
  for (int i = 0; i < keys; i += 32) {
    const __m512 low = exp2_below(_mm512_sub_ps(_mm512_loadu_ps(scores + i), down));
    const __m512 high = exp2_below(_mm512_sub_ps(_mm512_loadu_ps(scores + i + 16), down));
    total = _mm512_add_ps(total, _mm512_add_ps(low, high));
    _mm512_storeu_si512(weights + i, (__m512i)_mm512_cvtne2ps_pbh(high, low));
  }
  const float factor = exp2f(before - shift);  // 0 where nothing was seen before
  *max = top;
  *sum = *sum * factor + _mm512_reduce_add_ps(total);
  return factor;
}

void attend(const llama_mm::QueryGroup& group, const llama_mm::KeyBlock& block) {
  alignas(64) float scores[kQueries][kKeys];
  alignas(64) uint16_t weights[kQueries][kKeys];
  const int64_t padded = llama_mm::padded_dim(group.dim, kPadding);
  const int keys = (llama_mm::seen_keys(block, kQueries) + kTile - 1) / kTile * kTile;
  const uint16_t* ordered = static_cast<const uint16_t*>(block.keys);
  __m512 top[kQueries];
  for (int t = 0; t < kQueries; t++) top[t] = _mm512_set1_ps(2 * llama_mm::kHidden);
  for (int first = 0; first < keys; first += kTile)
    score(static_cast<const uint16_t*>(group.q), ordered + first * padded, padded, group.scale, block.bias + first,
          reinterpret_cast<float(*)[kKeys]>(&scores[0][first]), top);
  float factor[kQueries];
  for (int t = 0; t < kQueries; t++) {
    const int later = block.causal_from + t + 1;
    const float here = later < keys ? llama_mm::hide_later(scores[t], later, keys) : _mm512_reduce_max_ps(top[t]);
    const float largest = here > group.max[t] ? here : group.max[t];
    factor[t] = soften(scores[t], keys, largest, group.max + t, group.sum + t, weights[t]);
  }
  const uint16_t* values = static_cast<const uint16_t*>(block.values);
  float* acc = group.acc;
  for (int64_t left = padded / 16; left > 0;) {
    const int64_t parts = left == 5 || left == 6 ? 3 : left < 4 ? left : 4;
    switch (parts) {
      case 4: add_values<4>(weights, values, padded, keys, factor, acc); break;
      case 3: add_values<3>(weights, values, padded, keys, factor, acc); break;
      case 2: add_values<2>(weights, values, padded, keys, factor, acc); break;
      default: add_values<1>(weights, values, padded, keys, factor, acc);
    }
    left -= parts, values += 32 * parts, acc += 16 * parts;
  }
}

}  // namespace

namespace llama_mm {
extern const Attention kPairsAvx512 = {2, kQueries, 16, kPadding, order_queries, order_keys, order_values, attend,
                                         put_rows<kBFloat16>};
}
