// conv.cuh - the weight gradients of a convolution sample by sample: the products of outer.cuh, of which one operand is
// gathered from x as it is read. Includes no standard library.
#pragma once
#include "tile.cuh"

namespace nk::cuda {

// Three space dimensions. A step is an output position, in row-major order; a column an input channel and a tap.
struct ConvProduct {
  Product product;
  const void *x, *g;
  int64_t inputs;  // of a group
  int64_t x_sample, x_channel, x_space[3], g_sample, g_channel, g_space[3];
  int in[3], out[3], kernel[3], stride[3], padding[3], dilation[3];
  int next[3], next_sample;  // kSteps positions further
};

constexpr int kMostExtent = 1 << 28;  // of all the numbers above, and of what a column reaches over

// Of a column: from the first position of x that a step looks at, and in elements.
struct Tap {
  int64_t offset;
  int at[3];
};

__device__ __forceinline__ void set(Tap& to, const ConvProduct& p, int64_t col) {
  const int taps = p.kernel[0] * p.kernel[1] * p.kernel[2];
  const int64_t channel = col / taps;
  const int tap = (int)(col - channel * taps);
  const int at[3] = {tap / (p.kernel[1] * p.kernel[2]), tap / p.kernel[2] % p.kernel[1], tap % p.kernel[2]};
  const bool exists = col < p.product.cols;
  int64_t offset = channel * p.x_channel;
#pragma unroll
  for (int d = 0; d < 3; d++) {
    to.at[d] = exists ? at[d] * p.dilation[d] : 2 * kMostExtent;  // outside of any x
    offset += at[d] * p.dilation[d] * p.x_space[d];
  }
  to.offset = offset;
}

// A thread has one step in every kSteps, and every so many rows and columns of it: side by side lie positions.
template <class T> class ConvOperands {
  using R = Real<T>;
  static constexpr int kApart = kTileThreads / kSteps;
  static constexpr int kRows = kTileRows<R> / kApart, kCols = kTileCols<R> / kApart;

 public:
  __device__ __forceinline__ ConvOperands(const ConvProduct& p, const Task& task, const Tap* taps)
      : p_(p), taps_(taps), k_(threadIdx.x % kSteps), first_(threadIdx.x / kSteps), left_(task.steps - k_) {
    rows_left_ = left(p.product.rows - task.row, kTileRows<R>);
    g_ = static_cast<const T*>(p.g) + task.first_sample * p.g_sample +
         (task.group * p.product.rows + task.row) * p.g_channel;
    x_ = static_cast<const T*>(p.x) + task.first_sample * p.x_sample + task.group * p.inputs * p.x_channel;
    sample_ = p.product.steps > 0 ? k_ / p.product.steps : 0;
    int rest = k_ - sample_ * p.product.steps;
#pragma unroll
    for (int d = 2; d >= 0; d--) {
      at_[d] = d == 0 ? rest : rest % p.out[d];
      rest /= p.out[d];
    }
  }

  __device__ __forceinline__ void fetch() {
    const T *g = g_ + sample_ * p_.g_sample, *x = x_ + sample_ * p_.x_sample;
    int origin[3];
#pragma unroll
    for (int d = 0; d < 3; d++) {
      origin[d] = at_[d] * p_.stride[d] - p_.padding[d];
      g += at_[d] * p_.g_space[d], x += origin[d] * p_.x_space[d];
    }
    const bool exists = left_ > 0;
#pragma unroll
    for (int j = 0; j < kRows; j++) {
      const int row = first_ + j * kApart;
      rows_[j] = T{};
      if (exists && row < rows_left_) rows_[j] = g[row * p_.g_channel];
    }
#pragma unroll
    for (int j = 0; j < kCols; j++) {
      const Tap& tap = taps_[first_ + j * kApart];
      cols_[j] = T{};
      if (exists && is_inside(origin, tap)) cols_[j] = x[tap.offset];
    }
    advance();
  }

  __device__ __forceinline__ void put(RowLine<R>* rows, ColLine<R>* cols) const {
#pragma unroll
    for (int j = 0; j < kRows; j++) put(rows[k_], first_ + j * kApart, real(rows_[j]));
#pragma unroll
    for (int j = 0; j < kCols; j++) put(cols[k_], first_ + j * kApart, real(cols_[j]));
  }

 private:
  template <class Line> static __device__ __forceinline__ void put(Line& line, int i, R x) {
    line[i / Quad<R>::size].x[i % Quad<R>::size] = x;
  }

  __device__ __forceinline__ bool is_inside(const int (&origin)[3], const Tap& tap) const {
    bool inside = true;
#pragma unroll
    for (int d = 0; d < 3; d++) inside = inside && (uint32_t)(origin[d] + tap.at[d]) < (uint32_t)p_.in[d];
    return inside;
  }

  __device__ __forceinline__ void advance() {
    int carry = 0;
#pragma unroll
    for (int d = 2; d >= 0; d--) {
      at_[d] += p_.next[d] + carry;
      carry = at_[d] >= p_.out[d];
      if (carry) at_[d] -= p_.out[d];
    }
    sample_ += p_.next_sample + carry;
    left_ -= kSteps;
  }

  const ConvProduct& p_;
  const Tap* taps_;
  int k_, first_, left_, rows_left_, sample_, at_[3];
  const T *g_, *x_;
  T rows_[kRows], cols_[kCols];
};

template <class T>
__global__ void __launch_bounds__(kTileThreads, kTilesResident<Real<T>>)
    conv_products(const ConvProduct __grid_constant__ p) {
  using R = Real<T>;
  NK_SHARED(RowLine<R>, rows, [2][kSteps]);
  NK_SHARED(ColLine<R>, cols, [2][kSteps]);
  NK_SHARED(double, squares, [2][kSteps][kTileWarps]);
  NK_SHARED(Tap, taps, [kTileCols<R>]);
  NK_SHARED(Task, shared, [1]);
  const Task& task = shared[0];
  if (threadIdx.x == 0) shared[0] = task_of<R>(p.product, blockIdx.x);
  __syncthreads();
  if (threadIdx.x < kTileCols<R>) set(taps[threadIdx.x], p, task.col + threadIdx.x);
  __syncthreads();
  ConvOperands<T> operands(p, task, taps);
  sum_samples<R>(p.product, task, operands, {rows, cols, squares});
}

}  // namespace nk::cuda
