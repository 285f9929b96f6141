// row_sums.cuh - the sums of a matrix's rows, or of their squares, in double. Includes no standard library.
//
// A long row is cut into parts, a block each, whose sums are lines of scratch memory: one number of every row.
#pragma once
#include "../core/backend.h"
#include "block.cuh"

namespace nk::cuda {

NK_HD bool has_short_rows(const RowSums& r) { return r.columns < 4096; }  // a row is a warp's, not a block's
NK_HD int64_t parts(const RowSums& r) { return r.columns <= kChunk ? 1 : (r.columns + kChunk - 1) / kChunk; }

template <bool kSquares> __device__ __forceinline__ double with(double sum, double x) {
  return kSquares ? fma(x, x, sum) : sum + x;
}

// Of numbers [0, size), by `threads` threads, of which this is number `thread`.
template <class T, bool kSquares>
__device__ __forceinline__ double sum_of(const T* x, int size, int thread, int threads) {
  constexpr int N = Pack<T>::size, kTogether = 4;
  const int packed = is_aligned(x) ? size / N * N : 0;
  double sums[kTogether] = {};
#pragma unroll 1
  for (int i = thread * N; i < packed; i += kTogether * threads * N) {
    Pack<T> held[kTogether];
#pragma unroll
    for (int j = 0; j < kTogether; j++)
      if (i + j * threads * N < packed) held[j].load(x + i + j * threads * N);
#pragma unroll
    for (int j = 0; j < kTogether; j++) {
      if (i + j * threads * N >= packed) continue;
      Real<T> value[N];
      held[j].unpack(value);
#pragma unroll
      for (int k = 0; k < N; k++) sums[j] = with<kSquares>(sums[j], (double)value[k]);
    }
  }
#pragma unroll 1
  for (int i = packed + thread; i < size; i += kTogether * threads)
#pragma unroll
    for (int j = 0; j < kTogether; j++)
      if (i + j * threads < size) sums[j] = with<kSquares>(sums[j], (double)real(x[i + j * threads]));
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

template <class T, bool kSquares>
__global__ void __launch_bounds__(kThreads, 4) row_sums(const RowSums __grid_constant__ r, double* out) {
  NK_SHARED(double, shared, [1][kWarps]);
  const bool is_short = has_short_rows(r);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t part = is_short ? 0 : blockIdx.x / r.rows;
  const int64_t row = is_short ? (int64_t)blockIdx.x * kWarps + warp : blockIdx.x - part * r.rows;
  if (row >= r.rows) return;  // a warp of a block that needs no barrier
  const int64_t begin = part * kChunk, left = r.columns - begin;
  const T* x = static_cast<const T*>(r.x) + row * r.row_stride + begin;
  double sum[1] = {sum_of<T, kSquares>(x, (int)(left < kChunk ? left : kChunk), is_short ? lane : (int)threadIdx.x,
                                       is_short ? kWarp : kThreads)};
  if (is_short)
    warp_sum(sum);
  else
    block_sum(sum, shared);
  if (is_short ? lane == 0 : threadIdx.x == 0) out[part * r.rows + row] = sum[0];
}

}  // namespace nk::cuda
