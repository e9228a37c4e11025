// Attention of many queries over dense keys, block by block with a running softmax (Dao et al. 2022).
//
// The keys and values of a few key heads are put in the order that the products read, then all queries of their heads
// go over them. A task is some queries of one head: they meet each block of keys while it lies in the second cache.
//
// Shapes: B rows · H query heads · Hkv key heads · T queries · S keys · D head dim, Dp rounded up to 16
#include "attention.h"

#include <omp.h>

#include <cmath>
#include <cstring>

#include "scalar.h"
#include "scratch.h"

namespace {

using namespace llama_mm;

constexpr int64_t kTaskQueries = 16 * kQueries;

// Of a [B, heads, tokens, D] tensor, in elements; the last dimension has none.
struct Strides {
  const int64_t* of;
  int64_t at(int64_t row, int64_t head, int64_t token) const { return row * of[0] + head * of[1] + token * of[2]; }
};

struct Problem {
  const void *q, *k, *v;
  void* out;
  DType dtype;
  Strides q_at, k_at, v_at, out_at;
  int64_t heads, kv_heads, queries, keys, dim;
  bool causal;

  const void* from(const void* tensor, int64_t element) const {
    return static_cast<const char*>(tensor) + element * bytes_of(dtype);
  }
};

// Memory of one thread's task.
struct Task {
  alignas(64) float max[kTaskQueries];
  alignas(64) float sum[kTaskQueries];
};

void attend_some(const Problem& p, const Attention& use, int64_t row, int64_t head, int64_t first, int64_t end,
                 const char* keys, const char* values, const float* bias, char* q, float* acc) {
  const int64_t padded = padded_dim(p.dim), groups = (end - first + kQueries - 1) / kQueries;
  Task task;
  memset(q, 0, static_cast<size_t>(groups * kQueries * padded * use.bytes));
  for (int64_t t = first; t < end; t++)
    use.order_query(p.from(p.q, p.q_at.at(row, head, t)), p.dim, q + (t - first) * padded * use.bytes);
  for (int64_t i = 0; i < groups * kQueries * padded; i++) acc[i] = 0.0f;
  for (int64_t t = 0; t < groups * kQueries; t++) {
    task.max[t] = 2 * kHidden;
    task.sum[t] = 0.0f;
  }
  const float scale = kLog2E / std::sqrt(static_cast<float>(p.dim));
  for (int64_t key = 0; key < p.keys && !(p.causal && key >= end); key += kKeys) {
    const int64_t count = least(p.keys - key, int64_t{kKeys});
    for (int64_t g = 0; g < groups; g++) {
      const int64_t t = g * kQueries, seen = first + t - key;
      if (p.causal && seen + kQueries <= 0) continue;
      const QueryGroup group = {q + t * padded * use.bytes, acc + t * padded, task.max + t, task.sum + t, p.dim, scale};
      const int64_t offset = key * padded * use.bytes;
      use.attend(group, {keys + offset, values + offset, bias + key, static_cast<int>(count),
                         p.causal && seen < kKeys ? static_cast<int>(seen) : kKeys});
    }
  }
  for (int64_t t = first; t < end; t++) {
    float* row_acc = acc + (t - first) * padded;
    const float sum = task.sum[t - first];
    for (int64_t d = 0; d < p.dim; d++) row_acc[d] = sum == 0.0f ? 0.0f : row_acc[d] / sum;
    put_row(p.out, p.dtype, p.out_at.at(row, head, t), row_acc, p.dim);
  }
}

}  // namespace

extern "C" {

// Whether this machine has such kernels with the instruction set in use.
int llama_mm_cpu_has_attention(int dtype) { return attention(static_cast<DType>(dtype)) != nullptr; }

// q, out: [B, H, T, D]; k, v: [B, Hkv, S, D]; key_bias: fp32 [S] or null. 0, or -1 where there is no memory.
int llama_mm_cpu_attention(int dtype, const void* q, const int64_t* q_strides, const void* k, const int64_t* k_strides,
                           const void* v, const int64_t* v_strides, int64_t rows, int64_t heads, int64_t kv_heads,
                           int64_t queries, int64_t keys, int64_t dim, int causal, const float* key_bias, void* out,
                           const int64_t* out_strides, int threads) {
  const Attention& use = *attention(static_cast<DType>(dtype));
  const Problem p = {q, k, v, out, static_cast<DType>(dtype),
                     {q_strides}, {k_strides}, {v_strides}, {out_strides},
                     heads, kv_heads, queries, keys, dim, causal != 0};
  const int64_t padded = padded_dim(dim), padded_keys = rounded_up(keys, kTile), group = heads / kv_heads;
  const int64_t pairs = rows * kv_heads, together = least(pairs, int64_t{threads});  // key heads in order at a time
  const int64_t of_pair = padded_keys * padded, pieces = (queries + kTaskQueries - 1) / kTaskQueries;
  const Scratch ordered(2 * together * of_pair * use.bytes), biases(padded_keys * 4);
  const Scratch q_memory(threads * kTaskQueries * padded * use.bytes), acc_memory(threads * kTaskQueries * padded * 4);
  if (!ordered.memory || !biases.memory || !q_memory.memory || !acc_memory.memory) return -1;
  char* const ordered_keys = ordered.memory;
  char* const ordered_values = ordered_keys + together * of_pair * use.bytes;
  float* const bias = reinterpret_cast<float*>(biases.memory);
  for (int64_t key = 0; key < padded_keys; key++)
    bias[key] = key >= keys || (key_bias && key_bias[key] < kHidden) ? 2 * kHidden
                : key_bias                                           ? key_bias[key] * kLog2E
                                                                     : 0.0f;

#pragma omp parallel num_threads(threads)
  {
    const int me = omp_get_thread_num();
    char* my_q = q_memory.memory + me * kTaskQueries * padded * use.bytes;
    float* my_acc = reinterpret_cast<float*>(acc_memory.memory) + me * kTaskQueries * padded;
    for (int64_t pair = 0; pair < pairs; pair += together) {
      const int64_t here = least(pairs - pair, together);
#pragma omp for schedule(static)
      for (int64_t i = 0; i < here * (padded_keys / kTile); i++) {
        const int64_t slot = i % here, key = i / here * kTile;
        const int64_t row = (pair + slot) / kv_heads, head = (pair + slot) % kv_heads;
        const int64_t count = least(keys - key, int64_t{kTile});
        const int64_t offset = (slot * of_pair + key * padded) * use.bytes;
        use.order_keys(p.from(k, p.k_at.at(row, head, key)), k_strides[2], count, dim, ordered_keys + offset);
        use.order_values(p.from(v, p.v_at.at(row, head, key)), v_strides[2], count, dim, ordered_values + offset);
      }
#pragma omp for schedule(dynamic)
      for (int64_t task = 0; task < here * group * pieces; task++) {
        const int64_t slot = task % here, member = task / here % group;
        const int64_t piece = pieces - 1 - task / (here * group);  // causal: the longest first
        const int64_t row = (pair + slot) / kv_heads, head = (pair + slot) % kv_heads * group + member;
        const int64_t first = piece * kTaskQueries, left = queries - first;
        const int64_t end = first + least(left, kTaskQueries);
        const int64_t offset = slot * of_pair * use.bytes;
        attend_some(p, use, row, head, first, end, ordered_keys + offset, ordered_values + offset, bias, my_q, my_acc);
      }
    }
  }
  return 0;
}

}  // extern "C"
