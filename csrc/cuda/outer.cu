// outer.cu - the launches of outer.cuh. Includes no standard library.
#include "outer.cuh"

#include "current.h"
#include "kernels.h"

namespace nk::cuda {
namespace {

Matrices matrices(const void* x, int64_t sample, int64_t step, int64_t steps) {
  const int64_t samples_on = steps ? kSteps / steps : 0, steps_on = steps ? kSteps % steps : 0;
  return {x, sample, step, samples_on * sample + steps_on * step, sample - steps * step};
}

template <class T> void launch(const OuterProduct& p, cudaStream_t stream) {
  NK_LAUNCH(outer_products<T>, dim3(p.product.tiles * p.product.parts), dim3(kTileThreads), 0, stream, p);
}

const char* cut(const Outer& o, Product& p) {
  // Without a step there is nothing to read, and zeros to write.
  const bool is_empty = o.batch * o.steps * o.outputs * o.inputs == 0;
  return cut(o.dtype, o.batch, is_empty ? 0 : o.steps, 1, o.outputs, o.inputs, p);
}

}  // namespace

int64_t outer_scratch(const Outer& o) {
  Product p;
  return cut(o, p) ? 0 : scratch_size(o.dtype, p, o.sums.centred);
}

const char* outer_moments(const Outer& o, const Queue& queue) {
  OuterProduct p;
  if (const char* error = cut(o, p.product)) return error;
  const Current current(queue.device);
  if (current.error()) return current.error();
  place(o.dtype, o.sums, p.product);
  p.g = matrices(o.g, o.g_sample, o.g_step, p.product.steps);
  p.a = matrices(o.a, o.a_sample, o.a_step, p.product.steps);
  p.next_step = p.product.steps ? kSteps % p.product.steps : 0;
  if (p.product.tiles > 0) {
    const auto stream = static_cast<cudaStream_t>(queue.stream);
    dispatch(o.dtype, [&](auto type) { launch<decltype(type)>(p, stream); });
    if (const char* error = launched()) return error;
  }
  return finish(o.dtype, p.product, o.sums, queue);
}

}  // namespace nk::cuda
