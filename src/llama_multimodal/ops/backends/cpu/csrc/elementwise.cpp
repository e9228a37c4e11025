// rms_norm, add_rms_norm, swiglu and apply_rope: rows of a tensor, shared out over threads.
//
// Shapes: B rows of tokens · T tokens · H heads · D head dim · P rows of a table of angles
#include <cstring>

#include "kernels.h"
#include "scalar.h"

using namespace llama_mm;

// Heads [B, H, T, D] with strides of the first three, and where their turned ones go: [B, T, H, D].
struct Heads {
  const char* from;
  const int64_t* strides;
  int64_t heads;
  char* to;

  void turn(const Elementwise& use, int64_t row, int64_t token, int64_t tokens, int64_t dim, int64_t size,
            const float* cos, const float* sin) const {
    for (int64_t head = 0; head < heads; head++) {
      char* const out = to + ((row * tokens + token) * heads + head) * dim * size;
      memcpy(out, from + (row * strides[0] + head * strides[1] + token * strides[2]) * size,
             static_cast<size_t>(dim * size));
      use.rotate(out, cos, sin, dim / 2);
    }
  }
};

extern "C" {

// x, residual [rows, size]: rms_norm of x, or with a residual of summed = x + residual, which is put there.
void llama_mm_cpu_rms_norm(const void* x, const void* residual, const void* weight, int dtype, int64_t rows,
                           int64_t size, float eps, void* out, void* summed, int threads) {
  const DType type = static_cast<DType>(dtype);
  const Elementwise& use = kernels()->elementwise[type];
  const int64_t bytes = size * bytes_of(type);
  for_rows(rows, bytes, threads, [&](int64_t row) {
    const char* from = static_cast<const char*>(x) + row * bytes;
    if (residual) {
      char* const sum = static_cast<char*>(summed) + row * bytes;
      use.add(from, static_cast<const char*>(residual) + row * bytes, size, sum);
      from = sum;
    }
    use.norm(from, weight, size, eps, static_cast<char*>(out) + row * bytes);
  });
}

// gate, up: [rows, size], strides in elements; out contiguous.
void llama_mm_cpu_swiglu(const void* gate, int64_t gate_stride, const void* up, int64_t up_stride, int dtype,
                         int64_t rows, int64_t size, void* out, int threads) {
  const DType type = static_cast<DType>(dtype);
  const Elementwise& use = kernels()->elementwise[type];
  const int64_t bytes = bytes_of(type);
  for_rows(rows, size * bytes, threads, [&](int64_t row) {
    use.swiglu(static_cast<const char*>(gate) + row * gate_stride * bytes,
               static_cast<const char*>(up) + row * up_stride * bytes, size,
               static_cast<char*>(out) + row * size * bytes);
  });
}

// cos, sin: rows of D/2, one for each token, `row_step` and `token_step` apart; or with positions [B, T] a table [P],
// `token_step` apart. Returns 0, or 1 where a position is outside of it; nothing is written then.
int llama_mm_cpu_apply_rope(const void* q, const int64_t* q_strides, int64_t heads, const void* k,
                            const int64_t* k_strides, int64_t kv_heads, const float* cos, const float* sin,
                            int64_t row_step, int64_t token_step, const int64_t* positions, int64_t table, int dtype,
                            int64_t rows, int64_t tokens, int64_t dim, void* q_out, void* k_out, int threads) {
  const DType type = static_cast<DType>(dtype);
  const Elementwise& use = kernels()->elementwise[type];
  const int64_t size = bytes_of(type), count = rows * tokens;
  for (int64_t i = 0; positions && i < count; i++)
    if (positions[i] < 0 || positions[i] >= table) return 1;
  const Heads queries = {static_cast<const char*>(q), q_strides, heads, static_cast<char*>(q_out)};
  const Heads keys = {static_cast<const char*>(k), k_strides, kv_heads, static_cast<char*>(k_out)};
  for_rows(count, (heads + kv_heads) * dim * size, threads, [&](int64_t i) {
    const int64_t row = i / tokens, token = i % tokens;
    const int64_t at = positions ? positions[i] * token_step : row * row_step + token * token_step;
    queries.turn(use, row, token, tokens, dim, size, cos + at, sin + at);
    keys.turn(use, row, token, tokens, dim, size, cos + at, sin + at);
  });
  return 0;
}

}  // extern "C"
