// product.cu - see product.h. Includes no standard library.
#include "product.h"

#include "block.cuh"
#include "current.h"
#include "table.cuh"

namespace nk::cuda {
namespace {

// A part that has fewer steps takes longer to write and to join than to sum.
constexpr int64_t kLeastSteps = 128;
constexpr int64_t kMostSteps = 1 << 29;

int64_t parts_of(int64_t n, int64_t size) { return (n + size - 1) / size; }
template <class X> X least(X a, X b) { return a < b ? a : b; }

// Doubles that hold one array of all parts, and leave what follows aligned.
int64_t room(DType dtype, const Product& p) {
  const int64_t size = p.parts * p.size();
  return parts_of(real_size(dtype) == 8 ? size : parts_of(size, 2), 2) * 2;
}
int64_t squares_room(const Product& p) { return parts_of(p.batch * p.tiles, 2) * 2; }

// ---- Kernels --------------------------------------------------------------------------------------------------------

template <class R>
__global__ void __launch_bounds__(kThreads) join_parts(const Product __grid_constant__ p, R* total, R* centred) {
  NK_SHARED(double, before, [kMostParts + 1]);  // samples
  NK_SHARED(double, by, [kMostParts]);
  for (int part = (int)threadIdx.x; part <= (int)p.parts; part += kThreads) {
    before[part] = (double)p.first_sample(part);
    if (part == 0 || part == (int)p.parts) continue;
    const double n = before[part], more = (double)p.first_sample(part + 1) - n;
    by[part] = 1 / (n * more * (n + more));
  }
  __syncthreads();
  const int64_t size = p.size(), i = (int64_t)blockIdx.x * kThreads + threadIdx.x;
  if (i >= size) return;
  const R *totals = static_cast<const R*>(p.total) + i, *centreds = static_cast<const R*>(p.centred) + i;
  double sum = (double)totals[0], squares = centred ? (double)centreds[0] : 0;
#pragma unroll 4
  for (int part = 1; part < (int)p.parts; part++)
    YoungsCramer::join(sum, squares, (double)totals[part * size], centred ? (double)centreds[part * size] : 0.0,
                       before[part], before[part + 1] - before[part], by[part]);
  total[i] = (R)sum;
  if (centred) centred[i] = (R)squares;
}

// A block per sample: each thread takes every so many tiles, in their order, then the block adds up.
__global__ void __launch_bounds__(kThreads) add_squares(const Product __grid_constant__ p, double* sq_norms) {
  NK_SHARED(double, shared, [1][kWarps]);
  const double* squares = p.squares + (int64_t)blockIdx.x * p.tiles;
  double sum[1] = {};
  for (uint32_t tile = threadIdx.x; tile < p.tiles; tile += kThreads) sum[0] += squares[tile];
  block_sum(sum, shared);
  if (threadIdx.x == 0) sq_norms[blockIdx.x] = sum[0];
}

template <class R> void launch_join(const Product& p, const SampleSums& sums, uint32_t blocks, cudaStream_t stream) {
  NK_LAUNCH(join_parts<R>, dim3(blocks), dim3(kThreads), 0, stream, p, static_cast<R*>(sums.total),
            static_cast<R*>(sums.centred));
}

}  // namespace

const char* cut(DType dtype, int64_t batch, int64_t steps, int64_t groups, int64_t rows, int64_t cols, Product& p) {
  const bool is_double = real_size(dtype) == 8;
  const int64_t row_tiles = parts_of(rows, is_double ? kTileRows<double> : kTileRows<float>),
                col_tiles = parts_of(cols, is_double ? kTileCols<double> : kTileCols<float>),
                tiles = groups * row_tiles * col_tiles;
  if (steps > kMostSteps) return "a sample has more than 2^29 steps";
  if (tiles > kMostBlocks || batch > kMostBlocks)
    return "there are more tiles, or samples, than a grid of blocks takes";
  const int64_t all = batch * steps;
  int64_t parts = tiles ? kMostParts / tiles : 1;
  parts = least(least(parts, batch), all / kLeastSteps);
  if (parts < parts_of(all, kMostSteps)) parts = parts_of(all, kMostSteps);
  if (parts < 1) parts = 1;
  if (parts > kMostParts || parts * tiles > kMostBlocks) return "there are more steps than a grid of blocks takes";
  p = {batch,           groups,          rows,    cols,    (int)steps, (uint32_t)row_tiles, (uint32_t)col_tiles,
       (uint32_t)tiles, (uint32_t)parts, nullptr, nullptr, nullptr};
  return nullptr;
}

int64_t scratch_size(DType dtype, const Product& p, bool squares) {
  return squares_room(p) + (p.parts > 1 ? (squares ? 2 : 1) * room(dtype, p) : 0);
}

void place(DType dtype, const SampleSums& sums, Product& p) {
  p.squares = sums.scratch;
  p.total = sums.total, p.centred = sums.centred;
  if (p.parts == 1) return;
  p.total = sums.scratch + squares_room(p);
  if (sums.centred) p.centred = sums.scratch + squares_room(p) + room(dtype, p);
}

const char* finish(DType dtype, const Product& p, const SampleSums& sums, const Queue& queue) {
  const auto stream = static_cast<cudaStream_t>(queue.stream);
  const int64_t blocks = parts_of(p.size(), kThreads);
  if (p.parts > 1 && blocks > 0) {
    if (real_size(dtype) == 8)
      launch_join<double>(p, sums, (uint32_t)blocks, stream);
    else
      launch_join<float>(p, sums, (uint32_t)blocks, stream);
    if (const char* error = launched()) return error;
  }
  if (p.batch == 0) return nullptr;
  Product squares = p;
  if (p.steps == 0) squares.tiles = 0;  // no tile has written any
  NK_LAUNCH(add_squares, dim3((uint32_t)p.batch), dim3(kThreads), 0, stream, squares, sums.sq_norms);
  return launched();
}

}  // namespace nk::cuda
