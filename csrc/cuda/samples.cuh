// samples.cuh - the kernels over samples, and their launches for one storage type.
#pragma once
#include "embedding.cuh"
#include "moments.cuh"
#include "norm_sums.cuh"
#include "row_sums.cuh"

namespace nk::cuda {

enum class Reads : uint8_t { packs, singles };

template <class T> struct SampleKernels {  // of one storage type; samples.cu
  static void moments(Reads, bool squares, uint32_t blocks, cudaStream_t, const MatrixTable&, const Walk&);
  static void norm_columns(Reads, uint32_t blocks, cudaStream_t, const NormBatch&, int64_t first_tile, int64_t tiles);
  static void norm_rows(uint32_t blocks, cudaStream_t, const NormBatch&);
  static void row_sums(uint32_t blocks, cudaStream_t, const RowSums&, double* out);
  static void embedding(Reads, bool squares, uint32_t blocks, cudaStream_t, const EmbeddingBatch&, const Stretches&);
};

}  // namespace nk::cuda
