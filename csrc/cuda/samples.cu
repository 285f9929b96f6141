// samples.cu - ops over samples that have no kernels yet.
#include "../backend.h"

namespace nk::cuda {
namespace {
constexpr const char* kMissing = "this op has no CUDA kernel yet";
}

int64_t moments_scratch(const Moments&) { return 0; }
const char* moments(const Moments&, const Queue&) { return kMissing; }
const char* norm_sums(const NormBatch&, const Queue&) { return kMissing; }
int64_t embedding_scratch(const EmbeddingBatch&) { return 0; }
const char* embedding_moments(const EmbeddingBatch&, const Queue&) { return kMissing; }

}  // namespace nk::cuda
