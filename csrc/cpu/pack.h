// pack.h - operands as the register tile reads them: panels [t][width], widened to the real type, zeros where there is
// nothing.
#pragma once
#include "simd.h"

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

}  // namespace
}  // namespace nk::cpu::NK_ISA
