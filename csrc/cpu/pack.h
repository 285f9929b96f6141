// pack.h - operands as the register tile reads them: panels [t][width], widened to the real type, zeros where there is
// nothing.
#pragma once
#include "tile.h"

namespace nk::cpu::NK_ISA {
namespace {

NK_HD float widened(float x) { return x; }
NK_HD double widened(double x) { return x; }
template <class T> NK_HD float widened(T x) { return widen(x); }

template <class T> void widen_some(const T* from, int64_t n, Real<T>* to) {
  if constexpr (sizeof(T) == sizeof(Real<T>)) {
    __builtin_memcpy(to, from, n * sizeof(T));
  } else {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) store(to + i, load(from + i, Width<kLanes>{}));
    for (; i < n; i++) to[i] = widened(from[i]);
  }
}

// A panel's row of P numbers.
template <int P, class T> NK_HD void widen_row(const T* from, Real<T>* to) {
  if constexpr (sizeof(T) == sizeof(Real<T>)) {
    __builtin_memcpy(to, from, P * sizeof(T));
  } else if constexpr (P < kLanes) {
    T few[kLanes] = {};
    float wide[kLanes];
    __builtin_memcpy(few, from, P * sizeof(T));
    store(wide, load(few, Width<kLanes>{}));
    __builtin_memcpy(to, wide, P * sizeof(float));
  } else {
    for (int i = 0; i + kLanes <= P; i += kLanes) store(to + i, load(from + i, Width<kLanes>{}));
    if (P % kLanes) store(to + P - kLanes, load(from + P - kLanes, Width<kLanes>{}));
  }
}

// `n` columns of the rows (b, t), b < samples, t < steps: [panel][b][t][P].
template <int P, class T>
void pack_rows(const T* from, int64_t sample, int64_t step, int64_t samples, int64_t steps, int64_t n, Real<T>* to) {
  constexpr int kStreams = 8;  // rows read at a time: measured, reading one after the other is slower
  const int64_t count = samples * steps, full = n / P, rest = n % P;
  int64_t b = 0, t = 0;
  for (int64_t k = 0; k < count; k += kStreams) {
    const int streams = count - k < kStreams ? (int)(count - k) : kStreams;
    const T* row[kStreams];
    for (int s = 0; s < streams; s++) {
      row[s] = from + b * sample + t * step;
      if (++t == steps) t = 0, b++;
    }
    for (int64_t p = 0; p < full; p++)
      for (int s = 0; s < streams; s++) widen_row<P>(row[s] + p * P, to + (p * count + k + s) * P);
    if (rest)
      for (int s = 0; s < streams; s++) {
        Real<T>* last = to + (full * count + k + s) * P;
        widen_some(row[s] + full * P, rest, last);
        for (int64_t i = rest; i < P; i++) last[i] = 0;
      }
  }
}

// ---- What lies [column][t] in memory ------------------------------------------------------------------------------

template <class V, int... I> NK_HD V zip_low(V a, V b, Numbers<I...>) {
  return __builtin_shufflevector(a, b, (I % 2 * (int)sizeof...(I) + I / 2)...);
}
template <class V, int... I> NK_HD V zip_high(V a, V b, Numbers<I...>) {
  return __builtin_shufflevector(a, b, (I % 2 * (int)sizeof...(I) + (int)sizeof...(I) / 2 + I / 2)...);
}

// A square of registers. Each round halves the distance between what must become neighbours.
template <class R> NK_HD void transpose(Part<R> (&x)[kLane<R>]) {
  constexpr int N = kLane<R>;
  constexpr CountTo<N> lanes;
#pragma GCC unroll 4
  for (int round = 1; round < N; round *= 2) {
    Part<R> y[N];
#pragma GCC unroll 8
    for (int i = 0; i < N / 2; i++) {
      y[2 * i] = zip_low(x[i], x[i + N / 2], lanes);
      y[2 * i + 1] = zip_high(x[i], x[i + N / 2], lanes);
    }
#pragma GCC unroll 16
    for (int i = 0; i < N; i++) x[i] = y[i];
  }
}

template <class T> NK_HD Part<Real<T>> load_part(const T* p) {
  constexpr int N = kLane<Real<T>>;
  Part<Real<T>> x;
  if constexpr (sizeof(T) == sizeof(Real<T>)) {
    __builtin_memcpy(&x, p, sizeof x);
  } else if constexpr (N < kLanes) {
    for (int i = 0; i < N; i++) x[i] = widened(p[i]);
  } else {
    x = load(p, Width<N>{}).part[0];
  }
  return x;
}

// A box of positions of up to kTileCols columns: [t][kTileCols].
template <class T>
void pack_planes(const T* from, int64_t column, int64_t columns, const int64_t (&box)[3], const int64_t (&space)[2],
                 Real<T>* to) {
  using R = Real<T>;
  constexpr int N = kLane<R>, P = kTileCols<R>;
  int64_t n[3] = {box[0], box[1], box[2]};
  if (space[1] == n[2] || n[1] == 1) {  // as one long row, so that whole squares are more
    n[2] *= n[1], n[1] = 1;
    if (space[0] == n[2] || n[0] == 1) n[2] *= n[0], n[0] = 1;
  }
  for (int64_t d = 0; d < n[0]; d++)
    for (int64_t h = 0; h < n[1]; h++) {
      const T* row = from + d * space[0] + h * space[1];
      int64_t w = 0;
      for (; w + N <= n[2]; w += N)
        for (int half = 0; half < P; half += N) {
          Part<R> x[N];
          for (int i = 0; i < N; i++) x[i] = half + i < columns ? load_part(row + (half + i) * column + w) : Part<R>{};
          transpose<R>(x);
          for (int i = 0; i < N; i++) __builtin_memcpy(to + (w + i) * P + half, &x[i], sizeof x[i]);
        }
      for (; w < n[2]; w++)
        for (int i = 0; i < P; i++) to[w * P + i] = i < columns ? widened(row[i * column + w]) : 0;
      to += n[2] * P;
    }
}

}  // namespace
}  // namespace nk::cpu::NK_ISA
