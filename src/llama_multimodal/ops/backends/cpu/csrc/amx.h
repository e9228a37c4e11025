// The matrix unit of Intel's processors (AMX): eight registers, each a tile of up to 16 rows of 64 bytes.
//
// Written as assembly, which takes no flag of the compiler's: GCC has one since version 11. The assembler is to know it,
// binutils since 2.36; setup.py asks.
#pragma once

#include <cstdint>
#include <cstring>

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

}  // namespace
