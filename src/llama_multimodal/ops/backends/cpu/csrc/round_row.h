// Rows of x as whole numbers, in blocks of 32: x ≈ step · q.
//
// bf16 (8 significant bits): the step is a power of two and |q| < 2^14, so a value down to 1/64 of its block's largest
// is kept exactly. fp32: |q| <= 8290687, 23 bits below the block's largest. To 8 bits: |q| <= 127.
// q is written in digits, base 255, each from -127 to 127, where the instructions multiply bytes; where they multiply
// 16-bit numbers, the upper two digits are one. Every instruction set therefore multiplies the same q.
//
// A row with inf or NaN in a block gives NaN. A block whose largest value is below 1e-30 counts as zeros.
#pragma once

#include "kernels.h"
#include "vec.h"

namespace {

constexpr int kLargest[3] = {127 * (255 * 255 + 255 + 1), (1 << 14) - 1, 127};  // of q, by rounding

INLINE Ints load_ints(const int32_t* from) {
  Ints x;
  memcpy(&x, from, sizeof(x));
  return x;
}

// to = 255 · quotient + rest, the rest from -127 to 127.
INLINE void split(const int32_t* from, int32_t* quotients, int32_t* rests) {
  for (int i = 0; i < llama_mm::kBlock; i += LANES) {
    Ints q = load_ints(from + i);
    Floats near = __builtin_convertvector(q, Floats) * (1.0f / 255.0f);
    near = near + (near < 0.0f ? splat(-0.5f) : splat(0.5f));
    Ints quotient = __builtin_convertvector(near, Ints);
    Ints rest = q - quotient * 255;
    Ints carry = (rest < -127) - (rest > 127);  // -1 and 1: fp32 may have rounded to the neighbour
    quotient += carry;
    rest -= carry * 255;
    memcpy(quotients + i, &quotient, sizeof(quotient));
    memcpy(rests + i, &rest, sizeof(rest));
  }
}

// Digit: int8_t, in order; or int16_t, each four as 0 2 1 3, the pairs that one multiply-add sums.
template <typename Digit>
void round_row(const float* x, int64_t blocks, llama_mm::Rounding rounding, int middle, int rows,
               llama_mm::RoundedX to) {
  constexpr int kBlock = llama_mm::kBlock;
  constexpr bool bytes = sizeof(Digit) == 1;
  const int count = 3 - rounding - (bytes || rounding == llama_mm::kTo8Bits ? 0 : 1);
  Digit* out = static_cast<Digit*>(to.digits);
  llama_mm::BlockOfX* head = to.blocks;
  for (int64_t block = 0; block < blocks; block++, x += kBlock, out += rows * count * kBlock, head += rows) {
    Words most = {};  // magnitudes compare as whole numbers, inf and NaN above all others
    for (int i = 0; i < kBlock; i += LANES) {
      Words magnitude = bits<Words>(load(x + i)) & 0x7fffffffu;
      most = magnitude > most ? magnitude : most;
    }
    uint32_t lanes[LANES], top = 0;
    memcpy(lanes, &most, sizeof(most));
    for (uint32_t lane : lanes) top = lane > top ? lane : top;
    const bool finite = top < 0x7f800000u, zeros = bits<float>(top) < 1e-30f;
    float step = bits<float>(top) / kLargest[rounding];
    if (rounding == llama_mm::kForBFloat16) step = bits<float>((top & 0x7f800000u) - (13u << 23));
    const float inverse = finite && !zeros ? 1.0f / step : 0.0f;

    int32_t q[3][kBlock];
    for (int i = 0; i < kBlock; i += LANES) {
      Floats scaled = finite ? load(x + i) * inverse : Floats{};
      scaled = scaled + (scaled < 0.0f ? splat(-0.5f) : splat(0.5f));
      Ints whole = __builtin_convertvector(scaled, Ints);
      const Ints limit = Ints{} + kLargest[rounding];  // x · inverse may round past the end
      whole = whole > limit ? limit : whole < -limit ? -limit : whole;
      memcpy(q[0] + i, &whole, sizeof(whole));
    }
    if (count > 1) split(q[0], q[0], q[1]);
    if (count > 2) {
      memcpy(q[2], q[1], sizeof(q[1]));
      split(q[0], q[0], q[1]);
    }

    head->step = zeros ? 0.0f : finite ? step : bits<float>(0x7fc00000u);
    for (int digit = 0; digit < count; digit++) {
      int32_t total = 0;
      for (int i = 0; i < kBlock; i++) total += q[digit][i];
      head->start[digit] = -middle * total;
      head->total[digit] = static_cast<float>(total);
      for (int i = 0; i < kBlock; i++) {
        const int from = bytes ? i : (i & ~3) + (i & 1) * 2 + (i >> 1 & 1);
        out[digit * kBlock + i] = static_cast<Digit>(q[digit][from]);
      }
    }
  }
}

}  // namespace
