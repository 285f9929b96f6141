// embedding.cuh - the rows of an embedding's table: the sum of a row's gradients, their spread over samples, and the
// samples' norms.
//
// A warp takes a stretch of columns of one row, and the row's positions in their order: the CPU's bits. What it adds to
// a sample's norm it leaves in scratch memory, at the first position of the sample that has the id; every other
// position of the row gets a zero, so that the sums of a sample's positions are what is asked for. Includes no standard
// library.
#pragma once
#include "columns.cuh"

namespace nk::cuda {

NK_HD int64_t pieces(int64_t n, int64_t size) { return (n + size - 1) / size; }

// Stretches of columns of which a launch takes those from `first` on.
struct Stretches {
  int64_t first, count;
  double* squares;  // (count, positions) of the first of them
};

// Which sample a position is of. In 32 bits where they are enough: in 64 a division is longer than the rest.
__device__ __forceinline__ int64_t sample_of(int64_t position, int64_t positions) {
  if (((uint64_t)position | (uint64_t)positions) >> 32 == 0) return (uint32_t)position / (uint32_t)positions;
  return position / positions;
}

template <class T, bool kSquares, class Columns>
__device__ __forceinline__ void embedding_row(const EmbeddingBatch& e, int64_t row, int64_t stretch,
                                              const Columns& columns, double* squares) {
  using R = Real<T>;
  constexpr int N = Columns::kEach, kAhead = 4;  // positions whose gradients are on their way at once
  const int lane = threadIdx.x % kWarp;
  const int64_t begin = e.begin[row], end = row == e.padding ? begin : e.begin[row + 1];
  const T* g = static_cast<const T*>(e.g);
  double total[N] = {}, centred[N] = {}, one[N] = {};
  int64_t n = 0, sample = -1, place = 0;  // of the sample that is being summed: its position that keeps the square

  const auto add_sample = [&] {
    n++;
    const double minus_n = -(double)n, share = n > 1 ? 1 / ((double)n * (double)(n - 1)) : 0;
    double square[1] = {};
#pragma unroll
    for (int k = 0; k < N; k++) {
      square[0] = fma(one[k], one[k], square[0]);
      if (n == 1)
        YoungsCramer::first(total[k], centred[k], one[k]);
      else if constexpr (kSquares)
        YoungsCramer::add(total[k], centred[k], one[k], minus_n, share);
      else
        total[k] = total[k] + one[k];
    }
    warp_sum(square);
    if (lane == 0) squares[place] = square[0];
  };

#pragma unroll 1
  for (int64_t i = begin; i < end; i += kAhead) {
    int64_t at[kAhead], samples[kAhead];
    typename Columns::Held held[kAhead];
#pragma unroll
    for (int j = 0; j < kAhead; j++) {
      if (i + j >= end) continue;
      at[j] = e.order[i + j];
      const int64_t b = samples[j] = sample_of(at[j], e.positions);
      columns.load(held[j], g + b * e.sample_stride + (at[j] - b * e.positions) * e.position_stride);
    }
#pragma unroll
    for (int j = 0; j < kAhead; j++) {
      if (i + j >= end) continue;
      R value[N];
      Columns::unpack(held[j], value);
      if (samples[j] != sample) {
        if (sample >= 0) add_sample();
        sample = samples[j], place = at[j];
#pragma unroll
        for (int k = 0; k < N; k++) one[k] = (double)value[k];
      } else {
        if (lane == 0) squares[at[j]] = 0;
#pragma unroll
        for (int k = 0; k < N; k++) one[k] = one[k] + (double)value[k];
      }
    }
  }
  if (sample >= 0) add_sample();

  const double others = n > 0 ? 1 / (double)n - 1 / (double)e.samples : 0;
#pragma unroll
  for (int k = 0; k < N; k++) {
    const int64_t column = stretch * Columns::kTile + Columns::column(k);
    if (column >= e.columns) continue;
    static_cast<R*>(e.total)[row * e.columns + column] = (R)total[k];
    if constexpr (kSquares) {
      if (n > 0) YoungsCramer::add_zeros(total[k], centred[k], others);
      static_cast<R*>(e.centred)[row * e.columns + column] = (R)centred[k];
    }
  }
}

template <class T, bool kSquares>
__global__ void __launch_bounds__(kThreads, 2)
    embedding_in_packs(const EmbeddingBatch __grid_constant__ e, const Stretches __grid_constant__ stretches) {
  const int64_t unit = (int64_t)blockIdx.x * kWarps + threadIdx.x / kWarp;
  const int64_t row = unit / stretches.count, at = unit - row * stretches.count, stretch = stretches.first + at;
  if (row >= e.table_rows) return;
  embedding_row<T, kSquares>(e, row, stretch, Packs<T>(stretch, e.columns),
                             stretches.squares + at * e.samples * e.positions);
}

template <class T, bool kSquares>
__global__ void __launch_bounds__(kThreads, 2)
    embedding_one_by_one(const EmbeddingBatch __grid_constant__ e, const Stretches __grid_constant__ stretches) {
  const int64_t unit = (int64_t)blockIdx.x * kWarps + threadIdx.x / kWarp;
  const int64_t row = unit / stretches.count, at = unit - row * stretches.count, stretch = stretches.first + at;
  if (row >= e.table_rows) return;
  embedding_row<T, kSquares>(e, row, stretch, Singles<T>(stretch, e.columns),
                             stretches.squares + at * e.samples * e.positions);
}

}  // namespace nk::cuda
