// sums.cpp - sums of numbers side by side, or of their squares, in double; raw second moments made central ones.
// Compiled once for each ISA level, in a namespace of its own (NK_ISA); no torch, no STL.
#include "columns.h"
#include "kernels.h"

namespace nk::cpu::NK_ISA {

namespace {

template <bool kSquares> NK_HD Lanes plus(const Lanes& sum, const Lanes& x) {
  if constexpr (kSquares)
    return fma(x, x, sum);
  else
    return sum + x;
}

template <bool kSquares, class T> double sum_of(const void* x, int64_t size) {
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
        sums[k + half] = plus<kSquares>(sums[k + half], value);
      }
    }
  every_side<double, T>(size - i, [&](int64_t, auto columns) { sums[0] = plus<kSquares>(sums[0], columns(p + i)); });
  for (int away = kSums / 2; away; away /= 2)
    for (int k = 0; k < away; k++) sums[k] = sums[k] + sums[k + away];
  return total(sums[0]);
}

template <class T> double sum(const void* x, int64_t size, bool squares) {
  return squares ? sum_of<true, T>(x, size) : sum_of<false, T>(x, size);
}

template <class R> bool recentre(void* raw, const void* total, int64_t size, double share, double least) {
  R* const x = (R*)raw;
  const R* const t = (const R*)total;
  int lost = 0;
  for (int64_t i = 0; i < size; i++) lost |= !Recentred::apply(x[i], t[i], (R)share, (R)least);
  return !lost;
}

template <class... Types> constexpr SumLoops loops(List<Types...>) {
  return {{sum<Types>...}, {recentre<double>, recentre<float>}};
}

}  // namespace

const SumLoops sum_loops = loops(StorageTypes{});

}  // namespace nk::cpu::NK_ISA
