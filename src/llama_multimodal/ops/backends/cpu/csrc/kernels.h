// What each instruction set provides, and what the drivers hand it.
//
// One source file an instruction set fills a `Kernels` table; the drivers (packed_linear.cpp, decode_attention.cpp) are
// compiled without special instructions and call through the table that `kernels()` chose for this machine.
//
// Shapes: N outputs · K inputs · G values of a group · T rows of x · D head dim
#pragma once

#include <cstdint>

namespace llama_mm {

enum DType : int { kFloat32 = 0, kBFloat16 = 1, kInt8 = 2, kFp8 = 3 };  // the last two of caches only

// How finely x is rounded for a product of whole numbers (see round_row.h), by its dtype, or to 8 bits where asked for.
enum Rounding : int { kForFloat32 = kFloat32, kForBFloat16 = kBFloat16, kTo8Bits = 2 };

constexpr int kTileRows = 16;     // weight rows that lie interleaved
constexpr int kBlock = 32;        // inputs that share one step of x
constexpr int kMaxRows = 8;       // rows of x in one pass over a tile, whatever the instruction set
constexpr int kMaxTileRows = 16;  // the most that one takes at once where it takes more
constexpr int kMaxDotRows = 8;    // rows of x in one pass over a bf16 weight, whatever the instruction set
constexpr int kOutputs = 12;      // outputs of a bf16 weight at a time
constexpr int kMaxHeads = 4;      // query heads that share one pass over a key head's keys and values
constexpr int kKeysAtOnce = 64;   // between two corrections of the running maximum

// x of one row and 32 inputs: x ≈ step · q, and q is split into digits (see round_row.h).
struct BlockOfX {
  float step;
  int32_t start[3];  // a digit: the sum over q, times minus the zero of a symmetric weight; else 0
  float total[3];    // a digit: the sum over q, for weights with zeros of their own
  int32_t unused;
};

// The rows that go over a tile together, block by block: as they are read.
struct RoundedX {
  BlockOfX* blocks;  // [K/32, rows]
  void* digits;      // [K/32, rows, digits, 32], int8 or int16 as the instruction set likes it
};

// An int8 or int4 weight in tiles of 16 rows; values are unsigned (int8 with 128 added).
struct PackedWeight {
  const uint8_t* values;   // int8 [N/16, K/4, 16, 4] · int4 [N/16, K/8, 16, 4]: inputs 0-3 low in a byte, 4-7 high
  const uint16_t* scales;  // fp16 [N/16, K/G, 16]
  const uint8_t* zeros;    // [N/16, K/G, 16], or null: 128 for int8, 8 for int4
  int64_t blocks;          // K/32
  int64_t blocks_per_group;
  bool int4;
};

// Some keys and their values, wherever each of them lies: of one key head, or of the first of several.
struct Keys {
  int count;
  const void* k[kKeysAtOnce];
  const void* v[kKeysAtOnce];
  const float* k_scales[kKeysAtOnce];  // of caches in 8 bits
  const float* v_scales[kKeysAtOnce];
  const float* bias;  // [count], in powers of two; or null
};

// Keys or values that are asked for while others are computed: one after the other, `size` bytes with each of those.
struct Ahead {
  const void* const* next;
  int count;
  int64_t size, bytes;  // bytes: of a key, as much as there is to ask for
  int64_t at = 0;
};

// Softmax over the keys seen so far, in powers of two: out = acc / sum.
struct Softmax {
  float* q;    // [heads, D], times log2(e) / √D
  float* acc;  // [heads, D]
  float* max;  // [heads]
  float* sum;  // [heads]
  int heads;
  int64_t dim;
};

// From a key or value, and its scale, to that of this head, in bytes.
struct Offsets {
  int64_t k, v, scale;
};

// On rows of one dtype.
struct Elementwise {
  void (*add)(const void* a, const void* b, int64_t size, void* out);
  void (*norm)(const void* x, const void* weight, int64_t size, float eps, void* out);  // out may be x
  void (*swiglu)(const void* gate, const void* up, int64_t size, void* out);
  void (*rotate)(void* head, const float* cos, const float* sin, int64_t half);
};

// sums [rows, 16] of 1 to 8 or `Kernels::most_rows` rows of x against one tile's outputs.
typedef void (*DotTile)(const PackedWeight& weight, int64_t tile, const RoundedX& x, int rows, Rounding rounding,
                        float* sums);

struct Kernels {
  const char* name;
  int most_rows;  // that dot_tile takes at once, if more than 8
  // How many bytes the digits of one value of x take, by its rounding.
  int digit_bytes[3];
  // x [K] as fp32 → digits and block heads of one of `rows` rows; `middle`: the zero of a symmetric weight.
  void (*round_row)(const float* x, int64_t blocks, Rounding rounding, int middle, int rows, RoundedX to);
  DotTile dot_tile;
  // Two neighbouring tiles and x in 8 bits: sums [2, pair_rows, 16] of that many rows, which share what is loaded; or
  // null.
  void (*dot_pair)(const PackedWeight& weight, int64_t tile, const RoundedX& x, float* sums);
  int pair_rows;
  // One tile back to values, row after row: out [16, K] fp32 or bf16.
  void (*unpack_tile)(const PackedWeight& weight, int64_t tile, DType dtype, void* out);
  // x [K] → the order that dot_bf16 reads.
  void (*order_row)(const float* x, int64_t inputs, float* out);
  int dot_rows;  // that dot_bf16 takes at once
  // sums [rows, kOutputs] of 1 to `dot_rows` ordered rows of x at x_stride against up to kOutputs outputs' bf16 weights
  // [K], in one of several passes over these.
  void (*dot_bf16)(const uint16_t* weight, int64_t inputs, int outputs, const float* x, int64_t x_stride, int rows,
                   int pass, int passes, float* sums);
  // The query heads that share a key head over some keys, on top of those before; by the dtype of the cache.
  void (*attend[4])(const Keys& keys, const Offsets& offsets, const Softmax& state, Ahead& k_ahead,
                    Ahead& v_ahead);
  Elementwise elementwise[2];  // by dtype
  bool matrix_unit = false;    // there is one besides, for products of many bf16 rows
};

// The table in use, or null where LLAMA_MM_CPU_ISA names what this machine does not have.
const Kernels* kernels();

}  // namespace llama_mm
