// The matrix unit of Intel's processors (AMX): eight registers, each a tile of up to 16 rows of 64 bytes.
//
// Written as assembly, which takes no flag of the compiler's: GCC has one since version 11. The assembler is to know it,
// binutils since 2.36; setup.py asks.
#pragma once

#include <cstdint>
#include <cstring>

#include "vec.h"

// c [16, 16] fp32 += a [16, 32] bf16 times b [16 pairs, 16, 2] bf16. Registers are numbers, 0 to 7.
#define AMX_DOT_BF16(c, a, b) asm volatile("tdpbf16ps %%tmm" #b ", %%tmm" #a ", %%tmm" #c ::)
#define AMX_ZERO(c) asm volatile("tilezero %%tmm" #c ::)
// 16 rows of 64 bytes, `stride` bytes apart.
#define AMX_LOAD(c, from, stride) \
  asm volatile("tileloadd (%0,%1,1), %%tmm" #c ::"r"(static_cast<const void*>(from)), "r"(int64_t{stride}) : "memory")
#define AMX_STORE(c, to, stride) \
  asm volatile("tilestored %%tmm" #c ", (%0,%1,1)" ::"r"(static_cast<void*>(to)), "r"(int64_t{stride}) : "memory")

namespace {

// Every register holds a whole tile from now on; before a thread's first tile, and after others may have used them. What
// shape they had is lost: torch sets its own anew each time.
inline void amx_begin() {
  struct alignas(64) {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  } shape;
  memset(&shape, 0, sizeof(shape));
  shape.palette = 1;
  for (int i = 0; i < 8; i++) shape.row_bytes[i] = 64, shape.rows[i] = 16;
  asm volatile("ldtilecfg %0" ::"m"(shape) : "memory");
}

// The registers count as empty again, so that nobody saves them.
inline void amx_end() { asm volatile("tilerelease" ::: "memory"); }

// Registers 0 to 3 are sums of two by two tiles, `right` and `below` of the first: fp32, `stride` bytes between rows.
INLINE void amx_zero_sums() {
  AMX_ZERO(0);
  AMX_ZERO(1);
  AMX_ZERO(2);
  AMX_ZERO(3);
}
INLINE void amx_load_sums(const float* sums, int64_t stride, bool right, bool below) {
  const char* const second = reinterpret_cast<const char*>(sums) + 16 * stride;
  AMX_LOAD(0, sums, stride);
  if (right) AMX_LOAD(1, sums + 16, stride);
  if (below) AMX_LOAD(2, second, stride);
  if (right && below) AMX_LOAD(3, second + 64, stride);
}
INLINE void amx_store_sums(float* sums, int64_t stride, bool right, bool below) {
  char* const second = reinterpret_cast<char*>(sums) + 16 * stride;
  AMX_STORE(0, sums, stride);
  if (right) AMX_STORE(1, sums + 16, stride);
  if (below) AMX_STORE(2, second, stride);
  if (right && below) AMX_STORE(3, second + 64, stride);
}
// The sums += a tile of rows, and one below, times a tile of pairs, and one to the right.
INLINE void amx_add_products(const void* a, const void* a_below, int64_t a_stride, const void* b,
                                 const void* b_right, int64_t b_stride, bool right, bool below) {
  AMX_LOAD(6, b, b_stride);
  AMX_LOAD(4, a, a_stride);
  AMX_DOT_BF16(0, 4, 6);
  if (right) {
    AMX_LOAD(7, b_right, b_stride);
    AMX_DOT_BF16(1, 4, 7);
  }
  if (below) {
    AMX_LOAD(5, a_below, a_stride);
    AMX_DOT_BF16(2, 5, 6);
    if (right) AMX_DOT_BF16(3, 5, 7);
  }
}

}  // namespace
