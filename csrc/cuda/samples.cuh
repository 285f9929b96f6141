// samples.cuh - the kernels over samples of one storage type, and who launches them.
#pragma once
#include "embedding.cuh"
#include "moments.cuh"
#include "norm_sums.cuh"
#include "row_sums.cuh"

namespace nk::cuda {

enum class Reads : uint8_t { packs, singles };

template <class T> struct SampleKernels {
  static void moments(Reads, bool squares, uint32_t blocks, cudaStream_t, const MatrixTable&, const Walk&);
  static void norm_columns(Reads, uint32_t blocks, cudaStream_t, const NormBatch&, int64_t first_tile, int64_t tiles);
  static void norm_rows(uint32_t blocks, cudaStream_t, const NormBatch&);
  static void row_sums(uint32_t blocks, cudaStream_t, const RowSums&, double* out);
  static void embedding(Reads, bool squares, uint32_t blocks, cudaStream_t, const EmbeddingBatch&, const Stretches&);
};

template <class T>
void SampleKernels<T>::moments(Reads reads, bool squares, uint32_t blocks, cudaStream_t stream,
                               const MatrixTable& table, const Walk& walk) {
  const dim3 grid(blocks), block(kThreads);
  if (reads == Reads::packs && squares) NK_LAUNCH((moments_in_packs<T, true>), grid, block, 0, stream, table, walk);
  if (reads == Reads::packs && !squares) NK_LAUNCH((moments_in_packs<T, false>), grid, block, 0, stream, table, walk);
  if (reads != Reads::packs && squares) NK_LAUNCH((moments_one_by_one<T, true>), grid, block, 0, stream, table, walk);
  if (reads != Reads::packs && !squares) NK_LAUNCH((moments_one_by_one<T, false>), grid, block, 0, stream, table, walk);
}

template <class T>
void SampleKernels<T>::norm_columns(Reads reads, uint32_t blocks, cudaStream_t stream, const NormBatch& n,
                                    int64_t first_tile, int64_t tiles) {
  const dim3 grid(blocks), block(kThreads);
  if (reads == Reads::packs) NK_LAUNCH((norm_columns_in_packs<T>), grid, block, 0, stream, n, first_tile, tiles);
  if (reads != Reads::packs) NK_LAUNCH((norm_columns_one_by_one<T>), grid, block, 0, stream, n, first_tile, tiles);
}

template <class T> void SampleKernels<T>::norm_rows(uint32_t blocks, cudaStream_t stream, const NormBatch& n) {
  NK_LAUNCH((nk::cuda::norm_rows<T>), dim3(blocks), dim3(kThreads), 0, stream, n);
}

template <class T>
void SampleKernels<T>::row_sums(uint32_t blocks, cudaStream_t stream, const RowSums& r, double* out) {
  const dim3 grid(blocks), block(kThreads);
  if (r.squares) NK_LAUNCH((nk::cuda::row_sums<T, true>), grid, block, 0, stream, r, out);
  if (!r.squares) NK_LAUNCH((nk::cuda::row_sums<T, false>), grid, block, 0, stream, r, out);
}

template <class T>
void SampleKernels<T>::embedding(Reads reads, bool squares, uint32_t blocks, cudaStream_t stream,
                                 const EmbeddingBatch& e, const Stretches& s) {
  const dim3 grid(blocks), block(kThreads);
  if (reads == Reads::packs && squares) NK_LAUNCH((embedding_in_packs<T, true>), grid, block, 0, stream, e, s);
  if (reads == Reads::packs && !squares) NK_LAUNCH((embedding_in_packs<T, false>), grid, block, 0, stream, e, s);
  if (reads != Reads::packs && squares) NK_LAUNCH((embedding_one_by_one<T, true>), grid, block, 0, stream, e, s);
  if (reads != Reads::packs && !squares) NK_LAUNCH((embedding_one_by_one<T, false>), grid, block, 0, stream, e, s);
}

// One translation unit each.
extern template struct SampleKernels<double>;
extern template struct SampleKernels<float>;
extern template struct SampleKernels<bf16>;
extern template struct SampleKernels<f16>;

}  // namespace nk::cuda
