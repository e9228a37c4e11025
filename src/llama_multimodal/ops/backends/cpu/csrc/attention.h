// Attention of many queries: what an instruction set provides, and what the driver (attention.cpp) hands it.
//
// Shapes: D head dim, Dp rounded up to 16
#pragma once

#include <cstdint>

#include "kernels.h"

namespace llama_mm {

constexpr int kQueries = 6;  // queries whose sums lie in registers together
constexpr int kTile = 64;    // keys whose scores are summed in registers with them; memory goes on to a multiple
constexpr int kKeys = 256;   // keys that they look at together
constexpr float kHidden = -1e30f;  // a score below this weighs nothing; far from -inf, whose differences are NaN

namespace {  // each instruction set has its own, see vec.h
inline int64_t padded_dim(int64_t dim) { return (dim + 15) / 16 * 16; }
}  // namespace

// kQueries queries of one head, and their softmax over the keys seen so far, in powers of two: out = acc / sum.
struct QueryGroup {
  const void* q;      // [kQueries, Dp], zeros past D
  float* acc;         // [kQueries, Dp]
  float* max;         // [kQueries]
  float* sum;         // [kQueries]
  int64_t dim;
  float scale;  // log2(e) / √D
};

// Up to kKeys keys and their values, in order; memory and bias go on to a multiple of kTile.
struct KeyBlock {
  const void* keys;    // Dp values a key
  const void* values;  // Dp values a key, zeros where there is none
  const float* bias;   // [keys], in powers of two, finite; twice kHidden for keys that are not there
  int count;
  int causal_from;  // the last key here that the first query sees, the next query one more; kKeys or more: all
};

namespace {

// How many of a block's keys some query of a group sees.
inline int seen_keys(const KeyBlock& block) {
  const int last = block.causal_from + kQueries;
  return last < block.count ? last : block.count;
}

// The largest score of one query once those of later keys are hidden.
inline float hide_later(float* scores, int from, int keys) {
  for (int i = from < 0 ? 0 : from; i < keys; i++) scores[i] = 2 * kHidden;
  float top = 2 * kHidden;
  for (int i = 0; i < from && i < keys; i++) top = scores[i] > top ? scores[i] : top;
  return top;
}

}  // namespace

// What is in order is in the kernel's own layout; its values all take `bytes`. Strides are in elements.
struct Attention {
  int bytes;
  void (*order_query)(const void* q, int64_t dim, void* out);
  void (*order_keys)(const void* k, int64_t stride, int64_t count, int64_t dim, void* out);    // kTile, or
  void (*order_values)(const void* v, int64_t stride, int64_t count, int64_t dim, void* out);  // `count` of them
  void (*attend)(const QueryGroup& group, const KeyBlock& block);
};

// What this machine has for a dtype with the instruction set in use, or null.
const Attention* attention(DType dtype);

}  // namespace llama_mm
