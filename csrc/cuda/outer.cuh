// outer.cuh - the per-sample outer products of a linear layer: rows of g and a as they lie in memory, sixteen bytes at
// a time. Includes no standard library.
#pragma once
#include "tile.cuh"

namespace nk::cuda {

// One operand, dense along its last dimension. Strides in elements.
struct Matrices {
  const void* x;
  int64_t sample, step;
  int64_t next, wrap;  // from a step to the one after the next kSteps, and from the end of a sample to the next
};

struct OuterProduct {
  Product product;
  Matrices g, a;
  int next_step;  // kSteps modulo the steps of a sample
};

// Of an operand the columns of one tile: a thread has packs of one step in every kSteps.
template <class T, int kWidth> class Strip {
  using R = Real<T>;
  static constexpr int N = Pack<T>::size, kThreadsPerStep = kTileThreads / kSteps;
  static constexpr int kApart = kThreadsPerStep * N, kPacks = kWidth / kApart;  // columns from one pack to the next
  static_assert(kPacks * kApart == kWidth);

 public:
  __device__ __forceinline__ Strip(const Matrices& m, int64_t sample, int step, int64_t first_col, int64_t width)
      : col_(threadIdx.x % kThreadsPerStep * N) {
    at_ = sample * m.sample + step * m.step + first_col + col_;
    left_ = left(width - first_col - col_, kWidth);
    is_packed_ = is_aligned(static_cast<const T*>(m.x) + at_) && m.sample % N == 0 && m.step % N == 0;
  }

  __device__ __forceinline__ void fetch(const Matrices& m, bool exists) {
    const T* from = static_cast<const T*>(m.x) + at_;
#pragma unroll
    for (int j = 0; j < kPacks; j++) {
      held_[j].raw = {0, 0, 0, 0};
      if (!exists) continue;
      if (is_packed_ && j * kApart + N <= left_)
        held_[j].load(from + j * kApart);
      else
        load_some(held_[j], from + j * kApart, left_ - j * kApart);
    }
  }
  __device__ __forceinline__ void advance(const Matrices& m, bool wraps) { at_ += wraps ? m.next + m.wrap : m.next; }

  __device__ __forceinline__ void put(Line<R, kWidth>& to) const {
    constexpr int kEach = Quad<R>::size;
#pragma unroll
    for (int j = 0; j < kPacks; j++) {
      R x[N];
      held_[j].unpack(x);
#pragma unroll
      for (int q = 0; q < N / kEach; q++) {
        Quad<R> quad;
#pragma unroll
        for (int e = 0; e < kEach; e++) quad.x[e] = x[q * kEach + e];
        to[(col_ + j * kApart) / kEach + q] = quad;
      }
    }
  }

 private:
  static __device__ __forceinline__ void load_some(Pack<T>& pack, const T* from, int left) {
    T values[N] = {};
#pragma unroll
    for (int e = 0; e < N; e++)
      if (e < left) values[e] = from[e];
    __builtin_memcpy(&pack.raw, values, sizeof values);
  }

  int col_, left_;
  bool is_packed_;
  int64_t at_;
  Pack<T> held_[kPacks];
};

template <class T> class OuterOperands {
  using R = Real<T>;
  static constexpr int kThreadsPerStep = kTileThreads / kSteps;

 public:
  __device__ __forceinline__ OuterOperands(const OuterProduct& outer, const Task& task)
      : outer_(outer),
        k_(threadIdx.x / kThreadsPerStep),
        left_(task.steps - k_),
        sample_(outer.product.steps > 0 ? k_ / outer.product.steps : 0),
        t_(k_ - sample_ * outer.product.steps),
        g_(outer.g, task.first_sample + sample_, t_, task.row, outer.product.rows),
        a_(outer.a, task.first_sample + sample_, t_, task.col, outer.product.cols) {}

  __device__ __forceinline__ void fetch() {
    g_.fetch(outer_.g, left_ > 0);
    a_.fetch(outer_.a, left_ > 0);
    left_ -= kSteps;
    t_ += outer_.next_step;
    const bool wraps = t_ >= outer_.product.steps;
    if (wraps) t_ -= outer_.product.steps;
    g_.advance(outer_.g, wraps);
    a_.advance(outer_.a, wraps);
  }
  __device__ __forceinline__ void put(RowLine<R>* rows, ColLine<R>* cols) const { g_.put(rows[k_]), a_.put(cols[k_]); }

 private:
  const OuterProduct& outer_;
  int k_, left_, sample_, t_;
  Strip<T, kTileRows<R>> g_;
  Strip<T, kTileCols<R>> a_;
};

template <class T>
__global__ void __launch_bounds__(kTileThreads, kTilesResident<Real<T>>)
    outer_products(const OuterProduct __grid_constant__ p) {
  using R = Real<T>;
  NK_SHARED(RowLine<R>, rows, [2][kSteps]);
  NK_SHARED(ColLine<R>, cols, [2][kSteps]);
  NK_SHARED(double, squares, [2][kSteps][kTileWarps]);
  NK_SHARED(Task, shared, [1]);
  const Task& task = shared[0];
  if (threadIdx.x == 0) shared[0] = task_of<R>(p.product, blockIdx.x);
  __syncthreads();
  OuterOperands<T> operands(p, task);
  sum_samples<R>(p.product, task, operands, {rows, cols, squares});
}

}  // namespace nk::cuda
