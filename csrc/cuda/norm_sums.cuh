// norm_sums.cuh - what the weight and bias of a normalisation layer get of each sample, in one pass over g and x.
//
// Down the columns as the CPU adds; along a row each thread takes every so many packs, then the warp or the block adds
// up. Includes no standard library.
#pragma once
#include "columns.cuh"

namespace nk::cuda {

// A tile of one sample is a block's. `tiles` of a sample, from `first_tile` on.
template <class T, class Columns>
__device__ __forceinline__ void norm_tile(const NormBatch& n, int64_t sample, int64_t tile, const Columns& columns) {
  using R = Real<T>;
  constexpr int N = Columns::kEach, kTogether = NormSums::kTogether;
  NK_SHARED(R, sums, [2][kWarps][Columns::kTile]);
  const T* g = static_cast<const T*>(n.g.x) + sample * n.g.sample_stride;
  const T* x = static_cast<const T*>(n.x.x) + sample * n.x.sample_stride;
  const R* mean = n.mean ? static_cast<const R*>(n.mean) + sample * n.rows : nullptr;
  const R* rstd = static_cast<const R*>(n.rstd) + sample * n.rows;
  double total[2] = {};
#pragma unroll 1
  for (int64_t begin = 0; begin < n.rows; begin += NormSums::kRows) {
    const int64_t end = begin + NormSums::kRows < n.rows ? begin + NormSums::kRows : n.rows;
    R own[2] = {};
    add_group<kTogether, Columns>(begin, end, own, sums, [&](int, int64_t first, int count, R(&s)[2][N]) {
      typename Columns::Held of_g[kTogether], of_x[kTogether];
#pragma unroll
      for (int r = 0; r < kTogether; r++)
        if (r < count) {
          columns.load(of_g[r], g + (first + r) * n.g.row_stride);
          columns.load(of_x[r], x + (first + r) * n.x.row_stride);
        }
#pragma unroll
      for (int r = 0; r < kTogether; r++) {
        if (r >= count) continue;
        const R m = mean ? mean[first + r] : R(0), factor = rstd[first + r];
        R a[N], b[N];
        Columns::unpack(of_g[r], a);
        Columns::unpack(of_x[r], b);
#pragma unroll
        for (int k = 0; k < N; k++) NormSums::add(s[0][k], s[1][k], a[k], b[k], m, factor);
      }
    });
    total[0] = total[0] + (double)own[0];
    total[1] = total[1] + (double)own[1];
  }
  const int64_t column = tile * Columns::kTile + threadIdx.x;
  if (threadIdx.x >= Columns::kTile || column >= n.columns) return;
  static_cast<R*>(n.of_weight)[sample * n.columns + column] = (R)total[0];
  static_cast<R*>(n.of_bias)[sample * n.columns + column] = (R)total[1];
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    norm_columns_in_packs(const NormBatch __grid_constant__ n, int64_t first_tile, int64_t tiles) {
  const int64_t sample = blockIdx.x / tiles, tile = first_tile + (blockIdx.x - sample * tiles);
  norm_tile<T>(n, sample, tile, Packs<T>(tile, n.columns));
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    norm_columns_one_by_one(const NormBatch __grid_constant__ n, int64_t first_tile, int64_t tiles) {
  const int64_t sample = blockIdx.x / tiles, tile = first_tile + (blockIdx.x - sample * tiles);
  norm_tile<T>(n, sample, tile, Singles<T>(tile, n.columns));
}

constexpr int64_t kShortRow = 4096;  // a row with fewer columns is a warp's, not a block's
NK_HD bool has_short_rows(const NormBatch& n) { return n.columns < kShortRow; }

// `threads` threads, of which this is number `thread`. A few terms in the arithmetic type, then in double.
template <class T>
__device__ __forceinline__ void norm_row(const T* g, const T* x, int64_t columns, Real<T> mean, Real<T> rstd,
                                         int thread, int threads, double (&total)[2]) {
  using R = Real<T>;
  constexpr int N = Pack<T>::size, kTogether = 2, kApart = 4;
  const int64_t packed = is_aligned(g) && is_aligned(x) ? columns / N * N : 0;
#pragma unroll 1
  for (int64_t i = thread * N; i < packed; i += kTogether * threads * N) {
    Pack<T> of_g[kTogether], of_x[kTogether];
    R weight = 0, bias = 0;
#pragma unroll
    for (int j = 0; j < kTogether; j++) {
      const int64_t at = i + j * threads * N;
      if (at >= packed) continue;
      of_g[j].load(g + at);
      of_x[j].load(x + at);
    }
#pragma unroll
    for (int j = 0; j < kTogether; j++) {
      if (i + j * threads * N >= packed) continue;
      R a[N], b[N];
      of_g[j].unpack(a);
      of_x[j].unpack(b);
#pragma unroll
      for (int k = 0; k < N; k++) NormSums::add(weight, bias, a[k], b[k], mean, rstd);
    }
    total[0] += (double)weight;
    total[1] += (double)bias;
  }
#pragma unroll 1
  for (int64_t i = packed + thread; i < columns; i += kApart * threads) {
    R a[kApart], b[kApart], weight = 0, bias = 0;
#pragma unroll
    for (int k = 0; k < kApart; k++) {
      const int64_t at = i + k * threads;
      if (at >= columns) continue;
      a[k] = real(g[at]);
      b[k] = real(x[at]);
    }
#pragma unroll
    for (int k = 0; k < kApart; k++)
      if (i + k * threads < columns) NormSums::add(weight, bias, a[k], b[k], mean, rstd);
    total[0] += (double)weight;
    total[1] += (double)bias;
  }
}

template <class T> __global__ void __launch_bounds__(kThreads, 2) norm_rows(const NormBatch __grid_constant__ n) {
  using R = Real<T>;
  NK_SHARED(double, shared, [2][kWarps]);
  const bool is_short = has_short_rows(n);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t row = is_short ? (int64_t)blockIdx.x * kWarps + warp : blockIdx.x;
  if (row >= n.samples * n.rows) return;  // a warp of a block that needs no barrier
  const int64_t sample = row / n.rows, at = row - sample * n.rows;
  const T* g = static_cast<const T*>(n.g.x) + sample * n.g.sample_stride + at * n.g.row_stride;
  const T* x = static_cast<const T*>(n.x.x) + sample * n.x.sample_stride + at * n.x.row_stride;
  const R mean = n.mean ? static_cast<const R*>(n.mean)[row] : R(0), rstd = static_cast<const R*>(n.rstd)[row];
  double total[2] = {};
  norm_row(g, x, n.columns, mean, rstd, is_short ? lane : (int)threadIdx.x, is_short ? kWarp : kThreads, total);
  if (is_short)
    warp_sum(total);
  else
    block_sum(total, shared);
  if (is_short ? lane != 0 : threadIdx.x != 0) return;
  static_cast<R*>(n.of_weight)[row] = (R)total[0];
  static_cast<R*>(n.of_bias)[row] = (R)total[1];
}

}  // namespace nk::cuda
