// A whole self-attention block for one new token a row: what a step would spend between the products, in the
// interpreter and in waking threads, is a third of a small model's time.
//
// Shapes: B rows · E hidden size · H query heads · Hkv key heads · D head dim · F feed-forward size · C slots of a row
// N blocks · S slots of a block · M blocks of a row, at most
#include <cstring>

#include "drivers.h"
#include "kernels.h"
#include "quantize_row.h"
#include "scalar.h"
#include "scratch.h"

using namespace llama_mm;

extern "C" {

// A packed weight [outputs, inputs] as an argument; scales null: bf16.
struct LlamaMmProduct {
  const void* values;
  const uint16_t* scales;
  const uint8_t* zeros;
  const void* bias;  // in x's dtype, or null
  int64_t inputs, outputs, group;
  int int4, to_8_bits;
};

struct LlamaMmBlock {
  LlamaMmProduct qkv, output, gate_up, down;
  const void *input_norm, *post_attention_norm;  // [E] in x's dtype
  float eps;
  int dtype;
  int64_t heads, kv_heads, dim;
};

static int multiply(const LlamaMmProduct& p, const void* x, int dtype, int rows, void* out, int threads) {
  if (!p.scales)
    return llama_mm_cpu_bf16_linear(x, dtype, rows, p.inputs, static_cast<const uint16_t*>(p.values), p.bias, dtype,
                                    p.outputs, out, threads);
  return llama_mm_cpu_packed_linear(x, dtype, p.to_8_bits, rows, p.inputs, static_cast<const uint8_t*>(p.values),
                                    p.scales, p.zeros, p.int4, p.group, p.bias, dtype, p.outputs, out, threads);
}

// Where rows keep their keys and values: [B, Hkv, C, D]; with a table [B, M] in blocks, [N, S, Hkv, D].
struct Caches {
  void* k;
  const int64_t* k_strides;
  void* v;
  const int64_t* v_strides;
  const int32_t* table;                      // null: dense
  int64_t capacity, blocks, blocks_of_row;   // C, 0, 0; or S, N, M
  DType dtype;
  float *k_scales, *v_scales;  // in 8 bits, [N, S, Hkv], and the caches contiguous; or null
};

static bool out_of_range(const Caches& c, int row, int32_t length) {
  if (!c.table) return length < 1 || length > c.capacity;
  if (length < 1 || length > c.blocks_of_row * c.capacity) return true;
  for (int64_t i = 0; i * c.capacity < length; i++) {
    const int32_t block = c.table[row * c.blocks_of_row + i];
    if (block < 0 || block >= c.blocks) return true;
  }
  return false;
}

// Elements before a row's token at `slot`, for one key head.
static int64_t place(const Caches& c, const int64_t* strides, int row, int64_t head, int64_t slot) {
  if (!c.table) return row * strides[0] + head * strides[1] + slot * strides[2];
  const int64_t block = c.table[row * c.blocks_of_row + slot / c.capacity];
  return block * strides[0] + slot % c.capacity * strides[1] + head * strides[2];
}

// A row's new key or value of one head; from: those of all heads.
static void store(const Caches& c, void* cache, const int64_t* strides, float* scales, int row, int64_t head,
                  int64_t slot, const char* from, const LlamaMmBlock& b, DType type) {
  const int64_t at = place(c, strides, row, head, slot), bytes = bytes_of(type);
  if (scales)
    quantize_row(from, type, head * b.dim, b.dim, c.dtype, static_cast<uint8_t*>(cache) + at, scales + at / b.dim);
  else
    memcpy(static_cast<char*>(cache) + at * bytes, from + head * b.dim * bytes, static_cast<size_t>(b.dim * bytes));
}

static int run_block(const LlamaMmBlock* block, const void* x, int rows, const float* cos, const float* sin,
                     const Caches& caches, const int32_t* lengths, void* out, int threads) {
  for (int row = 0; row < rows; row++)
    if (out_of_range(caches, row, lengths[row])) return row + 1;
  const LlamaMmBlock& b = *block;
  const DType type = static_cast<DType>(b.dtype);
  const Elementwise& use = kernels()->elementwise[type];
  const int64_t bytes = bytes_of(type), hidden = b.qkv.inputs, inner = b.down.inputs;
  const int64_t head = b.dim * bytes, q_row = b.heads * head, kv_row = b.kv_heads * head;
  const int64_t row_bytes = hidden * bytes, qkv_row = q_row + 2 * kv_row, gates = 2 * inner * bytes;
  const int64_t widest = most(gates, qkv_row);
  Scratch normed(rows * row_bytes), wide(rows * widest), narrow(rows * most(q_row, inner * bytes));
  Scratch product(rows * row_bytes), sum(rows * row_bytes);
  if (!normed.memory || !wide.memory || !narrow.memory || !product.memory || !sum.memory) return -1;
  const char* from = static_cast<const char*>(x);

  for (int t = 0; t < rows; t++)
    use.norm(from + t * row_bytes, b.input_norm, hidden, b.eps, normed.memory + t * row_bytes);
  if (multiply(b.qkv, normed.memory, type, rows, wide.memory, threads)) return -1;
  for (int t = 0; t < rows; t++) {
    char* q = wide.memory + t * qkv_row;
    const float *c = cos + t * b.dim / 2, *s = sin + t * b.dim / 2;
    for (int64_t h = 0; h < b.heads + b.kv_heads; h++) use.rotate(q + h * head, c, s, b.dim / 2);
    memcpy(narrow.memory + t * q_row, q, static_cast<size_t>(q_row));
    for (int64_t h = 0; h < b.kv_heads; h++) {
      store(caches, caches.k, caches.k_strides, caches.k_scales, t, h, lengths[t] - 1, q + q_row, b, type);
      store(caches, caches.v, caches.v_strides, caches.v_scales, t, h, lengths[t] - 1, q + q_row + kv_row, b, type);
    }
  }
  // The attention's result takes the place of the queries, keys and values.
  const Caches& c = caches;
  if (c.table ? llama_mm_cpu_paged_decode_attention(narrow.memory, type, rows, b.heads, b.kv_heads, b.dim, c.k,
                                                    c.k_strides, c.v, c.v_strides, c.dtype, c.k_scales, c.v_scales,
                                                    c.blocks, c.capacity, c.table, c.blocks_of_row, lengths,
                                                    wide.memory, threads)
              : llama_mm_cpu_decode_attention(narrow.memory, type, rows, b.heads, b.kv_heads, b.dim, c.k, c.k_strides,
                                              c.v, c.v_strides, c.capacity, lengths, nullptr, wide.memory, threads))
    return -1;
  if (multiply(b.output, wide.memory, type, rows, product.memory, threads)) return -1;
  for (int t = 0; t < rows; t++) {
    char* stream = sum.memory + t * row_bytes;
    use.add(from + t * row_bytes, product.memory + t * row_bytes, hidden, stream);
    use.norm(stream, b.post_attention_norm, hidden, b.eps, normed.memory + t * row_bytes);
  }
  if (multiply(b.gate_up, normed.memory, type, rows, wide.memory, threads)) return -1;
  for (int t = 0; t < rows; t++)
    use.swiglu(wide.memory + t * gates, wide.memory + t * gates + gates / 2, inner,
               narrow.memory + t * inner * bytes);
  if (multiply(b.down, narrow.memory, type, rows, product.memory, threads)) return -1;
  for (int t = 0; t < rows; t++)
    use.add(sum.memory + t * row_bytes, product.memory + t * row_bytes, hidden,
            static_cast<char*>(out) + t * row_bytes);
  return 0;
}

// x, out: [B, E]; cos, sin: [B, D/2]; caches in x's dtype, to which the new token's key and value are added at
// lengths[b] - 1. Returns 0, -1 without memory, or 1 + the first row whose length (or block) is out of range; nothing is
// written then.
int llama_mm_cpu_decode_block(const LlamaMmBlock* block, const void* x, int rows, const float* cos, const float* sin,
                              void* k_cache, const int64_t* k_strides, void* v_cache, const int64_t* v_strides,
                              int64_t capacity, const int32_t* lengths, void* out, int threads) {
  const Caches caches = {k_cache, k_strides, v_cache, v_strides, nullptr, capacity, 0, 0,
                         static_cast<DType>(block->dtype), nullptr, nullptr};
  return run_block(block, x, rows, cos, sin, caches, lengths, out, threads);
}

int llama_mm_cpu_paged_decode_block(const LlamaMmBlock* block, const void* x, int rows, const float* cos,
                                    const float* sin, void* k_cache, const int64_t* k_strides, void* v_cache,
                                    const int64_t* v_strides, int cache_dtype, float* k_scales, float* v_scales,
                                    int64_t blocks, int64_t slots, const int32_t* table, int64_t blocks_of_row,
                                    const int32_t* lengths, void* out, int threads) {
  const Caches caches = {k_cache, k_strides, v_cache, v_strides, table, slots, blocks, blocks_of_row,
                         static_cast<DType>(cache_dtype), k_scales, v_scales};
  return run_block(block, x, rows, cos, sin, caches, lengths, out, threads);
}

}  // extern "C"
