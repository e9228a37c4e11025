// Attention of many queries: what an instruction set provides, and what the driver (attention.cpp) hands it.
//
// Shapes: Q queries of a group · D head dim, Dp rounded up to the kernel's padding
#pragma once

#include <cstdint>

#include "kernels.h"
#include "scalar.h"

namespace llama_mm {

constexpr int kTile = 64;    // keys that are put in order together; memory goes on to a multiple
constexpr int kKeys = 256;   // keys that they look at together
constexpr float kHidden = -1e30f;  // a score below this weighs nothing; far from -inf, whose differences are NaN

namespace {  // each instruction set has its own, see vec.h
inline int64_t padded_dim(int64_t dim, int64_t padding = 16) { return (dim + padding - 1) / padding * padding; }
}  // namespace

// Q queries of one head, and their softmax over the keys seen so far, in powers of two: out = acc / sum.
struct QueryGroup {
  const void* q;  // in order, zeros where there is none
  float* acc;     // Q times Dp values, in the kernel's own order
  float* max;     // [Q]
  float* sum;     // [Q]
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
inline int seen_keys(const KeyBlock& block, int queries) {
  const int last = block.causal_from + queries;
  return last < block.count ? last : block.count;
}

// The largest score of one query once those of later keys are hidden.
inline float hide_later(float* scores, int from, int keys) {
  for (int i = from < 0 ? 0 : from; i < keys; i++) scores[i] = 2 * kHidden;
  float top = 2 * kHidden;
  for (int i = 0; i < from && i < keys; i++) top = scores[i] > top ? scores[i] : top;
  return top;
}

// `put` where acc is [Q, Dp].
template <DType TYPE>
void put_rows(const QueryGroup& group, int64_t count, void* out, int64_t stride) {
  const int64_t padded = padded_dim(group.dim);
  for (int64_t t = 0; t < count; t++) {
    float* row = group.acc + t * padded;
    for (int64_t d = 0; d < group.dim; d++) row[d] = group.sum[t] == 0.0f ? 0.0f : row[d] / group.sum[t];
    put_row(out, TYPE, t * stride, row, group.dim);
  }
}

}  // namespace

// What is in order is in the kernel's own layout; its values all take `bytes`. Strides are in elements.
struct Attention {
  int bytes;
  int queries;  // Q, of a group
  int groups;   // at most, that meet each block of keys while it lies in the second cache
  int padding;  // Dp is a multiple of it
  void (*order_queries)(const void* q, int64_t stride, int64_t count, int64_t dim, void* out);  // up to Q, and zeros
  // Up to kTile keys, and zeros.
  void (*order_keys)(const void* k, int64_t stride, int64_t count, int64_t dim, void* out);
  void (*order_values)(const void* v, int64_t stride, int64_t count, int64_t dim, void* out);
  void (*attend)(const QueryGroup& group, const KeyBlock& block);
  void (*put)(const QueryGroup& group, int64_t count, void* out, int64_t stride);  // what `count` of them got
  void (*begin)() = nullptr;  // what a thread does before and behind its work; or null
  void (*end)() = nullptr;
};

// What this machine has for a dtype with the instruction set in use, or null.
const Attention* attention(DType dtype);

}  // namespace llama_mm
