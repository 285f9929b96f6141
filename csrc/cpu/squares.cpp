// squares.cpp - |x|^2 of numbers side by side, in double. Compiled once for each ISA level, in a namespace of its own
// (NK_ISA); no torch, no STL.
#include "columns.h"
#include "kernels.h"

namespace nk::cpu::NK_ISA {

template <class T> double square_norm(const void* x, int64_t size) {
  constexpr int kSums = 8, kStep = kSums * kLanes;  // enough to hide what an addition takes
  constexpr Width<kSide<Real<T>>> wide;
  const T* p = (const T*)x;
  Lanes sums[kSums];
  for (Lanes& sum : sums) sum = Lanes::all(0);
  int64_t i = 0;
  for (; i + kStep <= size; i += kStep)
#pragma GCC unroll 8
    for (int k = 0; k < kSums; k += kSide<Real<T>> / kLanes) {
      const auto values = load(p + i + k * kLanes, wide);
#pragma GCC unroll 2
      for (int half = 0; half < kSide<Real<T>> / kLanes; half++) {
        const Lanes value = eight_doubles(values, half);
        sums[k + half] = fma(value, value, sums[k + half]);
      }
    }
  every_side<double, T>(size - i, [&](int64_t, auto columns) {
    const Lanes value = columns(p + i);
    sums[0] = fma(value, value, sums[0]);
  });
  for (int away = kSums / 2; away; away /= 2)
    for (int k = 0; k < away; k++) sums[k] = sums[k] + sums[k + away];
  return total(sums[0]);
}

template double square_norm<double>(const void*, int64_t);
template double square_norm<float>(const void*, int64_t);
template double square_norm<bf16>(const void*, int64_t);
template double square_norm<f16>(const void*, int64_t);

}  // namespace nk::cpu::NK_ISA
