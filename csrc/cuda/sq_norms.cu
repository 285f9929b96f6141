// sq_norms.cu - the launches of sq_norms.cuh, on the caller's stream. Includes no standard library.
#include "sq_norms.cuh"

#include "current.h"
#include "kernels.h"

namespace nk::cuda {
namespace {

bool same_kernel(const Chunk& a, const Chunk& b) {
  return a.hyper == b.hyper && a.dtype == b.dtype && !a.h == !b.h && !b.strided;
}

}  // namespace

const char* sq_norms(const Chunk* chunks, int64_t count, const Queue& queue) {
  const Current current(queue.device);
  if (current.error()) return current.error();
  const auto stream = static_cast<cudaStream_t>(queue.stream);
  Gradients table;
  for (int64_t i = 0; i < count;) {
    const Chunk& first = chunks[i];
    int64_t blocks = 0;
    if (first.strided) {
      blocks = parts(first.size);
      if (blocks > kMostBlocks) return kTooLarge;
      const StridedTensor t = strided_tensor_of(first);
      dispatch(first.dtype, [&](auto type) {
        using T = decltype(type);
        const dim3 grid((uint32_t)blocks), block(kThreads);
        if (first.h)
          NK_LAUNCH((sq_norm_strided<T, true>), grid, block, 0, stream, t, *first.hyper);
        else
          NK_LAUNCH((sq_norm_strided<T, false>), grid, block, 0, stream, t, *first.hyper);
      });
      i++;
    } else {
      table.count = 0, table.first_block[0] = 0;
      for (; i < count && table.count < kTensors && same_kernel(first, chunks[i]); i++) {
        const Chunk& c = chunks[i];
        const int64_t more = parts(c.size);
        if (more > kMostBlocks) return kTooLarge;
        if (blocks + more > kMostBlocks) break;
        table.tensors[table.count++] = {c.g, c.h, c.sums, c.size, traits_of(c.rule).is_gauged};
        table.first_block[table.count] = (uint32_t)(blocks += more);
      }
      dispatch(first.dtype, [&](auto type) {
        using T = decltype(type);
        const dim3 grid((uint32_t)blocks), block(kThreads);
        if (first.h)
          NK_LAUNCH((sq_norms<T, true>), grid, block, 0, stream, table, *first.hyper);
        else
          NK_LAUNCH((sq_norms<T, false>), grid, block, 0, stream, table, *first.hyper);
      });
    }
    if (const char* error = launched()) return error;
  }
  return nullptr;
}

const char* clip_coef(const double* sq_norms, int64_t count, double max_norm, double* norm, double* coef,
                      const float* found_inf, const Queue& queue) {
  const Current current(queue.device);
  if (current.error()) return current.error();
  NK_LAUNCH(norm_and_coef, dim3(1), dim3(kThreads), 0, static_cast<cudaStream_t>(queue.stream), sq_norms, count,
            max_norm, norm, coef, found_inf);
  return launched();
}

}  // namespace nk::cuda
