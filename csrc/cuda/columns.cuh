// columns.cuh - a tile of a matrix: a few columns for each lane of a warp, and sums down them in the CPU's order.
//
// The warps of a block share a tile's rows, kTogether of them each, turn after turn. What they sum is added by the
// thread that owns the column, in the order of the rows: the bits do not depend on how many warps there are.
#pragma once
#include "../core/backend.h"
#include "block.cuh"

namespace nk::cuda {

// How columns that do not lie side by side are found: counted in these dimensions, the last one fastest.
struct Walk {
  static constexpr int kDims = 64;  // torch's own limit
  int ndim;                         // 0: side by side
  int64_t shape[kDims], strides[kDims];

  __device__ int64_t offset(int64_t column) const {
    if (ndim == 0) return column;
    int64_t at = 0;
    for (int d = ndim - 1; d >= 0; d--) {
      const int64_t rest = d == 0 ? 0 : column / shape[d];
      at += (column - rest * shape[d]) * strides[d];
      column = rest;
    }
    return at;
  }
};

// A lane's columns, of tiles that are whole and in packs of 16 bytes.
template <class T> struct Packs {
  static constexpr int kEach = Pack<T>::size, kTile = kWarp * kEach;
  using Held = Pack<T>;

  __device__ Packs(int64_t tile, int64_t) : first_(tile * kTile + (threadIdx.x % kWarp) * kEach) {}
  __device__ static int column(int k) { return (threadIdx.x % kWarp) * kEach + k; }  // of the tile
  __device__ void load(Held& to, const T* row) const { to.load(row + first_); }
  __device__ static void unpack(const Held& from, Real<T>* x) { from.unpack(x); }

 private:
  int64_t first_;
};

// Of tiles of any width, anywhere. Columns that are not there are zeros.
template <class T> struct Singles {
  static constexpr int kEach = 2, kTile = kWarp * kEach;
  struct Held {
    T x[kEach];
  };

  __device__ Singles(int64_t tile, int64_t columns) : Singles(tile, columns, [](int64_t column) { return column; }) {}
  template <class Offset> __device__ Singles(int64_t tile, int64_t columns, Offset offset) {
#pragma unroll
    for (int k = 0; k < kEach; k++) {
      const int64_t at = tile * kTile + column(k);
      offsets_[k] = at < columns ? offset(at) : -1;
    }
  }
  __device__ static int column(int k) { return k * kWarp + threadIdx.x % kWarp; }
  __device__ void load(Held& to, const T* row) const {
#pragma unroll
    for (int k = 0; k < kEach; k++) to.x[k] = offsets_[k] >= 0 ? row[offsets_[k]] : T{};
  }
  __device__ static void unpack(const Held& from, Real<T>* x) {
#pragma unroll
    for (int k = 0; k < kEach; k++) x[k] = real(from.x[k]);
  }

 private:
  int64_t offsets_[kEach];
};

// Adds sums of rows [begin, end), at most a group, to those of column threadIdx.x, which this thread owns if the tile
// has so many. each(turn, first, count, s) adds `count` rows from `first` on, none, one or kTogether of them, to zeros
// s[sum][k] of this lane's columns.
template <int kTogether, class Columns, class R, int kSums, class Each>
__device__ __forceinline__ void add_group(int64_t begin, int64_t end, R (&own)[kSums],
                                          R (&shared)[kSums][kWarps][Columns::kTile], Each each) {
  const int warp = threadIdx.x / kWarp;
  const int rows = (int)(end - begin), whole = rows / kTogether, all = whole + rows % kTogether;
#pragma unroll 1
  for (int turn = 0; turn < all; turn += kWarps) {
    const int i = turn + warp, count = i < whole ? kTogether : i < all ? 1 : 0;
    R s[kSums][Columns::kEach] = {};
    each(turn, begin + (i < whole ? i * kTogether : (kTogether - 1) * whole + i), count, s);
    if (count > 0)
#pragma unroll
      for (int j = 0; j < kSums; j++)
#pragma unroll
        for (int k = 0; k < Columns::kEach; k++) shared[j][warp][Columns::column(k)] = s[j][k];
    __syncthreads();
    if (threadIdx.x < Columns::kTile)
#pragma unroll
      for (int w = 0; w < kWarps; w++)
#pragma unroll
        for (int j = 0; j < kSums; j++)
          if (turn + w < all) own[j] = own[j] + shared[j][w][threadIdx.x];
    __syncthreads();
  }
}

}  // namespace nk::cuda
