// samples.cu - the kernels of samples.cuh and their launches, for the storage type NK_TYPE; without it, for all of
// them.
#include "samples.cuh"

namespace nk::cuda {

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

namespace {

// The types of this object file.
#ifdef NK_TYPE
using Types = List<NK_TYPE>;
#else
using Types = StorageTypes;
#endif
template <class List> struct Functions;
template <class... All> struct Functions<List<All...>> {
  decltype(&SampleKernels<float>::moments) moments[sizeof...(All)] = {SampleKernels<All>::moments...};
  decltype(&SampleKernels<float>::norm_columns) norm_columns[sizeof...(All)] = {SampleKernels<All>::norm_columns...};
  decltype(&SampleKernels<float>::norm_rows) norm_rows[sizeof...(All)] = {SampleKernels<All>::norm_rows...};
  decltype(&SampleKernels<float>::row_sums) row_sums[sizeof...(All)] = {SampleKernels<All>::row_sums...};
  decltype(&SampleKernels<float>::embedding) embedding[sizeof...(All)] = {SampleKernels<All>::embedding...};
};
[[maybe_unused, gnu::used]] const Functions<Types> functions;  // instantiates them

}  // namespace
}  // namespace nk::cuda
