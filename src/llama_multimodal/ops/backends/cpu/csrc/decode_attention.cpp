// Attention of one query a row and head over a dense cache, a paged cache or a range of packed vision tokens; kv_write.
//
// A task is one row, one key head and one part of its keys; the query heads that share a key head read it together.
// Keys are split into parts only where rows and heads alone would leave threads idle.
//
// Shapes: B rows · H query heads · Hkv key heads · D head dim · C slots of a row · N blocks · S slots of a block
// M blocks of a row, at most · T tokens to store
#include <cmath>
#include <cstdlib>
#include <cstring>

#include "drivers.h"
#include "kernels.h"
#include "quantize_row.h"
#include "scalar.h"

namespace {

using namespace llama_mm;

constexpr int64_t kLeastPart = 128;    // keys; fewer are not worth a part of their own
constexpr int64_t kSmall = 1 << 15;    // bytes of keys and values; fewer are not worth waking another thread
constexpr int kNoMemory = -1;

struct Problem {
  const void* q;  // [B, H, D], contiguous
  void* out;      // the same
  DType dtype;
  int64_t rows, heads, kv_heads, dim;
  int threads;
  DType cache;  // of keys and values
};

// Keys: keys.count(row), and keys.run(row, kv head, first, end): the longest run from `first` on.
template <typename Keys>
int attend_all(const Problem& p, const Keys& keys) {
  const int64_t pairs = p.rows * p.kv_heads, group = p.heads / p.kv_heads;
  int64_t longest = 0, total = 0;
  for (int64_t row = 0; row < p.rows; row++) {
    longest = most(longest, keys.count(row));
    total += keys.count(row);
  }
  int threads = p.threads;
  if (total * p.kv_heads * p.dim * 2 * bytes_of(p.cache) < kSmall) threads = 1;
  int64_t parts = 1;
  if (pairs < 4 * threads && pairs % threads)
    parts = most(int64_t{1}, least((4 * threads + pairs - 1) / pairs, longest / kLeastPart));

  // A task's memory: q, acc [group, D]; max, sum [group].
  const int64_t floats = group * (2 * p.dim + 2), tasks = pairs * parts;
  float* memory = static_cast<float*>(malloc(static_cast<size_t>(tasks * floats + 1) * sizeof(float)));
  if (!memory) return kNoMemory;
  const auto attend = kernels()->attend[p.cache];
  const float scale = kLog2E / std::sqrt(static_cast<float>(p.dim));

#pragma omp parallel num_threads(threads) if (threads > 1)
  {
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < tasks; task++) {
      const int64_t row = task / (p.kv_heads * parts), head = task / parts % p.kv_heads, part = task % parts;
      float *q = memory + task * floats, *acc = q + group * p.dim, *max = acc + group * p.dim, *sum = max + group;
      for (int64_t i = 0; i < group * p.dim; i++) {
        q[i] = scale * get(p.q, p.dtype, (row * p.heads + head * group) * p.dim + i);
        acc[i] = 0.0f;
      }
      for (int64_t g = 0; g < group; g++) {
        max[g] = -INFINITY;
        sum[g] = 0.0f;
      }
      const Softmax state = {q, acc, max, sum, static_cast<int>(group), p.dim};
      const int64_t count = keys.count(row), end = count * (part + 1) / parts;
      for (int64_t first = count * part / parts; first < end;) {
        const Run run = keys.run(row, head, first, end);
        attend(run, state);
        first += run.count;
      }
    }

#pragma omp for schedule(static)
    for (int64_t i = 0; i < pairs * group; i++) {
      float* merged = memory + i / group * parts * floats;  // the first part's; the others are added to it
      const int64_t g = i % group, at_acc = (group + g) * p.dim;
      const int64_t at_max = 2 * group * p.dim + g, at_sum = at_max + group;
      float top = -INFINITY, sum = 0.0f;
      for (int64_t part = 0; part < parts; part++) top = std::fmax(top, merged[part * floats + at_max]);
      const float shift = top == -INFINITY ? 0.0f : top;
      for (int64_t part = 0; part < parts; part++) {
        const float* other = merged + part * floats;
        const float weight = std::exp2(other[at_max] - shift);
        sum += weight * other[at_sum];
        for (int64_t d = 0; d < p.dim; d++)
          merged[at_acc + d] = weight * other[at_acc + d] + (part ? merged[at_acc + d] : 0.0f);
      }
      for (int64_t d = 0; d < p.dim; d++)
        set(p.out, p.dtype, i * p.dim + d, sum == 0.0f ? 0.0f : merged[at_acc + d] / sum);
    }
  }
  free(memory);
  return 0;
}

