// simd.h - eight doubles, however many registers that takes. Included by loops.cpp only, once per ISA level.
//
// What the compiler may not do for us: sums in a fixed order, and fused multiply-adds without contraction. Eight lanes
// on every level, so that all add in the same order; five sums of eight lanes are what AVX2's sixteen registers can
// hold.
#pragma once
#include "../formulas.h"

#if defined(__AVX__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace nk::cpu::NK_ISA {
namespace {

constexpr int kLanes = 8;

#if defined(__AVX512F__)
constexpr int kWidth = 8;  // doubles in a register
#elif defined(__AVX__)
constexpr int kWidth = 4;
#else
constexpr int kWidth = 2;
#endif
typedef double Doubles __attribute__((vector_size(kWidth * sizeof(double))));

inline Doubles fma(Doubles a, Doubles b, Doubles c) {
#if defined(__AVX512F__)
  return (Doubles)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif defined(__FMA__)
  return (Doubles)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#elif defined(__aarch64__)
  return (Doubles)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
#else
  return a * b + c;
#endif
}

struct Lanes {
  static constexpr int kParts = kLanes / kWidth;
  Doubles part[kParts];

  double operator[](int lane) const { return part[lane / kWidth][lane % kWidth]; }
};

inline Lanes operator-(Lanes a, const Lanes& b) {
  for (int i = 0; i < Lanes::kParts; i++) a.part[i] -= b.part[i];
  return a;
}
inline Lanes fma(const Lanes& a, const Lanes& b, Lanes c) {
  for (int i = 0; i < Lanes::kParts; i++) c.part[i] = fma(a.part[i], b.part[i], c.part[i]);
  return c;
}

// Eight values from memory, in memory's precision, and widened. Taken apart so that a value can wait in half the space.
template <class R> struct Eight {
  typedef R Part __attribute__((vector_size(kWidth * sizeof(R))));
  Part part[Lanes::kParts];

  explicit Eight(const R* p) {
    for (int i = 0; i < Lanes::kParts; i++) __builtin_memcpy(&part[i], p + i * kWidth, sizeof(Part));
  }
  Lanes widened() const {
    Lanes x;
    for (int i = 0; i < Lanes::kParts; i++) x.part[i] = __builtin_convertvector(part[i], Doubles);
    return x;
  }
};

}  // namespace
}  // namespace nk::cpu::NK_ISA
