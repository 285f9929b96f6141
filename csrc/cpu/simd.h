// simd.h - eight or sixteen numbers side by side, however many registers that takes. Included by loops.cpp and its
// neighbours, once per ISA level.
//
// Sums are eight doubles wide on every level, so that all add in the same order; five of those are what AVX2's sixteen
// registers can hold. Everything before the sums is as wide as a register of floats is. GCC's and Clang's vector types
// do the plain arithmetic; intrinsics do what those cannot say: fused multiply-adds without contraction, and
// conversions.
#pragma once
#include "../core/formulas.h"

#if defined(__SSE2__)
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

template <class R, int N> struct Side {  // N numbers side by side
  static constexpr int kWidth = kRegister / (int)sizeof(R) < N ? kRegister / (int)sizeof(R) : N;
  static constexpr int kParts = N / kWidth;
  typedef R Part __attribute__((vector_size(kWidth * sizeof(R))));
  Part part[kParts];

  static NK_HD Side all(R x) {
    Side y;
    for (int i = 0; i < kParts; i++) y.part[i] = x - Part{};
    return y;
  }
  NK_HD R operator[](int lane) const { return part[lane / kWidth][lane % kWidth]; }
};
template <class R> using Eight = Side<R, kLanes>;

// How many coordinates of a real type the loops take at a time.
template <class R> constexpr int kAtATime = kRegister / (int)sizeof(R) > kLanes ? kRegister / (int)sizeof(R) : kLanes;

template <class R, int N> NK_HD Side<R, N> operator-(Side<R, N> a) {
  for (int i = 0; i < a.kParts; i++) a.part[i] = -a.part[i];
  return a;
}
template <class R, int N> NK_HD Side<R, N> operator-(Side<R, N> a, const Side<R, N>& b) {
  for (int i = 0; i < a.kParts; i++) a.part[i] -= b.part[i];
  return a;
}
template <class R, int N> NK_HD Side<R, N> operator+(Side<R, N> a, const Side<R, N>& b) {
  for (int i = 0; i < a.kParts; i++) a.part[i] += b.part[i];
  return a;
}
template <class R, int N> NK_HD Side<R, N> operator*(Side<R, N> a, const Side<R, N>& b) {
  for (int i = 0; i < a.kParts; i++) a.part[i] *= b.part[i];
  return a;
}

template <class R, int N> NK_HD Side<R, N> operator/(Side<R, N> a, const Side<R, N>& b) {
  for (int i = 0; i < a.kParts; i++) a.part[i] /= b.part[i];
  return a;
}

#if defined(__AVX2__)
NK_HD __m256 sqrt_part(__m256 x) { return _mm256_sqrt_ps(x); }
NK_HD __m256d sqrt_part(__m256d x) { return _mm256_sqrt_pd(x); }
#if defined(__AVX512F__)
NK_HD __m512 sqrt_part(__m512 x) { return _mm512_sqrt_ps(x); }
NK_HD __m512d sqrt_part(__m512d x) { return _mm512_sqrt_pd(x); }
#endif
#elif defined(__SSE2__)
NK_HD __m128 sqrt_part(__m128 x) { return _mm_sqrt_ps(x); }
NK_HD __m128d sqrt_part(__m128d x) { return _mm_sqrt_pd(x); }
#elif defined(__aarch64__)
NK_HD float32x4_t sqrt_part(float32x4_t x) { return vsqrtq_f32(x); }
NK_HD float64x2_t sqrt_part(float64x2_t x) { return vsqrtq_f64(x); }
#else
template <class Part> NK_HD Part sqrt_part(Part x) {
  for (int i = 0; i < (int)(sizeof x / sizeof x[0]); i++) x[i] = nk::sqrt(x[i]);
  return x;
}
#endif
template <class R, int N> NK_HD Side<R, N> sqrt(Side<R, N> x) {
  for (int i = 0; i < x.kParts; i++) x.part[i] = sqrt_part(x.part[i]);
  return x;
}

#if defined(__AVX2__)
NK_HD __m256 fma_part(__m256 a, __m256 b, __m256 c) { return _mm256_fmadd_ps(a, b, c); }
#if defined(__AVX512F__)
NK_HD __m512 fma_part(__m512 a, __m512 b, __m512 c) { return _mm512_fmadd_ps(a, b, c); }
NK_HD __m512d fma_part(__m512d a, __m512d b, __m512d c) { return _mm512_fmadd_pd(a, b, c); }
#else
NK_HD __m256d fma_part(__m256d a, __m256d b, __m256d c) { return _mm256_fmadd_pd(a, b, c); }
#endif
#elif defined(__aarch64__)
NK_HD float32x4_t fma_part(float32x4_t a, float32x4_t b, float32x4_t c) { return vfmaq_f32(c, a, b); }
NK_HD float64x2_t fma_part(float64x2_t a, float64x2_t b, float64x2_t c) { return vfmaq_f64(c, a, b); }
#else
template <class Part> NK_HD Part fma_part(Part a, Part b, Part c) { return a * b + c; }
#endif
template <class R, int N> NK_HD Side<R, N> fma(const Side<R, N>& a, const Side<R, N>& b, Side<R, N> c) {
  for (int i = 0; i < c.kParts; i++) c.part[i] = fma_part(a.part[i], b.part[i], c.part[i]);
  return c;
}

