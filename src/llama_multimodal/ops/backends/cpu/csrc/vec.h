// Vectors of LANES floats in the compiler's vector types: one source for every instruction set.
//
// Everything here and in the headers using it lies in an unnamed namespace, and no template of the standard library is
// used: the files are compiled for different instruction sets, and what they share could come from the wrong one.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define INLINE inline __attribute__((always_inline))

namespace {

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef uint16_t Shorts __attribute__((vector_size(2 * LANES)));
typedef uint8_t Bytes __attribute__((vector_size(LANES)));
typedef int8_t SignedBytes __attribute__((vector_size(LANES)));

// Bytes of a weight that are asked for early: the next page, where the prefetchers stop.
constexpr int64_t kBytesAhead = 4096;

struct Fp8 {  // e4m3: 1 bit of sign, 4 of exponent, 3 of mantissa
  uint8_t byte;
};

template <typename To, typename From>
INLINE To bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "bits: sizes differ");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

INLINE Floats splat(float x) { return x - Floats{}; }  // of a sum with zero the addition would stay: -0 + 0 is not -0

INLINE Floats load(const float* from) {
  Floats x;
  memcpy(&x, from, sizeof(x));
  return x;
}

// The compilers' own conversions take several instructions where there is one.
#if defined(__AVX512F__)
INLINE Floats floats(SignedBytes x) {
  return bits<Floats>(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bits<__m128i>(x))));
}
INLINE Words words(Shorts x) { return bits<Words>(_mm512_cvtepu16_epi32(bits<__m256i>(x))); }
INLINE Words words(Bytes x) { return bits<Words>(_mm512_cvtepu8_epi32(bits<__m128i>(x))); }
#elif defined(__AVX2__)
INLINE Floats floats(SignedBytes x) {
  return bits<Floats>(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_cvtsi64_si128(bits<long long>(x)))));
}
INLINE Words words(Shorts x) { return bits<Words>(_mm256_cvtepu16_epi32(bits<__m128i>(x))); }
INLINE Words words(Bytes x) { return bits<Words>(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(bits<long long>(x)))); }
#else
INLINE Floats floats(SignedBytes x) { return __builtin_convertvector(__builtin_convertvector(x, Ints), Floats); }
INLINE Words words(Shorts x) { return __builtin_convertvector(x, Words); }
INLINE Words words(Bytes x) { return words(__builtin_convertvector(x, Shorts)); }
#endif

INLINE Floats load(const uint16_t* from) {  // bf16: the upper half of an fp32
  Shorts x;
  memcpy(&x, from, sizeof(x));
  return bits<Floats>(words(x) << 16);
}

INLINE Floats load(const int8_t* from) {
  SignedBytes x;
  memcpy(&x, from, sizeof(x));
  return floats(x);
}

INLINE Floats load(const Fp8* from) {  // finite values; 2^120 moves the exponent to fp32's
  Bytes x;
  memcpy(&x, from, sizeof(x));
  const Words word = words(x);
  return bits<Floats>((word & 0x7fu) << 20 | (word & 0x80u) << 24) * 0x1p120f;
}

INLINE float half_to_float(uint16_t half) {  // finite values; 2^112 moves the exponent from fp16's to fp32's
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  const float magnitude = bits<float>(static_cast<uint32_t>(half & 0x7fffu) << 13) * 0x1p112f;
  return bits<float>(bits<uint32_t>(magnitude) | sign);
}

INLINE void store(float* to, Floats x) { memcpy(to, &x, sizeof(x)); }

INLINE void put(float* to, Floats x) { store(to, x); }
INLINE void put(uint16_t* to, Floats x) {  // to the nearest bf16, ties to even
  const Words word = bits<Words>(x), rounded = (word + 0x7fffu + (word >> 16 & 1u)) >> 16;
  const Shorts halves = __builtin_convertvector(bits<Words>(x != x) != 0u ? Words{} + 0x7fc0u : rounded, Shorts);
  memcpy(to, &halves, sizeof(halves));
}

INLINE float widen(float x) { return x; }
INLINE float widen(uint16_t x) { return bits<float>(static_cast<uint32_t>(x) << 16); }

INLINE float widen(int8_t x) { return x; }
INLINE float widen(Fp8 x) {
  return bits<float>((x.byte & 0x7fu) << 20 | (x.byte & 0x80u) << 24) * 0x1p120f;
}

INLINE Floats larger(Floats a, Floats b) { return a > b ? a : b; }

// Over the lanes, halves first: the compiler keeps this in registers.
template <typename Combine>
INLINE float reduce(Floats x, Combine combine) {
  float lanes[LANES];
  memcpy(lanes, &x, sizeof(x));
  for (int half = LANES / 2; half > 0; half /= 2)
    for (int i = 0; i < half; i++) lanes[i] = combine(lanes[i], lanes[i + half]);
  return lanes[0];
}

INLINE float sum(Floats x) {
  return reduce(x, [](float a, float b) { return a + b; });
}

// The sums of four vectors, to[0] to to[3].
INLINE void sum_four(const Floats* x, float* to) {
#if defined(__AVX512F__)
  const __m512 a = bits<__m512>(x[0]), b = bits<__m512>(x[1]), c = bits<__m512>(x[2]), d = bits<__m512>(x[3]);
  const __m512d ab = _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)));
  const __m512d cd = _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d)));
  const __m512 all = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd)),
                                   _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd)));  // a b c d in each quarter
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
  _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
#elif defined(__AVX2__)
  const __m256 ab = _mm256_hadd_ps(bits<__m256>(x[0]), bits<__m256>(x[1]));
  const __m256 cd = _mm256_hadd_ps(bits<__m256>(x[2]), bits<__m256>(x[3]));
  const __m256 all = _mm256_hadd_ps(ab, cd);  // a b c d in each half
  _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
#else
  for (int i = 0; i < 4; i++) to[i] = sum(x[i]);
#endif
}

INLINE float largest(Floats x) {
  return reduce(x, [](float a, float b) { return a > b ? a : b; });
}

// 2^x for x <= 0, within 2e-7; exactly 0 below 2^-126. NaN stays NaN.
INLINE Floats exp2_of_negative(Floats x) {
#if defined(__AVX512F__)
  const __m512 whole = _mm512_roundscale_ps(bits<__m512>(x), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const Floats f = x - bits<Floats>(whole);
#else
  const Floats magic = splat(12582912.0f);  // 1.5 · 2^23: adding it rounds to a whole number
  const Floats rounded = (x < -126.0f ? splat(-126.0f) : x) + magic;
  const Floats f = x - (rounded - magic);
#endif
  Floats p = splat(1.3264720e-3f);  // least relative error over -0.5 to 0.5, fitted
  p = p * f + 9.6715130e-3f;
  p = p * f + 5.5507336e-2f;
  p = p * f + 2.4022242e-1f;
  p = p * f + 6.9314700e-1f;
  p = p * f + 1.0f;
#if defined(__AVX512F__)
  const __mmask16 not_below = _mm512_cmp_ps_mask(bits<__m512>(x), _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
  return bits<Floats>(_mm512_maskz_scalef_ps(not_below, bits<__m512>(p), whole));
#else
  const Ints power = (bits<Ints>(rounded) - bits<Ints>(magic) + 127) << 23;
  return x < -126.0f ? Floats{} : p * bits<Floats>(power);
#endif
}

}  // namespace
