// SPDX-License-Identifier: Apache-2.0
// One vector type per instruction set. Included only by translation units that are compiled once per
// instruction set, with VOSOPS_ISA naming the namespace that keeps their inline code apart: without it
// the linker could hand code built for AVX-512 to a CPU that lacks it.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace vosops::VOSOPS_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16, kVecs = 4;
#elif defined(__AVX2__)
constexpr int kLanes = 8, kVecs = 2;
#else
constexpr int kLanes = 4, kVecs = 2;
#endif
// The register tile of every product: kRows x kCols accumulators fill the register file.
constexpr int kRows = 6, kCols = kLanes * kVecs;

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t VecI __attribute__((vector_size(4 * kLanes)));

inline Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }
inline Vec set1(float x) { return x - Vec{}; }           // minus 0 folds away, plus 0 would not
inline Vec vmax(Vec a, Vec b) { return a > b ? a : b; }  // b where either is NaN

// One bit per lane where !(a <= b): a NaN counts as greater, so that it is seen and not lost.
inline uint32_t not_below(Vec a, Vec b) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_NLE_UQ);
#elif defined(__AVX2__)
  return uint32_t(_mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_NLE_UQ)));
#else
  uint32_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= uint32_t(!(a[i] <= b[i])) << i;
  return bits;
#endif
}

// Writes the lanes of `bits` and their indices (first + lane) to the front of the two buffers, which
// need room for kLanes entries; returns how many were written.
inline int append(Vec v, uint32_t bits, int32_t first, float* scores, int32_t* indices) {
#if defined(__AVX512F__)
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  _mm512_storeu_ps(scores, _mm512_maskz_compress_ps(__mmask16(bits), (__m512)v));
  _mm512_storeu_si512(indices, _mm512_add_epi32(_mm512_set1_epi32(first),
                                                _mm512_maskz_compress_epi32(__mmask16(bits), lanes)));
  return __builtin_popcount(bits);
#else
  int n = 0;
  for (; bits; bits &= bits - 1, ++n) {
    const int lane = __builtin_ctz(bits);
    scores[n] = v[lane];
    indices[n] = first + lane;
  }
  return n;
#endif
}

inline float reduce_add(Vec v) {
  float sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += v[i];
  return sum;
}

inline float reduce_max(Vec v) {
  float best = v[0];
  for (int i = 1; i < kLanes; ++i) best = v[i] > best ? v[i] : best;
  return best;
}

// Adding and subtracting 1.5 * 2^23 rounds to the nearest integer.
constexpr float kShifter = 12582912.f;

// 2^n from n + kShifter, for -126 <= n <= 127.
inline Vec power_of_two(Vec shifted) {
  VecI bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  const VecI exponent = (bits - 0x4B400000 + 127) << 23;
  Vec power;
  std::memcpy(&power, &exponent, sizeof power);
  return power;
}

// e^x to 2 ulp for x <= 88; 0 below -87.3 (and for -inf), NaN for NaN.
inline Vec exp(Vec x) {
  const Vec low = set1(-87.33f);
  const Vec clamped = x < low ? low : x;
  const Vec shifter = set1(kShifter);
  const Vec shifted = clamped * 1.44269504088896341f + shifter;
  const Vec n = shifted - shifter;
  const Vec r = (clamped - n * 0.693145751953125f) - n * 1.428606765330187e-6f;
  Vec p = set1(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const Vec result = p * power_of_two(shifted);
  return x < low ? Vec{} : result;
}

// 2^x to 2 ulp for x <= 127; 0 below -126 (and for -inf), NaN for NaN.
inline Vec exp2(Vec x) {
  const Vec low = set1(-126.f);
  const Vec clamped = x < low ? low : x;
  const Vec shifter = set1(kShifter);
  const Vec shifted = clamped + shifter;
  const Vec r = clamped - (shifted - shifter);
  Vec p = set1(1.3276471519e-3f);  // minimax of 2^r on [-1/2, 1/2], relative error 7.5e-8
  p = p * r + 9.6755413307e-3f;
  p = p * r + 5.5507132750e-2f;
  p = p * r + 2.4022119724e-1f;
  p = p * r + 6.9314696706e-1f;
  p = p * r + 1.0000000717e+0f;
  const Vec result = p * power_of_two(shifted);
  return x < low ? Vec{} : result;
}

// Natural logarithm to 2 ulp for positive normal numbers; NaN for NaN.
inline Vec log(Vec x) {
  VecI bits;
  std::memcpy(&bits, &x, sizeof bits);
  // x = 2^e * m with m in [sqrt(1/2), sqrt(2)).
  const VecI shifted = bits - 0x3f3504f3;
  const VecI exponent = shifted >> 23;
  const VecI mantissa = (shifted & 0x007fffff) + 0x3f3504f3;
  Vec m;
  std::memcpy(&m, &mantissa, sizeof m);
  const Vec e = __builtin_convertvector(exponent, Vec), f = m - 1.f, z = f * f;
  Vec p = set1(7.0376836292e-2f);
  p = p * f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  const Vec result = f + (p * f * z - 0.5f * z + e * -2.12194440e-4f) + e * 0.693359375f;
  return x == x ? result : x;
}

// acc + a * b over pairs of bfloat16 in each 32-bit lane, two products at a time.
#if defined(__AVX512BF16__)
constexpr bool kPairs = true;
inline Vec dot_pairs(Vec acc, Vec a, Vec b) {
  return (Vec)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
}
#else
constexpr bool kPairs = false;
inline Vec dot_pairs(Vec acc, Vec, Vec) { return acc; }
#endif

}  // namespace vosops::VOSOPS_ISA