template <class R, int N> NK_HD Side<R, N> finite_or(Side<R, N> x, const Side<R, N>& y) {
  for (int i = 0; i < x.kParts; i++) x.part[i] = x.part[i] - x.part[i] == 0 ? x.part[i] : y.part[i];
  return x;
}

template <class R, int N> NK_HD Side<R, N> zero_or(const Side<R, N>& x, Side<R, N> y) {
  for (int i = 0; i < x.kParts; i++) y.part[i] = x.part[i] == 0 ? x.part[i] : y.part[i];
  return y;
}

// The k-th eight of a row of numbers, as doubles.
NK_HD Eight<double> eight_doubles(const Eight<double>& x, int) { return x; }
NK_HD Eight<double> eight_doubles(const Eight<float>& x, int) {
  Eight<double> y;
#if defined(__AVX512F__)
  y.part[0] = _mm512_cvtps_pd(x.part[0]);
#elif defined(__AVX2__)
  y.part[0] = _mm256_cvtps_pd(_mm256_castps256_ps128(x.part[0]));
  y.part[1] = _mm256_cvtps_pd(_mm256_extractf128_ps(x.part[0], 1));
#else
  for (int i = 0; i < 4; i++)
    y.part[i] = Eight<double>::Part{(double)x.part[i / 2][i % 2 * 2], (double)x.part[i / 2][i % 2 * 2 + 1]};
#endif
  return y;
}
#if defined(__AVX512F__)
NK_HD Eight<double> eight_doubles(const Side<float, 16>& x, int k) {
  Eight<double> y;
  y.part[0] = _mm512_cvtps_pd(k ? _mm512_extractf32x8_ps(x.part[0], 1) : _mm512_castps512_ps256(x.part[0]));
  return y;
}
#else
NK_HD Eight<double> eight_doubles(const Side<float, 16>& x, int k) {
  Eight<float> half;
  __builtin_memcpy(&half, x.part + k * half.kParts, sizeof half);
  return eight_doubles(half, 0);
}
#endif

// The sum, by halves.
NK_HD double total(const Eight<double>& x) {
  typedef double Four __attribute__((vector_size(32)));
  typedef double Two __attribute__((vector_size(16)));
  Four four[2];
  __builtin_memcpy(four, &x, sizeof four);
  const Four sum = four[0] + four[1];
  Two two[2];
  __builtin_memcpy(two, &sum, sizeof two);
  const Two last = two[0] + two[1];
  return last[0] + last[1];
}
NK_HD double total(const Side<float, 16>& x) { return total(eight_doubles(x, 0) + eight_doubles(x, 1)); }

// ---- Memory: values of a storage type, widened on the way in, rounded once on the way out ---------------------------

template <int N> struct Width {};  // how many to load

// Part by part: g++ keeps what is copied as a whole in memory, not in registers.
template <class R, int N> NK_HD Side<R, N> load(const R* p, Width<N>) {
  Side<R, N> x;
  for (int i = 0; i < x.kParts; i++) __builtin_memcpy(&x.part[i], p + i * x.kWidth, sizeof x.part[i]);
  return x;
}
template <class R, int N> NK_HD Side<R, N> store(R* p, const Side<R, N>& x) {
  for (int i = 0; i < x.kParts; i++) __builtin_memcpy(p + i * x.kWidth, &x.part[i], sizeof x.part[i]);
  return x;
}

#if defined(__AVX512F__)
NK_HD Side<float, 16> load(const bf16* p, Width<16>) {
  return {{_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16))}};
}
NK_HD Side<float, 16> store(bf16* p, const Side<float, 16>& x) {
  typedef uint32_t Words __attribute__((vector_size(64)));
  const __m512i u = (__m512i)round_to_bf16((Words)x.part[0], x.part[0] != x.part[0]);
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(u, 16)));
  return {{_mm512_castsi512_ps(_mm512_and_si512(u, _mm512_set1_epi32((int)0xffff0000)))}};
}
NK_HD Side<float, 16> load(const f16* p, Width<16>) {
  return {{_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))}};
}
NK_HD Side<float, 16> store(f16* p, const Side<float, 16>& x) {
  const __m256i half = _mm512_cvtps_ph(x.part[0], _MM_FROUND_TO_NEAREST_INT);
  _mm256_storeu_si256((__m256i*)p, half);
  return {{_mm512_cvtph_ps(half)}};
}
#endif

