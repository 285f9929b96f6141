// kernels.h - the functions of this back end: see cuda::Kernels in backend.h.
#pragma once
#include "../core/backend.h"

namespace nk::cuda {

const char* run(const Chunk* chunks, int64_t count, const Queue&);
const char* sq_norms(const Chunk* chunks, int64_t count, const Queue&);
const char* clip_coef(const double* sq_norms, int64_t count, double max_norm, double* norm, double* coef,
                      const float* found_inf, const Queue&);
const char* count_steps(const Count* counts, int64_t count, const float* found_inf, const Queue&);
const char* add_parts(const SlotParts* slots, int64_t count, int columns, const float* found_inf, const Queue&);
const char* fill_nan(double* table, int64_t size, const float* found_inf, const Queue&);

int64_t outer_scratch(const Outer&);
const char* outer_moments(const Outer&, const Queue&);
int64_t conv_scratch(const Conv&);
const char* conv_moments(const Conv&, const Queue&);
int64_t moments_scratch(const Moments&);
const char* moments(const Moments&, const Queue&);
int64_t row_sums_scratch(const RowSums&);
const char* row_sums(const RowSums&, const Queue&);
const char* norm_sums(const NormBatch&, const Queue&);
int64_t embedding_scratch(const EmbeddingBatch&);
const char* embedding_moments(const EmbeddingBatch&, const Queue&);

int architectures(int* capabilities, int room);

}  // namespace nk::cuda
