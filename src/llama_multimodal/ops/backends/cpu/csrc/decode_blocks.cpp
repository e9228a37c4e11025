// Whole self-attention blocks for one new token a row: what a step would spend between the products, in the interpreter
// and in small ops, is a third of a small model's time and more.
//
// Shapes: L decoder blocks · B rows · E hidden size · H query heads · Hkv key heads · D head dim · F feed-forward size
// C slots of a row · N cache blocks · S slots of a cache block · M cache blocks of a row, at most
#include <cstring>

#include "drivers.h"
#include "kernels.h"
#include "quantize_row.h"
#include "scalar.h"
#include "scratch.h"

using namespace llama_mm;

// A packed weight [outputs, inputs]; scales null: bf16.
struct Product {
  const void* values;
  const uint16_t* scales;
  const uint8_t* zeros;
  const void* bias;  // in x's dtype, or null
  int64_t inputs, outputs, group;
  int int4, to_8_bits;
};

struct Block {
  Product qkv, output, gate_up, down;
  const void *input_norm, *post_attention_norm;  // [E] in x's dtype
};

// What all blocks have in common.
struct Model {
  float eps;
  DType type;
  int64_t heads, kv_heads, dim;
};

constexpr int kPointers = 4 * 4 + 2, kNumbers = 4 * 5;  // of a block, as the callers pass them

static Product product_of(const void* const* pointers, const int64_t* numbers) {
  return {pointers[0],
          static_cast<const uint16_t*>(pointers[1]),
          static_cast<const uint8_t*>(pointers[2]),
          pointers[3],
          numbers[0],
          numbers[1],
          numbers[2],
          static_cast<int>(numbers[3]),
          static_cast<int>(numbers[4])};
}

static Block block_of(const void* const* pointers, const int64_t* numbers) {
  return {product_of(pointers, numbers),          product_of(pointers + 4, numbers + 5),
          product_of(pointers + 8, numbers + 10), product_of(pointers + 12, numbers + 15),
          pointers[16],                           pointers[17]};
}

static int multiply(const Product& p, const void* x, int dtype, int rows, void* out, int threads) {
  if (!p.scales)
    return llama_mm_cpu_bf16_linear(x, dtype, rows, p.inputs, static_cast<const uint16_t*>(p.values), p.bias, dtype,
                                    p.outputs, out, threads);
  return llama_mm_cpu_packed_linear(x, dtype, p.to_8_bits, rows, p.inputs, static_cast<const uint8_t*>(p.values),
                                    p.scales, p.zeros, p.int4, p.group, p.bias, dtype, p.outputs, out, threads);
}

// Where rows keep a block's keys and values: [B, Hkv, C, D]; with a table [B, M] in blocks, [N, S, Hkv, D].
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
static int64_t place(const Caches& c, const int64_t* strides, int64_t row, int64_t head, int64_t slot) {
  if (!c.table) return row * strides[0] + head * strides[1] + slot * strides[2];
  const int64_t block = c.table[row * c.blocks_of_row + slot / c.capacity];
  return block * strides[0] + slot % c.capacity * strides[1] + head * strides[2];
}

// A row's new key or value of one head; from: those of all heads.
static void store(const Caches& c, void* cache, const int64_t* strides, float* scales, int64_t row, int64_t head,
                  int64_t slot, const char* from, const Model& m) {
  const int64_t at = place(c, strides, row, head, slot), bytes = bytes_of(m.type);
  if (scales)
    quantize_row(from, m.type, head * m.dim, m.dim, c.dtype, static_cast<uint8_t*>(cache) + at, scales + at / m.dim);
  else
    memcpy(static_cast<char*>(cache) + at * bytes, from + head * m.dim * bytes, static_cast<size_t>(m.dim * bytes));
}

// What lies between the products of a block, for all rows.
struct Room {
  Scratch normed, wide, narrow, product, sum;

  Room(int64_t row, int64_t widest, int64_t narrowest)
      : normed(row), wide(widest), narrow(narrowest), product(row), sum(row) {}
  bool failed() const {
    return !normed.memory || !wide.memory || !narrow.memory || !product.memory || !sum.memory;
  }
};