#if defined(__AVX2__)
NK_HD Eight<float> load(const bf16* p, Width<8>) {
  return {{_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16))}};
}
NK_HD Eight<float> store(bf16* p, const Eight<float>& x) {
  typedef uint32_t Words __attribute__((vector_size(32)));
  const __m256i u = (__m256i)round_to_bf16((Words)x.part[0], x.part[0] != x.part[0]);
  const __m256i low = _mm256_srli_epi32(u, 16);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(low, low), 0b1000);
  _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(packed));
  return {{_mm256_castsi256_ps(_mm256_and_si256(u, _mm256_set1_epi32((int)0xffff0000)))}};
}
NK_HD Eight<float> load(const f16* p, Width<8>) { return {{_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p))}}; }
NK_HD Eight<float> store(f16* p, const Eight<float>& x) {
  const __m128i half = _mm256_cvtps_ph(x.part[0], _MM_FROUND_TO_NEAREST_INT);
  _mm_storeu_si128((__m128i*)p, half);
  return {{_mm256_cvtph_ps(half)}};
}
#else
template <int kWidth> struct Bf16Part {
  typedef uint32_t Words __attribute__((vector_size(kWidth * 4)));
  typedef uint16_t Halves __attribute__((vector_size(kWidth * 2)));
};
using Bf16 = Bf16Part<Eight<float>::kWidth>;
NK_HD Eight<float> load(const bf16* p, Width<8>) {
  Eight<float> x;
  for (int i = 0; i < x.kParts; i++) {
    Bf16::Halves halves;
    __builtin_memcpy(&halves, p + i * x.kWidth, sizeof halves);
    x.part[i] = (Eight<float>::Part)(__builtin_convertvector(halves, Bf16::Words) << 16);
  }
  return x;
}
NK_HD Eight<float> store(bf16* p, const Eight<float>& x) {
  Eight<float> y;
  for (int i = 0; i < x.kParts; i++) {
    const Bf16::Words u = round_to_bf16((Bf16::Words)x.part[i], x.part[i] != x.part[i]);
    const Bf16::Halves upper = __builtin_convertvector(u >> 16, Bf16::Halves);
    __builtin_memcpy(p + i * x.kWidth, &upper, sizeof upper);
    y.part[i] = (Eight<float>::Part)(u & 0xffff0000u);
  }
  return y;
}
#endif

#if defined(__aarch64__)
NK_HD Eight<float> load(const f16* p, Width<8>) {
  const float16x8_t half = vreinterpretq_f16_u16(vld1q_u16((const uint16_t*)p));
  return {{vcvt_f32_f16(vget_low_f16(half)), vcvt_f32_f16(vget_high_f16(half))}};
}
NK_HD Eight<float> store(f16* p, const Eight<float>& x) {
  const float16x8_t half = vcombine_f16(vcvt_f16_f32(x.part[0]), vcvt_f16_f32(x.part[1]));
  vst1q_u16((uint16_t*)p, vreinterpretq_u16_f16(half));
  return load(p, Width<8>{});
}
#endif

// Types that the level has no instructions for: out of line, as inlined they would take most of the time that it takes
// to compile the level.
template <bool> struct If {};
template <> struct If<true> {
  static constexpr int holds = 1;
};
template <class T> [[gnu::noinline]] void widen_eight(const T* p, float* x) {
  for (int k = 0; k < kLanes; k++) x[k] = widen(p[k]);
}
template <class T> [[gnu::noinline]] void narrow_eight(const float* x, T* p, float* stored) {
  for (int k = 0; k < kLanes; k++) p[k] = narrow(x[k], T{}), stored[k] = widen(p[k]);
}
template <class T, int = If<!is_same<T, Real<T>>>::holds> NK_HD Eight<float> load(const T* p, Width<8>) {
  Eight<float> x;
  widen_eight(p, (float*)&x);
  return x;
}
template <class T, int = If<!is_same<T, Real<T>>>::holds> NK_HD Eight<float> store(T* p, const Eight<float>& x) {
  Eight<float> stored;
  narrow_eight((const float*)&x, p, (float*)&stored);
  return stored;
}
template <class T, int = If<!is_same<T, Real<T>>>::holds> NK_HD Side<float, 16> load(const T* p, Width<16>) {
  const Eight<float> halves[2] = {load(p, Width<8>{}), load(p + 8, Width<8>{})};
  Side<float, 16> x;
  __builtin_memcpy(&x, halves, sizeof x);
  return x;
}
#if defined(__AVX512F__)
template <class T, int = If<!is_same<T, Real<T>>>::holds> NK_HD Side<float, 16> store(T* p, const Side<float, 16>& x) {
  Eight<float> halves[2];
  __builtin_memcpy(halves, &x, sizeof x);
  halves[0] = store(p, halves[0]), halves[1] = store(p + 8, halves[1]);
  Side<float, 16> stored;
  __builtin_memcpy(&stored, halves, sizeof stored);
  return stored;
}
#endif

// Eight doubles, rounded to the type of the memory.
template <class R> NK_HD void store_as(R* p, const Eight<double>& x) {
  typedef R Part __attribute__((vector_size(Eight<double>::kWidth * sizeof(R))));
  for (int i = 0; i < x.kParts; i++) {
    const Part part = __builtin_convertvector(x.part[i], Part);
    __builtin_memcpy(p + i * x.kWidth, &part, sizeof part);
  }
}

}  // namespace
}  // namespace nk::cpu::NK_ISA
