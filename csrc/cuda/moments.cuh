// moments.cuh - down the rows of matrices: means, squared deviations, and the rows' norms, in one pass over them.
//
// A block takes a tile of columns and all rows. What its columns say of a row goes to scratch memory, a line of
// rows + 2 numbers for each tile, and is added up afterwards. Includes no standard library.
#pragma once
#include "columns.cuh"
#include "table.cuh"

namespace nk::cuda {

struct Matrix {
  const void* x;
  int64_t row_stride, columns;
  void *mean, *centred;  // in the arithmetic type
};

struct MatrixTable {
  int count;
  uint32_t first_block[kTensors + 1];
  Matrix matrices[kTensors];
  int64_t rows;
  double factor;
  double* lines;  // of the first block's tile
};

// A column that float arithmetic cannot hold, in double and in the order of the rows that the tile's columns have.
template <bool kSquares, class Value>
__device__ void moments_in_double(int64_t rows, Value value, double& mean, double& centred) {
  using M = GroupMoments;
  const int64_t few = rows < M::kFirst ? rows : M::kFirst;
  const double x = value(0);
  double s = 0;
  for (int64_t r = 1; r < few; r++) s = s + (value(r) - x);
  double shift = M::first_shift(x, s, 1 / (double)few, 0.0);
  mean = shift, centred = 0;
  for (int64_t r = 0; r < rows;) {
    const int64_t begin = r, end = r + M::kRows < rows ? r + M::kRows : rows;
    double sum = 0, squares = 0;
    while (r < end) {
      const int64_t past = r + (r + M::kTogether <= end ? M::kTogether : 1);
      double some = 0, some_squares = 0;
      for (; r < past; r++) M::add<kSquares>(some, some_squares, shift, value(r));
      sum = sum + some;
      squares = squares + some_squares;
    }
    const double n0 = (double)begin, n1 = (double)(end - begin);
    M::join(mean, centred, shift, sum, squares, 1 / n1, n1 / (n0 + n1), n0 * n1 / (n0 + n1));
    shift = finite_or(mean, 0.0);
  }
}

__device__ inline bool is_finite(double x) { return x - x == 0; }

template <class T, bool kSquares, class Columns>
__device__ __forceinline__ void moments_of_tile(const Matrix& m, const MatrixTable& table, int64_t tile,
                                                const Columns& columns, const Walk& walk) {
  using M = GroupMoments;
  using R = Real<T>;
  constexpr int kSums = kSquares ? 2 : 1, N = Columns::kEach;
  NK_SHARED(R, sums, [kSums][kWarps][Columns::kTile]);
  NK_SHARED(R, shifts, [Columns::kTile]);
  NK_SHARED(double, totals, [3][kWarps]);
  NK_SHARED(double, kept, [2][Columns::kTile]);  // of groups: mean and squares; in registers they would be spilled
  NK_SHARED(int, again, [1]);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t rows = table.rows, column = tile * Columns::kTile + threadIdx.x;
  const bool owns = threadIdx.x < Columns::kTile && column < m.columns;
  const T* x = static_cast<const T*>(m.x);
  double* line = table.lines + blockIdx.x * (rows + 2);
  bool any = false;  // a row's norm is not 0

#pragma unroll 1
  for (int64_t begin = 0; begin < rows; begin += M::kRows) {
    const int64_t end = begin + M::kRows < rows ? begin + M::kRows : rows;
    R own[kSums] = {};
    add_group<M::kTogether, Columns>(begin, end, own, sums, [&](int turn, int64_t first, int count, R(&s)[kSums][N]) {
      const bool starts = begin == 0 && turn == 0;
      const int few = rows < M::kFirst ? (int)rows : M::kFirst, held = starts && warp == 0 ? few : count;
      typename Columns::Held of_row[M::kTogether];
#pragma unroll
      for (int r = 0; r < M::kTogether; r++)
        if (r < held) columns.load(of_row[r], x + (first + r) * m.row_stride);
      R value[N];
      if (starts) {
        if (warp == 0) {
          R from[N], sum[N] = {};
          Columns::unpack(of_row[0], from);
#pragma unroll
          for (int r = 1; r < M::kFirst; r++) {
            if (r >= held) continue;
            Columns::unpack(of_row[r], value);
#pragma unroll
            for (int k = 0; k < N; k++) sum[k] = sum[k] + (value[k] - from[k]);
          }
          const R share = (R)(1 / (double)few);
#pragma unroll
          for (int k = 0; k < N; k++) shifts[Columns::column(k)] = M::first_shift(from[k], sum[k], share, R(0));
        }
        __syncthreads();
      }
      double norms[M::kTogether] = {};
      constexpr int kAtOnce = 2;  // columns: what is known of more of them would be spilled
#pragma unroll
      for (int k0 = 0; k0 < N; k0 += kAtOnce) {
        R shift[kAtOnce];
#pragma unroll
        for (int k = 0; k < kAtOnce; k++) shift[k] = shifts[Columns::column(k0 + k)];
#pragma unroll
        for (int r = 0; r < M::kTogether; r++) {
          if (r >= count) continue;
          Columns::unpack(of_row[r], value);
#pragma unroll
          for (int k = 0; k < kAtOnce; k++) {
            const R v = value[k0 + k];
            M::add<kSquares>(s[0][k0 + k], s[kSums - 1][k0 + k], shift[k], v);
            norms[r] = fma((double)v, (double)v, norms[r]);
          }
        }
      }
      fold<M::kTogether>(norms);
#pragma unroll
      for (int r = 0; r < M::kTogether; r++)
        if (r < count && lane == lane_of<M::kTogether>(r)) line[first + r] = norms[0];
      any = any || norms[0] != 0;
    });
    if (threadIdx.x < Columns::kTile) {
      const double shift = (double)shifts[threadIdx.x], n0 = (double)begin, n1 = (double)(end - begin);
      double mean = begin == 0 ? shift : kept[0][threadIdx.x], centred = begin == 0 ? 0 : kept[1][threadIdx.x];
      M::join(mean, centred, shift, (double)own[0], (double)own[kSums - 1], 1 / n1, n1 / (n0 + n1),
              n0 * n1 / (n0 + n1));
      kept[0][threadIdx.x] = mean, kept[1][threadIdx.x] = centred;
      shifts[threadIdx.x] = (R)finite_or(mean, 0.0);
    }
    __syncthreads();
  }

  double mean = owns && rows > 0 ? kept[0][threadIdx.x] : 0, centred = owns && rows > 0 ? kept[1][threadIdx.x] : 0;
  double all[3] = {owns ? mean * mean : 0, owns ? centred : 0, any ? 1.0 : 0.0};
  block_sum(all, totals);
  if constexpr (sizeof(R) == 4) {
    if (threadIdx.x == 0) {
      const int64_t width = m.columns - tile * Columns::kTile;
      const double least = M::kLeast * (double)rows * (double)(width < Columns::kTile ? width : Columns::kTile);
      const bool is_lost = kSquares && rows > 1 && !(all[1] >= least) && all[2] != 0;
      again[0] = !is_finite(all[0]) || !is_finite(all[1]) || is_lost;
    }
    __syncthreads();
    if (again[0]) {
      const T* first = owns ? x + walk.offset(column) : x;
      if (owns)
        moments_in_double<kSquares>(
            rows, [&](int64_t r) { return (double)real(first[r * m.row_stride]); }, mean, centred);
      all[0] = owns ? mean * mean : 0, all[1] = owns ? centred : 0, all[2] = 0;
      block_sum(all, totals);
    }
  }
  if (owns) {
    static_cast<R*>(m.mean)[column] = (R)mean;
    if constexpr (kSquares) static_cast<R*>(m.centred)[column] = (R)(table.factor * centred);
  }
  if (threadIdx.x == 0) {
    line[rows] = all[0];
    line[rows + 1] = kSquares ? all[1] : __builtin_nan("");
  }
}

template <class T, bool kSquares>
__global__ void __launch_bounds__(kThreads, 2)
    moments_in_packs(const MatrixTable __grid_constant__ table, const Walk __grid_constant__ walk) {
  const int i = entry_of(table, blockIdx.x);
  const int64_t tile = blockIdx.x - table.first_block[i];
  const Packs<T> columns(tile, table.matrices[i].columns);
  moments_of_tile<T, kSquares>(table.matrices[i], table, tile, columns, walk);
}

template <class T, bool kSquares>
__global__ void __launch_bounds__(kThreads, 2)
    moments_one_by_one(const MatrixTable __grid_constant__ table, const Walk __grid_constant__ walk) {
  const int i = entry_of(table, blockIdx.x);
  const int64_t tile = blockIdx.x - table.first_block[i];
  const Singles<T> columns(tile, table.matrices[i].columns, [&](int64_t column) { return walk.offset(column); });
  moments_of_tile<T, kSquares>(table.matrices[i], table, tile, columns, walk);
}

}  // namespace nk::cuda
