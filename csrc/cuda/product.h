// product.h - how the kernels that own dW cut their output and their samples, from the shapes alone: no sum depends on
// the GPU.
#pragma once
#include "../core/backend.h"

namespace nk::cuda {

// As much as the registers of a block of threads hold three times: c_b, total and centred.
template <class R> constexpr int kTileRows = 64;
template <class R> constexpr int kTileCols = 64;
template <> constexpr int kTileCols<double> = 32;

// Of each group a matrix, in tiles; the samples in parts, one after another.
struct Product {
  int64_t batch, groups, rows, cols;  // rows and columns of a group's
  int steps;                          // of a sample
  uint32_t row_tiles, col_tiles, tiles, parts;
  void *total, *centred;  // (parts, groups, rows, cols); centred null: not wanted
  double* squares;        // (batch, tiles)

  NK_HD int64_t size() const { return groups * rows * cols; }
  NK_HD int64_t first_sample(int64_t part) const { return batch * part / parts; }
};

// Parts that one kernel joins. As many blocks as three on each multiprocessor of the largest GPUs.
constexpr int kMostParts = 396;

// Null, or why no kernel takes it. `steps` of a sample.
const char* cut(DType, int64_t batch, int64_t steps, int64_t groups, int64_t rows, int64_t cols, Product&);
// Numbers of float64 that blocks leave each other.
int64_t scratch_size(DType, const Product&, bool squares);
// Where the blocks of the product put their sums: the results themselves, or scratch.
void place(DType, const SampleSums&, Product&);
// After them: joins the parts, in their order, and adds the tiles' squares.
const char* finish(DType, const Product&, const SampleSums&, const Queue&);

}  // namespace nk::cuda
