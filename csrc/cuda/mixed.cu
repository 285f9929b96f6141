// mixed.cu - every rule on tensors whose streams are stored differently: buffers of another type than their weights,
// master copies, weights rounded at random. Includes no standard library.
//
// One kernel for all of them, which asks at each load and store. A thread takes the coordinates that share a counter.
#include "mixed.h"

#include "../core/philox.h"

namespace nk::cuda {
namespace {

__device__ __forceinline__ float load(const void* p, DType dtype, int64_t i) {
  return dispatch_here(FloatTypes{}, dtype, [&](auto type) { return real(static_cast<const decltype(type)*>(p)[i]); });
}
// x becomes what was stored.
__device__ __forceinline__ void store(void* p, DType dtype, int64_t i, float& x) {
  dispatch_here(FloatTypes{}, dtype, [&](auto type) { static_cast<decltype(type)*>(p)[i] = stored(x, type); });
}
__device__ __forceinline__ float rounded(float x, DType dtype) {
  dispatch_here(FloatTypes{}, dtype, [&](auto type) { stored(x, type); });
  return x;
}

template <Measure kMeasure>
__global__ void __launch_bounds__(kThreads, 1)
    update_mixed(const MixedTensor __grid_constant__ mixed, const Hyper __grid_constant__ given) {
  constexpr int kTogether = RandomBits::kTogether;
  NK_SHARED(double, shared, [kSums<kMeasure>][kWarps]);
  if (skips(given.on_device.found_inf)) return;
  const Tensor& t = mixed.all.tensor;
  const Traits traits = traits_on_device(mixed.all.rule);
  const Hyper hyper = complete(given);
  const OfRules<float, Rules> rules(hyper, kMeasure == Measure::pair, t.numbers);
  const auto pair = PairCoefficients<float>::from(hyper);
  const float unkeep = (float)hyper.gauge.unkeep;
  const RandomBits random{hyper.rounding.seed, mixed.parameter, hyper.rounding.step};
  const bool small = is_small(mixed.all);
  visit<kMeasure>(t, blockIdx.x, mixed.all.columns, hyper, traits.is_gauged, shared,
                  [&](int64_t begin, int n, int thread, int threads, double* s) {
                    const int64_t end = begin + n;
                    for (int64_t counter = begin / kTogether + thread; counter * kTogether < end; counter += threads) {
                      uint32_t words[4] = {};
                      if (mixed.rounds_at_random) random.words((uint64_t)counter, words);
                      // Those of the next coordinate are the lowest 16.
                      uint64_t bits = words[0] | (uint64_t)words[1] << 32, later = words[2] | (uint64_t)words[3] << 32;
#pragma unroll 1
                      for (int k = 0; k < kTogether; k++, bits = bits >> 16 | later << 48, later >>= 16) {
                        const int64_t i = counter * kTogether + k;
                        if (i < begin || i >= end) continue;
                        int64_t at[kStreams];
                        offsets(mixed.all, i, small, at);
                        float w_old = load(t.w, mixed.dtype, at[kW]);
                        if (mixed.master_weights) {
                          const float copy = mixed.master_weights[at[kMaster]];
                          w_old = current_weight(copy, w_old, rounded(copy, mixed.dtype) == w_old);
                        }
                        float state[kMostBuffers] = {}, held = 0, first = 0, second = 0;
#pragma unroll
                        for (int b = 0; b < kMostBuffers; b++)
                          if (traits.reads_buffers && b < traits.buffers)
                            state[b] = load(t.v[b], mixed.v_dtype[b], at[kV + b]);
                        if constexpr (kMeasure == Measure::pair) held = load(t.h, mixed.dtype, at[kH]);
                        const float grad =
                            gradient<kMeasure>(pair, load(t.g, mixed.dtype, at[kG]), held, first, second);
                        float w_new = w_old;
                        rules.apply(mixed.all.rule, w_new, grad, state);
#pragma unroll
                        for (int b = 0; b < kMostBuffers; b++)
                          if (b < traits.buffers) store(t.v[b], mixed.v_dtype[b], at[kV + b], state[b]);
                        if (mixed.rounds_at_random) {
                          const bf16 y = narrow_bf16_at_random(w_new, (uint16_t)bits);
                          static_cast<bf16*>(t.w)[at[kW]] = y;
                          w_new = real(y);
                        } else if (mixed.master_weights) {
                          mixed.master_weights[at[kMaster]] = w_new;
                          float low = w_new;
                          store(t.w, mixed.dtype, at[kW], low);
                        } else {
                          store(t.w, mixed.dtype, at[kW], w_new);
                        }
                        add_sums<kMeasure>(s, w_old, grad, traits.is_gauged ? unkeep * w_new : w_new, first, second);
                      }
                    }
                  });
}

}  // namespace

void launch_mixed(Measure measure, uint32_t blocks, cudaStream_t stream, const MixedTensor& t, const Hyper& hyper) {
  const dim3 grid(blocks), block(kThreads);
  if (measure == Measure::nothing) NK_LAUNCH((update_mixed<Measure::nothing>), grid, block, 0, stream, t, hyper);
  if (measure == Measure::step) NK_LAUNCH((update_mixed<Measure::step>), grid, block, 0, stream, t, hyper);
  if (measure == Measure::pair) NK_LAUNCH((update_mixed<Measure::pair>), grid, block, 0, stream, t, hyper);
}

}  // namespace nk::cuda
