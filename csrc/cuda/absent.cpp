// absent.cpp - the CUDA back end of a binary that has none: tensors.cpp lets no CUDA tensor through.
#include "../backend.h"

namespace nk::cuda {
namespace {
constexpr const char* kAbsent = "this build of normkern has no CUDA kernels";
}

const char* run(const Chunk*, int64_t, const Queue&) { return kAbsent; }
const char* sq_norms(const Chunk*, int64_t, const Queue&) { return kAbsent; }
const char* clip_coef(const double*, int64_t, double, double*, double*, const float*, const Queue&) { return kAbsent; }
const char* add_parts(const SlotParts*, int64_t, int, const float*, const Queue&) { return kAbsent; }
const char* fill_nan(double*, int64_t, const float*, const Queue&) { return kAbsent; }
int64_t outer_scratch(const Outer&) { return 0; }
const char* outer_moments(const Outer&, const Queue&) { return kAbsent; }
int64_t conv_scratch(const Conv&) { return 0; }
const char* conv_moments(const Conv&, const Queue&) { return kAbsent; }
int64_t moments_scratch(const Moments&) { return 0; }
const char* moments(const Moments&, const Queue&) { return kAbsent; }
int64_t row_sums_scratch(const RowSums&) { return 0; }
const char* row_sums(const RowSums&, const Queue&) { return kAbsent; }
const char* norm_sums(const NormBatch&, const Queue&) { return kAbsent; }
int64_t embedding_scratch(const EmbeddingBatch&) { return 0; }
const char* embedding_moments(const EmbeddingBatch&, const Queue&) { return kAbsent; }
int architectures(int*, int) { return 0; }

}  // namespace nk::cuda
