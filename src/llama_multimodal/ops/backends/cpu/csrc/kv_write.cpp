// A step's keys and values into caches in blocks, as they are or in 8 bits.
//
// Shapes: T tokens to store · Hkv key heads · D head dim
#include <cstring>

#include "drivers.h"
#include "kernels.h"
#include "quantize_row.h"
#include "scalar.h"

using namespace llama_mm;

// Each returns 0, or 1 + the first token whose slot is out of range.
extern "C" {

// k, v: [T, Hkv, D] with strides of T and Hkv; caches: [slots, Hkv, D], contiguous. Nothing is written on an error.
int llama_mm_cpu_kv_write(const void* k, const int64_t* k_strides, const void* v, const int64_t* v_strides, int bytes,
                          int64_t tokens, int64_t kv_heads, int64_t dim, void* k_cache, void* v_cache,
                          int64_t cache_slots, const int64_t* slots, int threads) {
  for (int64_t t = 0; t < tokens; t++)
    if (slots[t] >= cache_slots) return static_cast<int>(t + 1);
  const int64_t row_bytes = dim * bytes;
  const int team = tokens * kv_heads * row_bytes < kBytesPerThread ? 1 : threads;
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
  const int team = tokens * kv_heads * dim < kBytesPerThread ? 1 : threads;
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
