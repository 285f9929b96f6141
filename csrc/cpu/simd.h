// simd.h - eight numbers side by side, however many registers that takes. Included by loops.cpp only, once per ISA
// level.
//
// Eight on every level, so that all add in the same order; five sums of eight doubles are what AVX2's sixteen registers
// can hold. GCC's and Clang's vector types do the plain arithmetic; intrinsics do what those cannot say: fused
// multiply-adds without contraction, and conversions.
#pragma once
#include "../formulas.h"

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace nk::cpu::NK_ISA {
namespace {

constexpr int kLanes = 8;
#if defined(__AVX512F__)
constexpr int kRegister = 64;  // bytes
#elif defined(__AVX2__)
constexpr int kRegister = 32;
#else
constexpr int kRegister = 16;
#endif

template <class R> struct Eight {
  static constexpr int kWidth = kRegister / (int)sizeof(R) < kLanes ? kRegister / (int)sizeof(R) : kLanes;
  static constexpr int kParts = kLanes / kWidth;
  typedef R Part __attribute__((vector_size(kWidth * sizeof(R))));
  Part part[kParts];

  Eight() = default;
  explicit NK_HD Eight(R x) {
    for (int i = 0; i < kParts; i++) part[i] = x - Part{};
  }
  NK_HD R operator[](int lane) const { return part[lane / kWidth][lane % kWidth]; }
};

template <class R> NK_HD Eight<R> operator-(Eight<R> a) {
  for (int i = 0; i < Eight<R>::kParts; i++) a.part[i] = -a.part[i];
  return a;
}
template <class R> NK_HD Eight<R> operator-(Eight<R> a, const Eight<R>& b) {
  for (int i = 0; i < Eight<R>::kParts; i++) a.part[i] -= b.part[i];
  return a;
}
template <class R> NK_HD Eight<R> operator*(Eight<R> a, const Eight<R>& b) {
  for (int i = 0; i < Eight<R>::kParts; i++) a.part[i] *= b.part[i];
  return a;
}

using FloatPart = Eight<float>::Part;
using DoublePart = Eight<double>::Part;
#if defined(__AVX2__)
NK_HD FloatPart fma_part(FloatPart a, FloatPart b, FloatPart c) { return _mm256_fmadd_ps(a, b, c); }
#if defined(__AVX512F__)
NK_HD DoublePart fma_part(DoublePart a, DoublePart b, DoublePart c) { return _mm512_fmadd_pd(a, b, c); }
#else
NK_HD DoublePart fma_part(DoublePart a, DoublePart b, DoublePart c) { return _mm256_fmadd_pd(a, b, c); }
#endif
#elif defined(__aarch64__)
NK_HD FloatPart fma_part(FloatPart a, FloatPart b, FloatPart c) { return vfmaq_f32(c, a, b); }
NK_HD DoublePart fma_part(DoublePart a, DoublePart b, DoublePart c) { return vfmaq_f64(c, a, b); }
#else
template <class Part> NK_HD Part fma_part(Part a, Part b, Part c) { return a * b + c; }
#endif
template <class R> NK_HD Eight<R> fma(const Eight<R>& a, const Eight<R>& b, Eight<R> c) {
  for (int i = 0; i < Eight<R>::kParts; i++) c.part[i] = fma_part(a.part[i], b.part[i], c.part[i]);
  return c;
}

NK_HD Eight<double> to_double(const Eight<double>& x) { return x; }
NK_HD Eight<double> to_double(const Eight<float>& x) {
  Eight<double> y;
#if defined(__AVX512F__)
  y.part[0] = _mm512_cvtps_pd(x.part[0]);
#elif defined(__AVX2__)
  y.part[0] = _mm256_cvtps_pd(_mm256_castps256_ps128(x.part[0]));
  y.part[1] = _mm256_cvtps_pd(_mm256_extractf128_ps(x.part[0], 1));
#else
  for (int i = 0; i < 4; i++)
    y.part[i] = DoublePart{(double)x.part[i / 2][i % 2 * 2], (double)x.part[i / 2][i % 2 * 2 + 1]};
#endif
  return y;
}

// ---- Memory: eight values of a storage type, widened on the way in, rounded once on the way out
// -------------------------

template <class R> NK_HD Eight<R> load(const R* p) {
  Eight<R> x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}
template <class R> NK_HD Eight<R> store(R* p, const Eight<R>& x) {
  __builtin_memcpy(p, &x, sizeof x);
  return x;
}

#if defined(__AVX2__)
NK_HD Eight<float> load(const bf16* p) {
  Eight<float> x;
  const __m256i u = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
  x.part[0] = _mm256_castsi256_ps(_mm256_slli_epi32(u, 16));
  return x;
}
NK_HD Eight<float> store(bf16* p, Eight<float> x) {
  typedef uint32_t Words __attribute__((vector_size(32)));
  const __m256i u = (__m256i)round_to_bf16((Words)x.part[0], x.part[0] != x.part[0]);
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  const __m256i upper_halves = _mm256_setr_epi16(1, 3, 5, 7, 9, 11, 13, 15, 1, 3, 5, 7, 9, 11, 13, 15);
  const __m256i packed = _mm256_permutexvar_epi16(upper_halves, u);
#else
  const __m256i low = _mm256_srli_epi32(u, 16);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(low, low), 0b1000);
#endif
  _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(packed));
  x.part[0] = _mm256_castsi256_ps(_mm256_and_si256(u, _mm256_set1_epi32((int)0xffff0000)));
  return x;
}
NK_HD Eight<float> load(const f16* p) {
  Eight<float> x;
  x.part[0] = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
  return x;
}
NK_HD Eight<float> store(f16* p, Eight<float> x) {
  const __m128i half = _mm256_cvtps_ph(x.part[0], _MM_FROUND_TO_NEAREST_INT);
  _mm_storeu_si128((__m128i*)p, half);
  x.part[0] = _mm256_cvtph_ps(half);
  return x;
}
#else
NK_HD Eight<float> load(const bf16* p) {
  float x[kLanes];
  for (int k = 0; k < kLanes; k++) x[k] = widen(p[k]);
  return load(x);
}
NK_HD Eight<float> store(bf16* p, const Eight<float>& x) {
  for (int k = 0; k < kLanes; k++) p[k] = narrow_bf16(x[k]);
  return load(p);
}
#if defined(__aarch64__)
NK_HD Eight<float> load(const f16* p) {
  const float16x8_t half = vreinterpretq_f16_u16(vld1q_u16((const uint16_t*)p));
  Eight<float> x;
  x.part[0] = vcvt_f32_f16(vget_low_f16(half));
  x.part[1] = vcvt_f32_f16(vget_high_f16(half));
  return x;
}
NK_HD Eight<float> store(f16* p, const Eight<float>& x) {
  const float16x8_t half = vcombine_f16(vcvt_f16_f32(x.part[0]), vcvt_f16_f32(x.part[1]));
  vst1q_u16((uint16_t*)p, vreinterpretq_u16_f16(half));
  return load(p);
}
#else
NK_HD Eight<float> load(const f16* p) {
  float x[kLanes];
  for (int k = 0; k < kLanes; k++) x[k] = widen(p[k]);
  return load(x);
}
NK_HD Eight<float> store(f16* p, const Eight<float>& x) {
  for (int k = 0; k < kLanes; k++) p[k] = narrow_f16(x[k]);
  return load(p);
}
#endif
#endif

}  // namespace
}  // namespace nk::cpu::NK_ISA
