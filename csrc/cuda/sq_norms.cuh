// sq_norms.cuh - |g|^2 of a list of gradients, and what clipping by all of them makes of a step. Includes no standard
// library.
#pragma once
#include "row_sums.cuh"
#include "update.cuh"

namespace nk::cuda {

// A gradient, cut into parts(numel) stretches, a block each.
struct Gradient {
  const void *g, *h;
  double* parts;  // a number of each stretch
  int64_t numel;
  bool is_gauged;
};

struct Gradients {
  int count;
  uint32_t first_block[kTensors + 1];
  Gradient tensors[kTensors];
};

// Of the combination of pairs, by `threads` threads, of which this is number `thread`.
template <class T>
__device__ __forceinline__ double sum_of_pairs(const PairCoefficients<Real<T>>& c, const T* g, const T* h, int size,
                                               int thread, int threads) {
  using R = Real<T>;
  constexpr int N = Pack<T>::size;
  const int packed = is_aligned(g) && is_aligned(h) ? size / N * N : 0;
  double sum = 0;
  const auto add = [&](R from_g, R from_h) {
    R first, second;
    const double x = (double)gradient<Measure::pair>(c, from_g, from_h, first, second);
    sum = fma(x, x, sum);
  };
#pragma unroll 1
  for (int i = thread * N; i < packed; i += threads * N) {
    Pack<T> of_g, of_h;
    of_g.load(g + i);
    of_h.load(h + i);
    R from_g[N], from_h[N];
    of_g.unpack(from_g);
    of_h.unpack(from_h);
#pragma unroll
    for (int k = 0; k < N; k++) add(from_g[k], from_h[k]);
  }
#pragma unroll 1
  for (int i = packed + thread; i < size; i += threads) add(real(g[i]), real(h[i]));
  return sum;
}

// What a block has summed of one stretch, in the user's units.
template <bool kPair>
__device__ __forceinline__ void write_sq_norm(double* part, double sum, const Hyper& hyper, bool is_gauged,
                                              double (&shared)[1][kWarps]) {
  double s[1] = {sum};
  block_sum(s, shared);
  if (threadIdx.x == 0)
    *part = sq_norm_in_user_units<kSums<kPair ? Measure::pair : Measure::step>>(s[0], hyper, is_gauged);
}

template <class T, bool kPair>
__global__ void __launch_bounds__(kThreads, 4)
    sq_norms(const Gradients __grid_constant__ table, const Hyper __grid_constant__ given) {
  NK_SHARED(double, shared, [1][kWarps]);
  const int i = entry_of(table, blockIdx.x);
  const Gradient& t = table.tensors[i];
  const int64_t part = blockIdx.x - table.first_block[i], begin = part * kBlock, left = t.numel - begin;
  const int n = (int)(left < kBlock ? left : kBlock);
  const T *g = static_cast<const T*>(t.g) + begin, *h = static_cast<const T*>(t.h) + begin;
  const Hyper hyper = complete(given);
  double sum;
  if constexpr (kPair) {
    const auto c = PairCoefficients<Real<T>>::from(hyper);
    sum = sum_of_pairs(c, g, h, n, (int)threadIdx.x, kThreads);
  } else {
    sum = sum_of<T, true>(g, n, (int)threadIdx.x, kThreads);
  }
  write_sq_norm<kPair>(t.parts + part, sum, hyper, t.is_gauged, shared);
}

template <class T, bool kPair>
__global__ void __launch_bounds__(kThreads, 2)
    sq_norm_strided(const StridedTensor __grid_constant__ t, const Hyper __grid_constant__ given) {
  using R = Real<T>;
  NK_SHARED(double, shared, [1][kWarps]);
  const Hyper hyper = complete(given);
  const auto c = PairCoefficients<R>::from(hyper);
  const int64_t begin = blockIdx.x * kBlock, end = t.tensor.numel < begin + kBlock ? t.tensor.numel : begin + kBlock;
  double sum = 0;
  for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
    int64_t at[kStreams];
    offsets<int64_t>(t, i, at);
    R x = real(static_cast<const T*>(t.tensor.g)[at[kG]]), first, second;
    if constexpr (kPair)
      x = gradient<Measure::pair>(c, x, (R)real(static_cast<const T*>(t.tensor.h)[at[kH]]), first, second);
    sum = fma((double)x, (double)x, sum);
  }
  write_sq_norm<kPair>(t.tensor.sums + blockIdx.x, sum, hyper, t.is_gauged, shared);
}

// One block. Each thread takes every so many of the squares, then the block adds up.
__global__ void __launch_bounds__(kThreads) norm_and_coef(const double* sq_norms, int64_t count, double max_norm,
                                                          double* norm, double* coef, const float* found_inf) {
  NK_SHARED(double, shared, [1][kWarps]);
  double sum[1] = {};
  for (int64_t i = threadIdx.x; i < count; i += kThreads) sum[0] += sq_norms[i];
  block_sum(sum, shared);
  if (threadIdx.x != 0) return;
  const double n = __builtin_sqrt(sum[0]);
  *norm = skips(found_inf) ? __builtin_nan("") : n;
  *coef = nk::clip_coef(n, max_norm);
}

}  // namespace nk::cuda
