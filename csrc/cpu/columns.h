// columns.h - rows of a matrix, several columns at a time. Included by the loops only, once per ISA level.
//
// Sixteen floats or eight doubles side by side on every level; a row's last columns are padded with zeros, on a copy.
#pragma once
#include "simd.h"

namespace nk::cpu::NK_ISA {
namespace {

using Lanes = Eight<double>;
template <class R> constexpr int kSide = sizeof(R) == 4 ? 16 : 8;

// Values of a storage type for arithmetic in R, which may be wider than theirs.
template <class R, class T> NK_HD Side<R, kSide<R>> load_as(const T* p) {
  if constexpr (sizeof(Real<T>) == sizeof(R))
    return load(p, Width<kSide<R>>{});
  else
    return eight_doubles(load(p, Width<kLanes>{}), 0);
}

// The columns that are left over, padded with zeros.
template <class T, int N> struct Rest {
  T x[N] = {};
  Rest(const T* from, int64_t size) {
    for (int64_t k = 0; k < size; k++) x[k] = from[k];
  }
};

template <class R, class T, class Each> NK_HD void every_side(int64_t size, Each each) {
  constexpr int N = kSide<R>;
  int64_t j = 0;
  for (; j + N <= size; j += N) each(j, [&](const T* row) { return load_as<R>(row + j); });
  if (j < size) each(j, [&](const T* row) { return load_as<R>(Rest<T, N>(row + j, size - j).x); });
}

template <class Out> void put(void* to, int64_t j, int64_t size, const Lanes& x) {
  Out* out = (Out*)to + j;
  if (size - j >= kLanes)
    store_as(out, x);
  else
    for (int64_t k = 0; k < size - j; k++) out[k] = (Out)x[(int)k];
}

}  // namespace
}  // namespace nk::cpu::NK_ISA
