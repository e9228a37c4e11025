// What lies between a decoder block's products, one row at a time, rounded where the ops' references round.
#pragma once

#include <cmath>

#include "kernels.h"
#include "vec.h"

namespace {

// The first `count` of LANES values, the others 0.
template <typename T>
INLINE Floats load_some(const T* from, int64_t count) {
  if (count >= LANES) return load(from);
  T all[LANES] = {};
  memcpy(all, from, static_cast<size_t>(count) * sizeof(T));
  return load(all);
}

template <typename T>
INLINE void put_some(T* to, Floats x, int64_t count) {
  if (count >= LANES) return put(to, x);
  T all[LANES];
  put(all, x);
  memcpy(to, all, static_cast<size_t>(count) * sizeof(T));
}

// x as it comes out of a tensor of T.
template <typename T>
INLINE Floats rounded(Floats x) {
  T all[LANES];
  put(all, x);
  return load(all);
}

template <typename T>
void add_row(const void* a, const void* b, int64_t size, void* out) {
  for (int64_t i = 0; i < size; i += LANES)
    put_some(static_cast<T*>(out) + i,
             load_some(static_cast<const T*>(a) + i, size - i) + load_some(static_cast<const T*>(b) + i, size - i),
             size - i);
}

template <typename T>
void norm_row(const void* x, const void* weight, int64_t size, float eps, void* out) {
  const T *from = static_cast<const T*>(x), *gain = static_cast<const T*>(weight);
  Floats squares = {};
  for (int64_t i = 0; i < size; i += LANES) {
    const Floats value = load_some(from + i, size - i);
    squares += value * value;
  }
  const float scale = 1.0f / std::sqrt(sum(squares) / static_cast<float>(size) + eps);
  for (int64_t i = 0; i < size; i += LANES) {
    const Floats normed = rounded<T>(load_some(from + i, size - i) * scale);
    put_some(static_cast<T*>(out) + i, normed * load_some(gain + i, size - i), size - i);
  }
}

template <typename T>
void swiglu_row(const void* gate, const void* up, int64_t size, void* out) {
  constexpr float log2_e = 1.44269504f;
  for (int64_t i = 0; i < size; i += LANES) {
    const Floats x = load_some(static_cast<const T*>(gate) + i, size - i);
    const Floats power = exp2_of_negative((x < 0.0f ? x : -x) * log2_e);  // e^-|x|
    const Floats silu = x * (x < 0.0f ? power : splat(1.0f)) / (power + 1.0f);
    put_some(static_cast<T*>(out) + i, rounded<T>(silu) * load_some(static_cast<const T*>(up) + i, size - i),
             size - i);
  }
}

// One head [2 · half] in place: element i turns with i + half.
template <typename T>
void rotate_head(void* head, const float* cos, const float* sin, int64_t half) {
  T *first = static_cast<T*>(head), *second = first + half;
  for (int64_t i = 0; i < half; i += LANES) {
    const Floats a = load_some(first + i, half - i), b = load_some(second + i, half - i);
    const Floats c = load_some(cos + i, half - i), s = load_some(sin + i, half - i);
    put_some(first + i, a * c - b * s, half - i);
    put_some(second + i, b * c + a * s, half - i);
  }
}

template <typename T>
constexpr llama_mm::Elementwise elementwise() {
  return {add_row<T>, norm_row<T>, swiglu_row<T>, rotate_head<T>};
}

}  // namespace
