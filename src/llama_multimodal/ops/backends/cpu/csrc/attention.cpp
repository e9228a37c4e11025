// Attention of many queries over dense keys, block by block with a running softmax (Dao et al. 2022).
//
// The keys and values of a few key heads are put in the order that the products read, then all queries of their heads
// go over them. A task is some queries of one head: they meet each block of keys while it lies in the second cache.
//
// Shapes: B rows · H query heads · Hkv key heads · T queries · S keys · D head dim, Dp rounded up to the kernel's padding
#include "attention.h"

#include <omp.h>

#include <cmath>
#include <cstring>

#include "scalar.h"
#include "scratch.h"

namespace {

using namespace llama_mm;

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

// Queries of one head that meet each block of keys together.
struct Task {
  const Problem& p;
  const Attention& use;
  int64_t padded;
  char* q;            // [groups, Q, Dp]
  float *acc, *max, *sum;

  QueryGroup group(int64_t g) const {
    const int64_t t = g * use.queries, element = t * padded;
    return {q + element * use.bytes, acc + element, max + t, sum + t, p.dim,
            kLog2E / std::sqrt(static_cast<float>(p.dim))};
  }

  // Queries [first, end) of a head; bias, ordered keys and values: of the first key.
  void run(int64_t row, int64_t head, int64_t first, int64_t end, const char* keys, const char* values,
           const float* bias) const {
    const int64_t count = end - first, groups = (count + use.queries - 1) / use.queries;
    for (int64_t g = 0; g < groups; g++) {
      const int64_t t = g * use.queries;
      use.order_queries(p.from(p.q, p.q_at.at(row, head, first + t)), p.q_at.of[2],
                        least(count - t, int64_t{use.queries}), p.dim, q + t * padded * use.bytes);
    }
    for (int64_t i = 0; i < groups * use.queries * padded; i++) acc[i] = 0.0f;
    for (int64_t t = 0; t < groups * use.queries; t++) {
      max[t] = 2 * kHidden;
      sum[t] = 0.0f;
    }
    for (int64_t key = 0; key < p.keys && !(p.causal && key >= end); key += kKeys) {
      const int64_t offset = key * padded * use.bytes;
      for (int64_t g = 0; g < groups; g++) {
        const int64_t seen = first + g * use.queries - key;
        if (p.causal && seen + use.queries <= 0) continue;
        use.attend(group(g), {keys + offset, values + offset, bias + key,
                              static_cast<int>(least(p.keys - key, int64_t{kKeys})),
                              p.causal && seen < kKeys ? static_cast<int>(seen) : kKeys});
      }
    }
    for (int64_t g = 0; g < groups; g++) {
      const int64_t t = g * use.queries;
      use.put(group(g), least(count - t, int64_t{use.queries}),
              const_cast<void*>(p.from(p.out, p.out_at.at(row, head, first + t))), p.out_at.of[2]);
    }
  }
};

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
  const int64_t padded = padded_dim(dim, use.padding);
  // A few tasks for every thread, if there are so many queries.
  const int64_t fair = rows * heads * queries / (4 * threads * use.queries);
  const int64_t of_task = use.queries * most(int64_t{1}, least(fair, int64_t{use.groups}));
  const int64_t padded_keys = rounded_up(keys, kTile), group = heads / kv_heads;
  const int64_t pairs = rows * kv_heads, together = least(pairs, int64_t{threads});  // key heads in order at a time
  const int64_t of_pair = padded_keys * padded, pieces = (queries + of_task - 1) / of_task;
  const Scratch ordered(2 * together * of_pair * use.bytes), biases(padded_keys * 4);
  const Scratch q_memory(threads * of_task * padded * use.bytes), acc_memory(threads * of_task * (padded + 2) * 4);
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
    if (use.begin) use.begin();
    float* const acc = reinterpret_cast<float*>(acc_memory.memory) + me * of_task * (padded + 2);
    const Task mine = {p, use, padded, q_memory.memory + me * of_task * padded * use.bytes,
                       acc, acc + of_task * padded, acc + of_task * (padded + 1)};
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
        // One head after the other: their keys and values may fit the second cache. Causal: the longest first.
        const int64_t slot = task / (group * pieces), member = task % group;
        const int64_t piece = pieces - 1 - task / group % pieces;
        const int64_t row = (pair + slot) / kv_heads, head = (pair + slot) % kv_heads * group + member;
        const int64_t first = piece * of_task, end = least(queries, first + of_task);
        const int64_t offset = slot * of_pair * use.bytes;
        mine.run(row, head, first, end, ordered_keys + offset, ordered_values + offset, bias);
      }
    }
    if (use.end) use.end();
  }
  return 0;
}

}  // extern "C"