// x and out may be the same.
static int run_block(const Model& m, const Block& b, const Caches& c, const char* x, int rows, const float* cos,
                     const float* sin, const int32_t* lengths, Room& room, char* out, int threads) {
  const DType type = m.type;
  const Elementwise& use = kernels()->elementwise[type];
  const int64_t bytes = bytes_of(type), hidden = b.qkv.inputs, inner = b.down.inputs;
  const int64_t head = m.dim * bytes, q_row = m.heads * head, kv_row = m.kv_heads * head;
  const int64_t row_bytes = hidden * bytes, qkv_row = q_row + 2 * kv_row, gates = 2 * inner * bytes;
  char *normed = room.normed.memory, *wide = room.wide.memory, *narrow = room.narrow.memory;
  char *product = room.product.memory, *sum = room.sum.memory;

  for_rows(rows, row_bytes, threads,
           [&](int64_t t) { use.norm(x + t * row_bytes, b.input_norm, hidden, m.eps, normed + t * row_bytes); });
  if (multiply(b.qkv, normed, type, rows, wide, threads)) return -1;
  for_rows(rows, qkv_row, threads, [&](int64_t t) {
    char* q = wide + t * qkv_row;
    const float *cs = cos + t * m.dim / 2, *sn = sin + t * m.dim / 2;
    for (int64_t h = 0; h < m.heads + m.kv_heads; h++) use.rotate(q + h * head, cs, sn, m.dim / 2);
    memcpy(narrow + t * q_row, q, static_cast<size_t>(q_row));
    for (int64_t h = 0; h < m.kv_heads; h++) {
      store(c, c.k, c.k_strides, c.k_scales, t, h, lengths[t] - 1, q + q_row, m);
      store(c, c.v, c.v_strides, c.v_scales, t, h, lengths[t] - 1, q + q_row + kv_row, m);
    }
  });
  // The attention's result takes the place of the queries, keys and values.
  if (c.table ? llama_mm_cpu_paged_decode_attention(narrow, type, rows, m.heads, m.kv_heads, m.dim, c.k, c.k_strides,
                                                    c.v, c.v_strides, c.dtype, c.k_scales, c.v_scales, c.blocks,
                                                    c.capacity, c.table, c.blocks_of_row, lengths, wide, threads)
              : llama_mm_cpu_decode_attention(narrow, type, rows, m.heads, m.kv_heads, m.dim, c.k, c.k_strides, c.v,
                                              c.v_strides, c.capacity, lengths, nullptr, wide, threads))
    return -1;
  if (multiply(b.output, wide, type, rows, product, threads)) return -1;
  for_rows(rows, 2 * row_bytes, threads, [&](int64_t t) {
    char* stream = sum + t * row_bytes;
    use.add(x + t * row_bytes, product + t * row_bytes, hidden, stream);
    use.norm(stream, b.post_attention_norm, hidden, m.eps, normed + t * row_bytes);
  });
  if (multiply(b.gate_up, normed, type, rows, wide, threads)) return -1;
  for_rows(rows, gates, threads, [&](int64_t t) {
    use.swiglu(wide + t * gates, wide + t * gates + gates / 2, inner, narrow + t * inner * bytes);
  });
  if (multiply(b.down, narrow, type, rows, product, threads)) return -1;
  for_rows(rows, row_bytes, threads,
           [&](int64_t t) { use.add(sum + t * row_bytes, product + t * row_bytes, hidden, out + t * row_bytes); });
  return 0;
}

// caches: of the first block; k, v and their scales: of each.
static int run_blocks(const Model& model, const void* const* pointers, const int64_t* numbers, int count,
                      const void* x, int rows, const float* cos, const float* sin, Caches caches, void* const* k,
                      void* const* v, float* const* k_scales, float* const* v_scales, const int32_t* lengths,
                      void* out, int threads) {
  for (int row = 0; row < rows; row++)
    if (out_of_range(caches, row, lengths[row])) return row + 1;
  int64_t inner = 0;
  for (int i = 0; i < count; i++) inner = most(inner, numbers[i * kNumbers + 15]);  // the inputs of `down`
  const int64_t bytes = rows * bytes_of(model.type), queries = model.heads * model.dim;
  const int64_t joined = queries + 2 * model.kv_heads * model.dim;
  Room room(bytes * numbers[0], bytes * most(2 * inner, joined), bytes * most(queries, inner));
  if (room.failed()) return -1;
  const char* from = static_cast<const char*>(x);
  for (int i = 0; i < count; i++) {
    caches.k = k[i], caches.v = v[i];
    if (k_scales) caches.k_scales = k_scales[i], caches.v_scales = v_scales[i];
    const Block block = block_of(pointers + i * kPointers, numbers + i * kNumbers);
    if (run_block(model, block, caches, from, rows, cos, sin, lengths, room, static_cast<char*>(out), threads))
      return -1;
    from = static_cast<const char*>(out);
  }
  return 0;
}

extern "C" {

// pointers: [L, 18], of each block the values, scales, zeros and bias of its four products (qkv, output, gate_up, down)
// and its norms; numbers: [L, 4, 5], of each product inputs, outputs, group, if int4, if with activations in 8 bits.
// x, out: [B, E]; cos, sin: [B, D/2]; k, v: one of the caches a block, in x's dtype, all with the same strides, to which
// the new token's key and value are added at lengths[b] - 1. Returns 0, -1 without memory, or 1 + the first row whose
// length (or block) is out of range; before anything is written.
int llama_mm_cpu_decode_blocks(const void* const* pointers, const int64_t* numbers, int count, float eps, int dtype,
                               int64_t heads, int64_t kv_heads, int64_t dim, const void* x, int rows,
                               const float* cos, const float* sin, void* const* k, const int64_t* k_strides,
                               void* const* v, const int64_t* v_strides, int64_t capacity, const int32_t* lengths,
                               void* out, int threads) {
  const Model model = {eps, static_cast<DType>(dtype), heads, kv_heads, dim};
  const Caches caches = {nullptr, k_strides, nullptr, v_strides, nullptr, capacity, 0, 0, model.type, nullptr, nullptr};
  return run_blocks(model, pointers, numbers, count, x, rows, cos, sin, caches, k, v, nullptr, nullptr, lengths, out,
                    threads);
}

int llama_mm_cpu_paged_decode_blocks(const void* const* pointers, const int64_t* numbers, int count, float eps,
                                     int dtype, int64_t heads, int64_t kv_heads, int64_t dim, const void* x, int rows,
                                     const float* cos, const float* sin, void* const* k, const int64_t* k_strides,
                                     void* const* v, const int64_t* v_strides, int cache_dtype,
                                     float* const* k_scales, float* const* v_scales, int64_t blocks, int64_t slots,
                                     const int32_t* table, int64_t blocks_of_row, const int32_t* lengths, void* out,
                                     int threads) {
  const Model model = {eps, static_cast<DType>(dtype), heads, kv_heads, dim};
  const Caches caches = {nullptr, k_strides, nullptr, v_strides, table, slots, blocks, blocks_of_row,
                         static_cast<DType>(cache_dtype), nullptr, nullptr};
  return run_blocks(model, pointers, numbers, count, x, rows, cos, sin, caches, k, v, k_scales, v_scales, lengths, out,
                    threads);
}

}  // extern "C"
