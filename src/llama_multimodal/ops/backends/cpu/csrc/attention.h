// Attention of many queries: what an instruction set provides, and what the driver (attention.cpp) hands it.
//
// Shapes: D head dim, Dp rounded up to 16
#pragma once

#include <cstdint>

namespace llama_mm {

constexpr int kQueries = 6;  // queries whose sums lie in registers together
constexpr int kTile = 64;    // keys whose scores are summed in registers with them; memory goes on to a multiple
constexpr int kKeys = 256;   // keys that they look at together
constexpr float kHidden = -1e30f;  // a score below this weighs nothing; far from -inf, whose differences are NaN

inline int64_t padded_dim(int64_t dim) { return (dim + 15) / 16 * 16; }

// kQueries queries of one head, and their softmax over the keys seen so far, in powers of two: out = acc / sum.
struct QueryGroup {
  const uint16_t* q;  // [kQueries, Dp], zeros past D
  float* acc;         // [kQueries, Dp]
  float* max;         // [kQueries]
  float* sum;         // [kQueries]
  int64_t dim;
  float scale;  // log2(e) / √D
};

// Up to kKeys keys and their values, in order; memory and bias go on to a multiple of kTile.
struct KeyBlock {
  const uint16_t* keys;    // [keys/16, Dp/2, 16, 2]
  const uint16_t* values;  // [keys/2, Dp, 2]
  const float* bias;       // [keys], in powers of two, finite; twice kHidden for keys that are not there
  int count;
  int causal_from;  // the last key here that the first query sees, the next query one more; kKeys or more: all
};

struct Attention {
  void (*order_keys)(const uint16_t* k, int64_t stride, int64_t count, int64_t dim, uint16_t* out);    // 16 of them
  void (*order_values)(const uint16_t* v, int64_t stride, int64_t count, int64_t dim, uint16_t* out);  // 2 of them
  void (*attend)(const QueryGroup& group, const KeyBlock& block);
};

// What this machine has for bf16 with the instruction set in use, or null.
const Attention* attention();

}  // namespace llama_mm