struct Dense {
  const char *k, *v;  // [B, Hkv, C, D]
  const int64_t *k_strides, *v_strides;  // of B, Hkv and C, in elements
  const int32_t* lengths;
  const float* bias;  // [C], in powers of two; or null
  int bytes;

  int64_t count(int64_t row) const { return lengths[row]; }
  Run run(int64_t row, int64_t head, int64_t first, int64_t end) const {
    return {k + (row * k_strides[0] + head * k_strides[1] + first * k_strides[2]) * bytes,
            v + (row * v_strides[0] + head * v_strides[1] + first * v_strides[2]) * bytes,
            k_strides[2], v_strides[2], end - first, bias ? bias + first : nullptr};
  }
};

struct Paged {
  const char *k, *v;  // [N, S, Hkv, D]
  const int64_t *k_strides, *v_strides;  // of N, S and Hkv
  const int32_t* lengths;
  const int32_t* table;  // [B, M]
  int64_t slots, blocks_of_row;
  int bytes;
  const float *k_scales, *v_scales;  // [N, S, Hkv]; or null
  int64_t kv_heads;

  int64_t count(int64_t row) const { return lengths[row]; }
  Run run(int64_t row, int64_t head, int64_t first, int64_t end) const {
    const int64_t block = table[row * blocks_of_row + first / slots], slot = first % slots;
    const int64_t left = slots - slot, count = least(end - first, left);
    const int64_t scale = (block * slots + slot) * kv_heads + head;
    return {k + (block * k_strides[0] + slot * k_strides[1] + head * k_strides[2]) * bytes,
            v + (block * v_strides[0] + slot * v_strides[1] + head * v_strides[2]) * bytes,
            k_strides[1], v_strides[1], count, nullptr,
            k_scales ? k_scales + scale : nullptr, v_scales ? v_scales + scale : nullptr, kv_heads};
  }
};

struct Ranges {
  const char *k, *v;  // [Hkv, S, D]
  const int64_t *k_strides, *v_strides;  // of Hkv and S
  const int32_t* ranges;                 // [B, 2]
  int bytes;

  int64_t count(int64_t row) const { return ranges[2 * row + 1] - ranges[2 * row]; }
  Run run(int64_t row, int64_t head, int64_t first, int64_t end) const {
    const int64_t key = ranges[2 * row] + first;
    return {k + (head * k_strides[0] + key * k_strides[1]) * bytes,
            v + (head * v_strides[0] + key * v_strides[1]) * bytes,
            k_strides[1], v_strides[1], end - first, nullptr};
  }
};

}  // namespace

