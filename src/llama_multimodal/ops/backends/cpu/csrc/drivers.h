// The drivers that others call in C; what they take is said where they are defined.
#pragma once

#include <cstdint>

extern "C" {

int llama_mm_cpu_packed_linear(const void* x, int dtype, int to_8_bits, int rows, int64_t inputs,
                               const uint8_t* values, const uint16_t* scales, const uint8_t* zeros, int int4,
                               int64_t group, const void* bias, int bias_dtype, int64_t outputs, void* out,
                               int threads);
int llama_mm_cpu_wide_linear(const uint16_t* x, int64_t rows, int64_t inputs, const uint16_t* weight, const void* bias,
                             int bias_dtype, int64_t outputs, uint16_t* out, int threads);
int llama_mm_cpu_bf16_linear(const void* x, int dtype, int rows, int64_t inputs,
                             const uint16_t* weight, const void* bias, int bias_dtype, int64_t outputs, void* out,
                             int threads);
int llama_mm_cpu_decode_attention(const void* q, int dtype, int64_t rows, int64_t heads, int64_t kv_heads, int64_t dim,
                                  const void* k, const int64_t* k_strides, const void* v, const int64_t* v_strides,
                                  int64_t capacity, const int32_t* lengths, const float* key_bias, void* out,
                                  int threads);
int llama_mm_cpu_paged_decode_attention(const void* q, int dtype, int64_t rows, int64_t heads, int64_t kv_heads,
                                        int64_t dim, const void* k, const int64_t* k_strides, const void* v,
                                        const int64_t* v_strides, int cache_dtype, const float* k_scales,
                                        const float* v_scales, int64_t blocks, int64_t slots, const int32_t* table,
                                        int64_t blocks_of_row, const int32_t* lengths, void* out, int threads);
}
