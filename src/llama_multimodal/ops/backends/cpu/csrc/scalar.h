// What the drivers share: one value of a tensor, to and from fp32, whole numbers, and how many threads are worth it.
#pragma once

#include <cstring>

#include "kernels.h"

namespace {

constexpr float kLog2E = 1.44269504f;  // softmax runs in powers of two

template <typename T>
T least(T a, T b) {
  return a < b ? a : b;
}
template <typename T>
T most(T a, T b) {
  return a > b ? a : b;
}
inline int64_t rounded_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

constexpr int64_t kBytesPerThread = 1 << 15;  // less than this to read is not worth waking another thread
inline int useful_threads(int threads, int64_t bytes) {
  return static_cast<int>(least(bytes / kBytesPerThread + 1, int64_t{threads}));
}

// work(row) for rows that are independent of each other, of so many bytes each; no more threads than rows.
template <typename Work>
void for_rows(int64_t rows, int64_t bytes, int threads, const Work& work) {
  const int team = static_cast<int>(least(rows, int64_t{useful_threads(threads, rows * bytes)}));
#pragma omp parallel for schedule(static) num_threads(team) if (team > 1)
  for (int64_t row = 0; row < rows; row++) work(row);
}

inline int bytes_of(llama_mm::DType dtype) {
  return dtype == llama_mm::kFloat32 ? 4 : dtype == llama_mm::kBFloat16 ? 2 : 1;
}

inline float get(const void* from, llama_mm::DType dtype, int64_t i) {
  if (dtype == llama_mm::kFloat32) return static_cast<const float*>(from)[i];
  const uint32_t word = static_cast<uint32_t>(static_cast<const uint16_t*>(from)[i]) << 16;
  float x;
  memcpy(&x, &word, sizeof(x));
  return x;
}

inline void set(void* to, llama_mm::DType dtype, int64_t i, float x) {
  if (dtype == llama_mm::kFloat32) {
    static_cast<float*>(to)[i] = x;
    return;
  }
  uint32_t word;
  memcpy(&word, &x, sizeof(word));
  const bool nan = x != x;  // rounding must not carry a NaN over to inf
  static_cast<uint16_t*>(to)[i] = static_cast<uint16_t>(nan ? 0x7fc0u : (word + 0x7fffu + (word >> 16 & 1u)) >> 16);
}

// `count` values from the i-th on. The plain loops are ones that compilers turn into vectors.
inline void put_row(void* to, llama_mm::DType dtype, int64_t i, const float* x, int64_t count) {
  if (dtype == llama_mm::kFloat32) {
    memcpy(static_cast<float*>(to) + i, x, static_cast<size_t>(count) * sizeof(float));
    return;
  }
  uint16_t* out = static_cast<uint16_t*>(to) + i;
  for (int64_t n = 0; n < count; n++) set(out, llama_mm::kBFloat16, n, x[n]);
}

}  // namespace
