// tile.cuh - the register tile of the kernels that own dW: c_b of a few rows and columns, summed over the steps of a
// sample without leaving the registers, then squared, added to the sums over samples, which are registers too, and
// forgotten. Operands come through shared memory, a few steps at a time. Includes no standard library.
//
// Every sum has one order, that of the CPU: an element of c_b is one chain of fused multiply-adds over the steps, total
// and centred are one chain over the samples of a part.
#pragma once
#include "block.cuh"
#include "product.h"

namespace nk::cuda {

constexpr int kSteps = 16;  // of both operands in shared memory at once
// A tile is 16 x 8 threads, a warp 4 x 8: few banks for its rows, all of them for its columns. Blocks of twice as many
// threads would leave a multiprocessor of 65536 registers with one block.
constexpr int kTileRowThreads = 16, kTileColThreads = 8;
constexpr int kTileThreads = kTileRowThreads * kTileColThreads, kTileWarps = kTileThreads / kWarp;
// Blocks that a multiprocessor holds at once, at least.
template <class R> constexpr int kTilesResident = 3;
template <> constexpr int kTilesResident<double> = 2;

// Sixteen bytes of numbers.
template <class R> struct alignas(16) Quad {
  static constexpr int size = 16 / sizeof(R);
  R x[size];
};

// What a thread has of a tile, in quads.
template <class R> constexpr int kRowQuads = kTileRows<R> / kTileRowThreads / Quad<R>::size;
template <class R> constexpr int kColQuads = kTileCols<R> / kTileColThreads / Quad<R>::size;

// One step of an operand in shared memory, and an unused quad: where steps are written side by side, those of
// one column go to different banks.
template <class R, int kWidth> using Line = Quad<R>[kWidth / Quad<R>::size + 1];
template <class R> using RowLine = Line<R, kTileRows<R>>;
template <class R> using ColLine = Line<R, kTileCols<R>>;

// What a block of threads sums.
struct Task {
  uint32_t tile, part;
  int64_t group, row, col;  // of the tile
  int64_t first_sample;
  int samples, steps;  // steps of all of them together
};

template <class R> __device__ __forceinline__ Task task_of(const Product& p, uint32_t block) {
  Task t;
  t.part = block / p.tiles, t.tile = block % p.tiles;
  t.first_sample = p.first_sample(t.part);
  t.samples = (int)(p.first_sample(t.part + 1) - t.first_sample);
  t.steps = t.samples * p.steps;
  t.col = (int64_t)(t.tile % p.col_tiles) * kTileCols<R>;
  t.row = (int64_t)(t.tile / p.col_tiles % p.row_tiles) * kTileRows<R>;
  t.group = t.tile / p.col_tiles / p.row_tiles;
  return t;
}

// Of a tile's rows or columns those that the output has.
NK_HD int left(int64_t rest, int size) { return rest < size ? (int)rest : size; }

template <class R> class Tile {
 public:
  static constexpr int N = Quad<R>::size, kRows = kRowQuads<R> * N, kCols = kColQuads<R> * N;

  __device__ __forceinline__ Tile(const Product& p, const Task& task)
      : row_(threadIdx.x / kTileColThreads),
        col_(threadIdx.x % kTileColThreads),
        rows_left_(left(p.rows - task.row, kTileRows<R>)),
        cols_left_(left(p.cols - task.col, kTileCols<R>)) {
#pragma unroll
    for (int i = 0; i < kRows; i++)
#pragma unroll
      for (int j = 0; j < kCols; j++) c_[i][j] = total_[i][j] = centred_[i][j] = 0;
  }

  __device__ __forceinline__ void multiply(const RowLine<R>* rows, const ColLine<R>* cols, int from, int upto) {
#pragma unroll 4
    for (int k = from; k < upto; k++) {
      Quad<R> row[kRowQuads<R>], col[kColQuads<R>];
#pragma unroll
      for (int q = 0; q < kRowQuads<R>; q++) row[q] = rows[k][q * kTileRowThreads + row_];
#pragma unroll
      for (int q = 0; q < kColQuads<R>; q++) col[q] = cols[k][q * kTileColThreads + col_];
#pragma unroll
      for (int i = 0; i < kRows; i++)
#pragma unroll
        for (int j = 0; j < kCols; j++) c_[i][j] = fma(row[i / N].x[i % N], col[j / N].x[j % N], c_[i][j]);
    }
  }

  // The sample is complete, the n-th of its part. Returns what this thread has of |c_b|^2.
  __device__ __forceinline__ double close(int n, R share, bool squares) {
    // Outside the output zeros have met what may be infinite.
    if (rows_left_ < kTileRows<R> || cols_left_ < kTileCols<R>)
#pragma unroll
      for (int i = 0; i < kRows; i++)
#pragma unroll
        for (int j = 0; j < kCols; j++)
          if (!is_inside(i, j)) c_[i][j] = 0;
    const R minus_n = (R)-n;
    R sum = 0;
#pragma unroll
    for (int i = 0; i < kRows; i++)
#pragma unroll
      for (int j = 0; j < kCols; j++) {
        const R c = c_[i][j];
        sum = fma(c, c, sum);
        if (squares)
          YoungsCramer::add(total_[i][j], centred_[i][j], c, minus_n, share);
        else
          total_[i][j] = total_[i][j] + c;
      }
    const double all = in_range(sum) ? (double)sum : exact_sum();
#pragma unroll
    for (int i = 0; i < kRows; i++)
#pragma unroll
      for (int j = 0; j < kCols; j++) c_[i][j] = 0;
    return all;
  }

  __device__ __forceinline__ void write(const Product& p, const Task& task) const {
    const int64_t to = ((task.part * p.groups + task.group) * p.rows + task.row) * p.cols + task.col;
    write(static_cast<R*>(p.total) + to, p.cols, total_);
    if (p.centred) write(static_cast<R*>(p.centred) + to, p.cols, centred_);
  }

 private:
  __device__ __forceinline__ int row_of(int i) const { return (i / N * kTileRowThreads + row_) * N + i % N; }
  __device__ __forceinline__ int col_of(int j) const { return (j / N * kTileColThreads + col_) * N + j % N; }
  __device__ __forceinline__ bool is_inside(int i, int j) const {
    return row_of(i) < rows_left_ && col_of(j) < cols_left_;
  }

  // Squares of float leave its range where those of double do not, and the smallest are lost.
  static __device__ __forceinline__ bool in_range(double) { return true; }
  static __device__ __forceinline__ bool in_range(float sum) { return sum >= 0x1p-80f && sum <= 0x1p127f; }
  __device__ __forceinline__ double exact_sum() const {
    double sum = 0;
#pragma unroll
    for (int i = 0; i < kRows; i++)
#pragma unroll
      for (int j = 0; j < kCols; j++)
        if (c_[i][j] != 0) sum = fma((double)c_[i][j], (double)c_[i][j], sum);
    return sum;
  }

  __device__ __forceinline__ void write(R* out, int64_t cols, const R (&from)[kRows][kCols]) const {
    const bool aligned = is_aligned(out) && cols % N == 0;
#pragma unroll
    for (int i = 0; i < kRows; i++)
#pragma unroll
      for (int q = 0; q < kColQuads<R>; q++) {
        R* to = out + row_of(i) * cols + col_of(q * N);
        if (aligned && is_inside(i, q * N)) {
          R x[N];
#pragma unroll
          for (int e = 0; e < N; e++) x[e] = from[i][q * N + e];
          Pack<R>::store(to, x);
          continue;
        }
#pragma unroll
        for (int e = 0; e < N; e++)
          if (is_inside(i, q * N + e)) to[e] = from[i][q * N + e];
      }
  }

  int row_, col_;  // this thread's, in quads
  int rows_left_, cols_left_;
  R c_[kRows][kCols], total_[kRows][kCols], centred_[kRows][kCols];
};

// Where the operands are, and what the warps have of |c_b|^2: of two stretches of steps, the one that is being read and
// the one that comes.
template <class R> struct Stage {
  RowLine<R> (&rows)[2][kSteps];
  ColLine<R> (&cols)[2][kSteps];
  double (&squares)[2][kSteps][kTileWarps];
};

// `operands`: fetch() has the next steps of the task's samples on their way, put(rows, cols) writes them. The steps of
// all samples follow each other without a gap: what is in shared memory may belong to many samples, or to one.
template <class R, class Operands>
__device__ __forceinline__ void sum_samples(const Product& p, const Task& task, Operands& operands,
                                            const Stage<R>& at) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  Tile<R> tile(p, task);
  int left = p.steps;  // of the sample
  int n = 0;           // samples that are complete
  R share = 0;         // of YoungsCramer, a sample to each lane
  if (task.steps > 0) {
    operands.fetch();
    operands.put(at.rows[0], at.cols[0]);
  }
  __syncthreads();
  int now = 0;
#pragma unroll 1
  for (int step = 0; step < task.steps; step += kSteps, now ^= 1) {
    const bool more = kSteps < task.steps - step;
    if (more) operands.fetch();
    const int count = more ? kSteps : task.steps - step, before = n;
#pragma unroll 1
    for (int k = 0; k < count;) {
      const int upto = left < count - k ? k + left : count;
      tile.multiply(at.rows[now], at.cols[now], k, upto);
      left -= upto - k;
      k = upto;
      if (left > 0) continue;
      left = p.steps;
      if (n % kWarp == 0) {
        const double m = n + 1 + lane;
        share = m > 1 ? (R)(1 / (m * (m - 1))) : (R)0;
      }
      n++;
      double square[1] = {tile.close(n, __shfl_sync(kFullWarp, share, (n - 1) % kWarp), p.centred)};
      fold<1>(square);
      if (lane == 0) at.squares[now][n - 1 - before][warp] = square[0];
    }
    if (more) operands.put(at.rows[now ^ 1], at.cols[now ^ 1]);
    __syncthreads();
    if ((int)threadIdx.x < n - before) {
      double square = 0;
      for (int w = 0; w < kTileWarps; w++) square += at.squares[now][threadIdx.x][w];
      p.squares[(task.first_sample + before + threadIdx.x) * p.tiles + task.tile] = square;
    }
  }
  tile.write(p, task);
}

}  // namespace nk::cuda