// Each returns 0, -1 where there is no memory, or 1 + the first row (token) whose lengths or indices are out of range.
extern "C" {

int llama_mm_cpu_decode_attention(const void* q, int dtype, int64_t rows, int64_t heads, int64_t kv_heads, int64_t dim,
                                  const void* k, const int64_t* k_strides, const void* v, const int64_t* v_strides,
                                  int64_t capacity, const int32_t* lengths, const float* key_bias, void* out,
                                  int threads) {
  for (int64_t row = 0; row < rows; row++)
    if (lengths[row] < 0 || lengths[row] > capacity) return static_cast<int>(row + 1);
  float* bias = nullptr;
  if (key_bias) {
    bias = static_cast<float*>(malloc(static_cast<size_t>(capacity + 1) * sizeof(float)));
    if (!bias) return kNoMemory;
    for (int64_t key = 0; key < capacity; key++) bias[key] = key_bias[key] * kLog2E;
  }
  const DType type = static_cast<DType>(dtype);
  const Problem problem = {q, out, type, rows, heads, kv_heads, dim, threads, type};
  const Dense keys = {static_cast<const char*>(k), static_cast<const char*>(v), k_strides, v_strides, lengths, bias,
                      bytes_of(type)};
  const int status = attend_all(problem, keys);
  free(bias);
  return status;
}

int llama_mm_cpu_paged_decode_attention(const void* q, int dtype, int64_t rows, int64_t heads, int64_t kv_heads,
                                        int64_t dim, const void* k, const int64_t* k_strides, const void* v,
                                        const int64_t* v_strides, int cache_dtype, const float* k_scales,
                                        const float* v_scales, int64_t blocks, int64_t slots, const int32_t* table,
                                        int64_t blocks_of_row, const int32_t* lengths, void* out, int threads) {
  for (int64_t row = 0; row < rows; row++) {
    if (lengths[row] < 0 || lengths[row] > blocks_of_row * slots) return static_cast<int>(row + 1);
    for (int64_t i = 0; i * slots < lengths[row]; i++) {
      const int32_t block = table[row * blocks_of_row + i];
      if (block < 0 || block >= blocks) return static_cast<int>(row + 1);
    }
  }
  const DType cache = static_cast<DType>(cache_dtype);
  const Problem problem = {q, out, static_cast<DType>(dtype), rows, heads, kv_heads, dim, threads, cache};
  const Paged keys = {static_cast<const char*>(k), static_cast<const char*>(v), k_strides, v_strides, lengths, table,
                      slots, blocks_of_row, bytes_of(cache), k_scales, v_scales, kv_heads};
  return attend_all(problem, keys);
}

int llama_mm_cpu_cross_attention(const void* q, int dtype, int64_t rows, int64_t heads, int64_t kv_heads, int64_t dim,
                                 const void* k, const int64_t* k_strides, const void* v, const int64_t* v_strides,
                                 int64_t tokens, const int32_t* ranges, void* out, int threads) {
  for (int64_t row = 0; row < rows; row++)
    if (ranges[2 * row] < 0 || ranges[2 * row + 1] < ranges[2 * row] || ranges[2 * row + 1] > tokens)
      return static_cast<int>(row + 1);
  const DType type = static_cast<DType>(dtype);
  const Problem problem = {q, out, type, rows, heads, kv_heads, dim, threads, type};
  const Ranges keys = {static_cast<const char*>(k), static_cast<const char*>(v), k_strides, v_strides, ranges,
                       bytes_of(type)};
  return attend_all(problem, keys);
}

// k, v: [T, Hkv, D] with strides of T and Hkv; caches: [slots, Hkv, D], contiguous. Nothing is written on an error.
int llama_mm_cpu_kv_write(const void* k, const int64_t* k_strides, const void* v, const int64_t* v_strides, int bytes,
                          int64_t tokens, int64_t kv_heads, int64_t dim, void* k_cache, void* v_cache,
                          int64_t cache_slots, const int64_t* slots, int threads) {
  for (int64_t t = 0; t < tokens; t++)
    if (slots[t] >= cache_slots) return static_cast<int>(t + 1);
  const int64_t row_bytes = dim * bytes;
  const int team = tokens * kv_heads * row_bytes < kSmall ? 1 : threads;
#pragma omp parallel for schedule(static) num_threads(team) if (team > 1)
  for (int64_t t = 0; t < tokens; t++) {
    if (slots[t] < 0) continue;  // padding
    for (int64_t head = 0; head < kv_heads; head++) {
      const int64_t to = (slots[t] * kv_heads + head) * row_bytes;
      const int64_t from_k = (t * k_strides[0] + head * k_strides[1]) * bytes;
      const int64_t from_v = (t * v_strides[0] + head * v_strides[1]) * bytes;
      memcpy(static_cast<char*>(k_cache) + to, static_cast<const char*>(k) + from_k, static_cast<size_t>(row_bytes));
      memcpy(static_cast<char*>(v_cache) + to, static_cast<const char*>(v) + from_v, static_cast<size_t>(row_bytes));
    }
  }
  return 0;
}

// The same for caches in 8 bits: k, v of `dtype` are rounded, and scales [slots, Hkv] go with them.
int llama_mm_cpu_quantized_kv_write(const void* k, const int64_t* k_strides, const void* v, const int64_t* v_strides,
                                    int dtype, int64_t tokens, int64_t kv_heads, int64_t dim, void* k_cache,
                                    void* v_cache, int cache_dtype, float* k_scales, float* v_scales,
                                    int64_t cache_slots, const int64_t* slots, int threads) {
  for (int64_t t = 0; t < tokens; t++)
    if (slots[t] >= cache_slots) return static_cast<int>(t + 1);
  const DType from = static_cast<DType>(dtype), to = static_cast<DType>(cache_dtype);
  const int team = tokens * kv_heads * dim < kSmall ? 1 : threads;
#pragma omp parallel for schedule(static) num_threads(team) if (team > 1)
  for (int64_t t = 0; t < tokens; t++) {
    if (slots[t] < 0) continue;  // padding
    for (int64_t head = 0; head < kv_heads; head++) {
      const int64_t row = slots[t] * kv_heads + head;
      quantize_row(k, from, t * k_strides[0] + head * k_strides[1], dim, to, static_cast<uint8_t*>(k_cache) + row * dim,
                   k_scales + row);
      quantize_row(v, from, t * v_strides[0] + head * v_strides[1], dim, to, static_cast<uint8_t*>(v_cache) + row * dim,
                   v_scales + row);
    }
  }
  return 0;
}

}  // extern "C"
