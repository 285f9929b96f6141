// mixed.cu - every rule on tensors whose streams are stored differently: buffers of another type than their weights,
// master copies, weights rounded at random. Includes no standard library.
//
// One kernel for all of them, which asks at each load and store. A thread takes the coordinates that share a counter.
#include "mixed.h"

namespace nk::cuda {
namespace {

__device__ __forceinline__ float load(const void* p, DType dtype, int64_t i) {
  if (dtype == DType::f32) return static_cast<const float*>(p)[i];
  return dtype == DType::bf16 ? real(static_cast<const bf16*>(p)[i]) : real(static_cast<const f16*>(p)[i]);
}
// x becomes what was stored.
__device__ __forceinline__ void store(void* p, DType dtype, int64_t i, float& x) {
  if (dtype == DType::f32)
    static_cast<float*>(p)[i] = x;
  else if (dtype == DType::bf16)
    static_cast<bf16*>(p)[i] = stored(x, bf16{});
  else
    static_cast<f16*>(p)[i] = stored(x, f16{});
}
__device__ __forceinline__ float rounded(float x, DType dtype) {
  if (dtype == DType::bf16)
    stored(x, bf16{});
  else
    stored(x, f16{});
  return x;
}

template <class Index>
__device__ __forceinline__ void offsets(const MixedTensor& t, Index i, int64_t& w, int64_t& g, int64_t& v, int64_t& h,
                                        int64_t& master) {
  w = g = v = h = master = 0;
  for (int d = t.all.ndim - 1; d >= 0; d--) {
    const Index size = (Index)t.all.shape[d], rest = d == 0 ? 0 : i / size;
    const int64_t k = i - rest * size;
    w += k * t.all.w[d], g += k * t.all.g[d], v += k * t.all.v[d], h += k * t.all.h[d], master += k * t.master[d];
    i = rest;
  }
}

template <Measure kMeasure>
__global__ void __launch_bounds__(kThreads, 1)
    update_mixed(const MixedTensor __grid_constant__ mixed, const Hyper __grid_constant__ given) {
  constexpr int kTogether = RandomBits::kTogether;
  NK_SHARED(double, shared, [kSums<kMeasure>][kWarps]);
  if (skips(given.on_device.found_inf)) return;
  const Tensor& t = mixed.all.tensor;
  Traits is{};
  with_rule(StepRules{}, (int)mixed.all.rule, [&](auto rule) {
    is = {decltype(rule)::reads_v, decltype(rule)::writes_v, decltype(rule)::writes_w, decltype(rule)::gauged};
  });
  const Hyper hyper = complete(given);
  const auto c = coefficients<float>(hyper, kMeasure == Measure::pair, is.gauged, t.of_lr);
  const RandomBits random{hyper.rounding.seed, mixed.parameter, hyper.rounding.step};
  const bool is_small = t.numel <= 0xffffffff;
  visit<kMeasure>(t, blockIdx.x, mixed.all.columns, hyper, is.gauged, shared,
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
                        int64_t w, g, v, h, master;
                        if (is_small)
                          offsets<uint32_t>(mixed, (uint32_t)i, w, g, v, h, master);
                        else
                          offsets<int64_t>(mixed, i, w, g, v, h, master);
                        float w_old = load(t.w, mixed.dtype, w);
                        if (mixed.master_weights) {
                          const float copy = mixed.master_weights[master];
                          w_old = current_weight(copy, w_old, rounded(copy, mixed.dtype) == w_old);
                        }
                        float buffer = is.reads_v ? load(t.v, mixed.v_dtype, v) : 0.0f, held = 0, first = 0, second = 0;
                        if constexpr (kMeasure == Measure::pair) held = load(t.h, mixed.dtype, h);
                        const float grad = gradient<kMeasure>(c, load(t.g, mixed.dtype, g), held, first, second);
                        float w_new = w_old;
                        with_rule(StepRules{}, (int)mixed.all.rule,
                                  [&](auto rule) { decltype(rule)::apply(c, w_new, grad, buffer); });
                        if (is.writes_v) store(t.v, mixed.v_dtype, v, buffer);
                        if (mixed.rounds_at_random) {
                          const bf16 y = narrow_bf16_at_random(w_new, (uint16_t)bits);
                          static_cast<bf16*>(t.w)[w] = y;
                          w_new = real(y);
                        } else if (mixed.master_weights) {
                          mixed.master_weights[master] = w_new;
                          float low = w_new;
                          store(t.w, mixed.dtype, w, low);
                        } else {
                          store(t.w, mixed.dtype, w, w_new);
                        }
                        add_sums<kMeasure>(s, w_old, grad, is.gauged ? c.unkeep * w_new : w_new, first, second);
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
