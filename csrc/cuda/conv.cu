// conv.cu - the launches of conv.cuh. Includes no standard library.
#include "conv.cuh"

#include "current.h"
#include "kernels.h"

namespace nk::cuda {
namespace {

template <class T> void launch(const ConvProduct& p, cudaStream_t stream) {
  NK_LAUNCH(conv_products<T>, dim3(p.product.tiles * p.product.parts), dim3(kTileThreads), 0, stream, p);
}

int64_t volume(const int64_t (&n)[3]) { return n[0] * n[1] * n[2]; }

const char* cut(const Conv& c, Product& p) {
  const int64_t cols = c.inputs * volume(c.kernel), positions = volume(c.out);
  const bool is_empty = c.batch * positions * c.groups * c.outputs * cols == 0 || volume(c.in) == 0;
  return cut(c.dtype, c.batch, is_empty ? 0 : positions, c.groups, c.outputs, cols, p);
}

const char* set_numbers(const Conv& c, ConvProduct& p) {
  if (volume(c.kernel) > kMostExtent) return "a kernel has more than 2^28 taps";
  for (int d = 0; d < 3; d++) {
    const int64_t reach = (c.out[d] - 1) * c.stride[d] + (c.kernel[d] - 1) * c.dilation[d] + 1;
    if (c.in[d] > kMostExtent || c.out[d] > kMostExtent || reach > kMostExtent)
      return "a space dimension has more than 2^28 positions, or a column reaches over more";
    p.in[d] = (int)c.in[d], p.out[d] = (int)c.out[d], p.kernel[d] = (int)c.kernel[d];
    p.stride[d] = (int)c.stride[d], p.padding[d] = (int)c.padding[d], p.dilation[d] = (int)c.dilation[d];
    p.x_space[d] = d < 2 ? c.x_space[d] : 1, p.g_space[d] = d < 2 ? c.g_space[d] : 1;
  }
  p.x = c.x, p.g = c.g, p.inputs = c.inputs;
  p.x_sample = c.x_sample, p.x_channel = c.x_channel, p.g_sample = c.g_sample, p.g_channel = c.g_channel;
  int64_t rest = p.product.steps ? kSteps : 0;
  for (int d = 2; d >= 0; d--) {
    p.next[d] = rest ? (int)(rest % c.out[d]) : 0;
    rest = rest ? rest / c.out[d] : 0;
  }
  p.next_sample = (int)rest;
  if (p.product.steps == 0)
    for (int& n : p.out) n = 1;  // no division by zero
  return nullptr;
}

}  // namespace

int64_t conv_scratch(const Conv& c) {
  Product p;
  return cut(c, p) ? 0 : scratch_size(c.dtype, p, c.sums.centred);
}

const char* conv_moments(const Conv& c, const Queue& queue) {
  ConvProduct p;
  if (const char* error = cut(c, p.product)) return error;
  if (const char* error = set_numbers(c, p)) return error;
  const Current current(queue.device);
  if (current.error()) return current.error();
  place(c.dtype, c.sums, p.product);
  if (p.product.tiles > 0) {
    const auto stream = static_cast<cudaStream_t>(queue.stream);
    dispatch(c.dtype, [&](auto type) { launch<decltype(type)>(p, stream); });
    if (const char* error = launched()) return error;
  }
  return finish(c.dtype, p.product, c.sums, queue);
}

}  // namespace nk::cuda
