// fp16 as storage: conversions, and the few operations that kernels do in it.
#pragma once

#include "cuda_runtime.h"

struct __half {
    uint16_t bits;
};
struct alignas(4) __half2 {
    __half x, y;
};
using half = __half;
using half2 = __half2;

inline float __half2float(__half h) {
    unsigned sign = (h.bits & 0x8000u) << 16, magnitude = (h.bits & 0x7fffu) << 13;
    if (magnitude >= 0x7c00u << 13) return __uint_as_float(sign | 0x7f800000u | (magnitude & 0x7fffffu));
    return __uint_as_float(sign | __float_as_uint(__uint_as_float(magnitude) * 0x1p112f));  // subnormals too
}
inline __half __float2half_rn(float x) {
    unsigned bits = __float_as_uint(x), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return {uint16_t(0x7fff)};
    if (magnitude >= 0x477ff000u) return {uint16_t(sign | 0x7c00u)};  // rounds past 65504
    if (magnitude < 0x38800000u)  // subnormal: a multiple of 2⁻²⁴, rounded by the addition
        return {uint16_t(sign | unsigned(__float_as_uint(__uint_as_float(magnitude) + 0.5f) - 0x3f000000u))};
    unsigned rounded = magnitude + 0xfffu + (magnitude >> 13 & 1);
    return {uint16_t(sign | ((rounded >> 13) - (112u << 10)))};
}
inline __half __float2half(float x) { return __float2half_rn(x); }
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
inline __half2 __float22half2_rn(float2 v) { return __floats2half2_rn(v.x, v.y); }
inline float2 __half22float2(__half2 v) { return {__half2float(v.x), __half2float(v.y)}; }
inline float __low2float(__half2 v) { return __half2float(v.x); }
inline float __high2float(__half2 v) { return __half2float(v.y); }
inline uint16_t __half_as_ushort(__half h) { return h.bits; }
inline __half __ushort_as_half(uint16_t bits) { return {bits}; }
