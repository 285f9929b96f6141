// convert.h - blocks of bfloat16 and float16 to and from float32. Included by loops.cpp only, once per ISA level.
//
// bfloat16 is shifts, which compilers vectorise. float16 has instructions that gcc 12 does not use by itself; every
// level rounds to nearest-even as formulas.h does, and the remainder of a block goes through the same instruction.
#pragma once
#include "../formulas.h"

#if defined(__F16C__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace nk::cpu::NK_ISA {
namespace {

inline void widen_block(float* __restrict to, const bf16* __restrict from, int n) {
  for (int k = 0; k < n; k++) to[k] = widen(from[k]);
}
inline void narrow_block(bf16* __restrict to, const float* __restrict from, int n) {
  for (int k = 0; k < n; k++) to[k] = narrow_bf16(from[k]);
}

#if defined(__F16C__) || defined(__aarch64__)
#if defined(__AVX512F__)
constexpr int kHalves = 16;
inline void widen_halves(float* to, const f16* from) {
  _mm512_storeu_ps(to, _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from)));
}
inline void narrow_halves(f16* to, const float* from) {
  _mm256_storeu_si256((__m256i*)to, _mm512_cvtps_ph(_mm512_loadu_ps(from), _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__F16C__)
constexpr int kHalves = 8;
inline void widen_halves(float* to, const f16* from) {
  _mm256_storeu_ps(to, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from)));
}
inline void narrow_halves(f16* to, const float* from) {
  _mm_storeu_si128((__m128i*)to, _mm256_cvtps_ph(_mm256_loadu_ps(from), _MM_FROUND_TO_NEAREST_INT));
}
#else
constexpr int kHalves = 4;
inline void widen_halves(float* to, const f16* from) {
  vst1q_f32(to, vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16((const uint16_t*)from))));
}
inline void narrow_halves(f16* to, const float* from) {
  vst1_u16((uint16_t*)to, vreinterpret_u16_f16(vcvt_f16_f32(vld1q_f32(from))));
}
#endif
inline void widen_block(float* to, const f16* from, int n) {
  int k = 0;
  for (; k + kHalves <= n; k += kHalves) widen_halves(to + k, from + k);
  if (k == n) return;
  f16 rest[kHalves] = {};
  float wide[kHalves];
  for (int j = 0; j < kHalves && k + j < n; j++) rest[j] = from[k + j];
  widen_halves(wide, rest);
  for (int j = 0; j < kHalves && k + j < n; j++) to[k + j] = wide[j];
}
inline void narrow_block(f16* to, const float* from, int n) {
  int k = 0;
  for (; k + kHalves <= n; k += kHalves) narrow_halves(to + k, from + k);
  if (k == n) return;
  float rest[kHalves] = {};
  f16 narrow[kHalves];
  for (int j = 0; j < kHalves && k + j < n; j++) rest[j] = from[k + j];
  narrow_halves(narrow, rest);
  for (int j = 0; j < kHalves && k + j < n; j++) to[k + j] = narrow[j];
}
#else
inline void widen_block(float* __restrict to, const f16* __restrict from, int n) {
  for (int k = 0; k < n; k++) to[k] = widen(from[k]);
}
inline void narrow_block(f16* __restrict to, const float* __restrict from, int n) {
  for (int k = 0; k < n; k++) to[k] = narrow_f16(from[k]);
}
#endif

}  // namespace
}  // namespace nk::cpu::NK_ISA
