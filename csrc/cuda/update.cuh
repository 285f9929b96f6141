// update.cuh - map_reduce over a list of tensors: every rule of formulas.h on every coordinate, and what it sums.
//
// A launch takes a table of tensors as its parameters: nothing is copied to the device beforehand, no buffer of the
// host must stay as it is while the launch waits in a queue or in a graph. Includes no standard library.
#pragma once
#include "../core/backend.h"
#include "block.cuh"
#include "table.cuh"

namespace nk::cuda {

// ---- What a launch takes ------------------------------------------------------------------------------------------

// A tensor, cut into blocks: of slots with many coordinates each block takes a part of one; of shorter ones each warp
// takes one after another.
struct Tensor {
  void* w;
  const void* g;
  void* v[kMostBuffers];
  const void* h;
  double* sums;  // a row for each slot, or for each part of each slot
  int64_t numel, slot_size;
  TensorNumbers numbers;
};

constexpr int64_t kShort = 4096;  // a slot with fewer coordinates is one of many for a block

struct Table {
  int count, columns;
  uint32_t first_block[kTensors + 1];
  Tensor tensors[kTensors];
};

// The streams of a tensor; state buffer k is kV + k.
enum Stream : int { kW, kG, kH, kMaster, kV, kStreams = kV + kMostBuffers };

struct StridedTensor {
  static constexpr int kDims = 64;  // torch's own limit
  int columns, ndim;
  RuleId rule;
  bool is_gauged;
  Tensor tensor;
  int64_t shape[kDims], strides[kStreams][kDims];
};

NK_HD bool is_short(const Tensor& t) { return t.slot_size < kShort && t.slot_size < t.numel; }
NK_HD int64_t slots_per_block(const Tensor& t) {
  return (kBlock / t.slot_size + kWarps - 1) / kWarps * kWarps;  // as many for each warp
}
NK_HD int64_t blocks(const Tensor& t) {
  const int64_t slots = t.numel / t.slot_size;
  return is_short(t) ? (slots + slots_per_block(t) - 1) / slots_per_block(t) : slots * parts(t.slot_size);
}

// ---- Numbers ------------------------------------------------------------------------------------------------------

__device__ inline double number(const void* p, bool is_double) {
  return is_double ? *static_cast<const double*>(p) : (double)*static_cast<const float*>(p);
}
__device__ inline bool skips(const float* found_inf) { return found_inf && *found_inf != 0.0f; }

// With what lies on the device put into its place.
__device__ inline Hyper complete(const Hyper& given) {
  Hyper h = given;
  const DeviceNumbers& d = h.on_device;
  if (d.lr) h.lr = number(d.lr, d.lr_is_double);
  if (d.weight_decay) h.weight_decay = number(d.weight_decay, d.weight_decay_is_double);
  if (d.beta1) h.beta1 = number(d.beta1, d.beta1_is_double);
  if (d.beta2) h.beta2 = number(d.beta2, d.beta2_is_double);
  if (d.grad_scale) h.inverse_scale = 1.0 / (double)*d.grad_scale;
  return h;
}

// ---- One coordinate -----------------------------------------------------------------------------------------------

// The gradient that a rule takes and that is summed, and of a pair both parts of it.
template <Measure kMeasure, class R>
__device__ __forceinline__ R gradient(const PairCoefficients<R>& c, R g, R h, R& first, R& second) {
  if constexpr (kMeasure != Measure::pair) return g;
  first = c.first_scale * h;
  second = c.second_scale * g;
  return c.combination(first, second);
}

template <Measure kMeasure, class R>
__device__ __forceinline__ void add_sums(double* s, R w_old, R g, R w_new, R first, R second) {
  if constexpr (kMeasure != Measure::nothing) StepSums::add(s, (double)w_old, (double)g, (double)w_new);
  if constexpr (kMeasure == Measure::pair) PairSums::add(s + StepSums::count, (double)first, (double)second);
}

// ---- Dense tensors ------------------------------------------------------------------------------------------------

// The coefficients of a rule and, of a pair, of its combination.
template <class Rule, Measure kMeasure, class R> struct StepNumbers {
  typename Rule::template Coefficients<R> rule;
  PairCoefficients<R> pair;
  R unkeep;  // of a gauged rule

  static __device__ __forceinline__ StepNumbers from(const Hyper& h, const TensorNumbers& numbers) {
    return {coefficients<Rule, R>(h, kMeasure == Measure::pair, numbers), PairCoefficients<R>::from(h),
            (R)h.gauge.unkeep};
  }
};

template <class Rule> constexpr int kRoom = Rule::traits.buffers > 0 ? Rule::traits.buffers : 1;  // for state buffers

// N coordinates that one thread has in its registers.
template <class Rule, Measure kMeasure, class T, int N> struct Registers {
  using R = Real<T>;
  R w[N], g[N], v[kRoom<Rule>][N], h[N], w_old[N], first[N], second[N];

  __device__ __forceinline__ void apply(const StepNumbers<Rule, kMeasure, R>& c) {
#pragma unroll
    for (int k = 0; k < N; k++) {
      w_old[k] = w[k];
      g[k] = gradient<kMeasure>(c.pair, g[k], h[k], first[k], second[k]);
      R state[kRoom<Rule>];
#pragma unroll
      for (int b = 0; b < Rule::traits.buffers; b++) state[b] = v[b][k];
      nk::apply<Rule>(c.rule, w[k], g[k], state);
#pragma unroll
      for (int b = 0; b < Rule::traits.buffers; b++) v[b][k] = state[b];
    }
  }
  // After w has been stored, and is what was stored.
  __device__ __forceinline__ void add(const StepNumbers<Rule, kMeasure, R>& c, double* s) {
    if constexpr (kMeasure != Measure::nothing)
#pragma unroll
      for (int k = 0; k < N; k++)
        add_sums<kMeasure>(s, w_old[k], g[k], Rule::traits.is_gauged ? c.unkeep * w[k] : w[k], first[k], second[k]);
  }
};

template <class T, int kBuffers> struct Streams {
  T* w;
  const T* g;
  T* v[kBuffers];
  const T* h;

  __device__ __forceinline__ Streams at(int64_t i) const {
    Streams moved{w + i, g + i, {}, h + i};
#pragma unroll
    for (int b = 0; b < kBuffers; b++) moved.v[b] = v[b] + i;
    return moved;
  }
};

// Blocks that an SM holds at once, at least: as many as leave each thread the registers for its packs and sums, and for
// Adam's division and root: of doubles they take many, and a pack of halves has eight of them.
template <class T> NK_HD constexpr int resident(Measure measure, bool has_adam) {
  const int most = measure == Measure::nothing ? 3 : measure == Measure::step ? 2 : 1;
  return has_adam && most > (sizeof(T) == 8 ? 1 : sizeof(T) == 2 ? 2 : 3) ? most - 1 : most;
}

// `threads` threads, of which this is number `thread`, on coordinates [0, n).
template <class Rule, Measure kMeasure, class T>
__device__ __forceinline__ void sweep(const StepNumbers<Rule, kMeasure, Real<T>>& c, const Streams<T, kRoom<Rule>>& t,
                                      int n, int thread, int threads, double* s) {
  constexpr Traits kTraits = Rule::traits;
  constexpr int N = Pack<T>::size, kApart = 4, kBuffers = kTraits.buffers;
  // Packs of each stream on their way at once: what hides the latency of the fastest memories. Of more streams one,
  // where other blocks wait for theirs meanwhile: two would not fit the registers.
  constexpr int kTogether = kBuffers > 1 && resident<T>(kMeasure, true) > 1 ? 1 : 2;
  bool aligned = is_aligned(t.w) && is_aligned(t.g) && (kMeasure != Measure::pair || is_aligned(t.h));
#pragma unroll
  for (int b = 0; b < kBuffers; b++) aligned = aligned && is_aligned(t.v[b]);
  const int packed = aligned ? n / N * N : 0;
#pragma unroll 1
  for (int i = thread * N; i < packed; i += kTogether * threads * N) {
    Pack<T> w[kTogether], g[kTogether], v[kRoom<Rule>][kTogether], h[kTogether];
#pragma unroll
    for (int j = 0; j < kTogether; j++) {
      const int at = i + j * threads * N;
      if (at >= packed) continue;
      w[j].load(t.w + at);
      g[j].load(t.g + at);
      if constexpr (kTraits.reads_buffers)
#pragma unroll
        for (int b = 0; b < kBuffers; b++) v[b][j].load(t.v[b] + at);
      if constexpr (kMeasure == Measure::pair) h[j].load(t.h + at);
    }
#pragma unroll
    for (int j = 0; j < kTogether; j++) {
      const int at = i + j * threads * N;
      if (at >= packed) continue;
      Registers<Rule, kMeasure, T, N> x;
      w[j].unpack(x.w);
      g[j].unpack(x.g);
      if constexpr (kTraits.reads_buffers)
#pragma unroll
        for (int b = 0; b < kBuffers; b++) v[b][j].unpack(x.v[b]);
      if constexpr (kMeasure == Measure::pair) h[j].unpack(x.h);
      x.apply(c);
#pragma unroll
      for (int b = 0; b < kBuffers; b++) Pack<T>::store(t.v[b] + at, x.v[b]);
      if constexpr (kTraits.writes_w) Pack<T>::store(t.w + at, x.w);
      x.add(c, s);
    }
  }
  // One by one: the rest, or all where not every stream begins at a multiple of 16 bytes. Several at a time, so that
  // their loads wait together.
#pragma unroll 1
  for (int i = packed + thread; i < n; i += kApart * threads) {
    Registers<Rule, kMeasure, T, kApart> x;
#pragma unroll
    for (int k = 0; k < kApart; k++) {
      const int at = i + k * threads;
      x.w[k] = x.g[k] = x.h[k] = 0;  // adds nothing to the sums
#pragma unroll
      for (int b = 0; b < kRoom<Rule>; b++) x.v[b][k] = 0;
      if (at >= n) continue;
      x.w[k] = real(t.w[at]);
      x.g[k] = real(t.g[at]);
      if constexpr (kTraits.reads_buffers)
#pragma unroll
        for (int b = 0; b < kBuffers; b++) x.v[b][k] = real(t.v[b][at]);
      if constexpr (kMeasure == Measure::pair) x.h[k] = real(t.h[at]);
    }
    x.apply(c);
#pragma unroll
    for (int k = 0; k < kApart; k++) {
      const int at = i + k * threads;
      if (at >= n) continue;
#pragma unroll
      for (int b = 0; b < kBuffers; b++) t.v[b][at] = stored(x.v[b][k], T{});
      if constexpr (kTraits.writes_w) t.w[at] = stored(x.w[k], T{});
    }
    x.add(c, s);
  }
}

template <int N> __device__ __forceinline__ void write_sums(double* out, double (&s)[N], const Hyper& h,
                                                            bool is_gauged) {
  in_user_units<N>(s, h, is_gauged);
#pragma unroll
  for (int j = 0; j < N; j++) out[j] = s[j];
}

// A block of one tensor. sweep(begin, n, thread, threads, s) runs on coordinates [begin, begin + n) of it.
template <Measure kMeasure, class Sweep>
__device__ __forceinline__ void visit(const Tensor& t, int64_t block, int columns, const Hyper& h, bool is_gauged,
                                      double (&shared)[kSums<kMeasure>][kWarps], Sweep sweep) {
  constexpr int N = kSums<kMeasure>;
  double s[N] = {};
  if constexpr (kMeasure == Measure::nothing) {
    const int64_t begin = block * kBlock, left = t.numel - begin;
    sweep(begin, (int)(left < kBlock ? left : kBlock), (int)threadIdx.x, kThreads, s);
  } else {
    const bool is_short = nk::cuda::is_short(t);
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const int64_t slots = t.numel / t.slot_size, each = parts(t.slot_size);
    int64_t slot = is_short ? block * slots_per_block(t) + warp : block / each;
    const int64_t past = is_short ? (block + 1) * slots_per_block(t) : slot + 1;
    const int64_t part = is_short ? 0 : block - slot * each, left = t.slot_size - part * kBlock;
    for (; slot < past && slot < slots; slot += kWarps) {
      sweep(slot * t.slot_size + part * kBlock, (int)(left < kBlock ? left : kBlock),
            is_short ? lane : (int)threadIdx.x, is_short ? kWarp : kThreads, s);
      if (!is_short) break;
      warp_sum(s);
      if (lane == 0) write_sums(t.sums + slot * columns, s, h, is_gauged);
#pragma unroll
      for (int j = 0; j < N; j++) s[j] = 0;
    }
    if (is_short) return;
    block_sum(s, shared);
    if (threadIdx.x == 0) write_sums(t.sums + block * columns, s, h, is_gauged);
  }
}

template <class Rule, Measure kMeasure, class T>
__global__ void __launch_bounds__(kThreads, resident<T>(kMeasure, is_same<Rule, Adam>))
    update(const Table __grid_constant__ table, const Hyper __grid_constant__ given) {
  NK_SHARED(double, shared, [kSums<kMeasure>][kWarps]);
  if (skips(given.on_device.found_inf)) return;
  const int i = entry_of(table, blockIdx.x);
  const Tensor& t = table.tensors[i];
  const Hyper hyper = complete(given);
  const auto c = StepNumbers<Rule, kMeasure, Real<T>>::from(hyper, t.numbers);
  Streams<T, kRoom<Rule>> all{static_cast<T*>(t.w), static_cast<const T*>(t.g), {}, static_cast<const T*>(t.h)};
#pragma unroll
  for (int b = 0; b < kRoom<Rule>; b++) all.v[b] = static_cast<T*>(t.v[b]);
  visit<kMeasure>(t, blockIdx.x - table.first_block[i], table.columns, hyper, Rule::traits.is_gauged, shared,
                  [&](int64_t begin, int n, int thread, int threads, double* s) {
                    sweep<Rule, kMeasure, T>(c, all.at(begin), n, thread, threads, s);
                  });
}

// ---- Strided tensors, in row-major order of the shape --------------------------------------------------------------
//
// One coordinate at a time, and one kernel for all rules: how memory is reached costs more than choosing one.

// f(Rule{}) for the rule with this id.
template <class F, class... All> __device__ __forceinline__ void with_rule(List<All...>, RuleId id, F f) {
  int i = 0;
  ((i++ == (int)id ? f(All{}) : void()), ...);
}

__device__ __forceinline__ Traits traits_on_device(RuleId id) {
  Traits found;
  with_rule(Rules{}, id, [&](auto rule) {
    constexpr Traits kTraits = decltype(rule)::traits;
    found = kTraits;
  });
  return found;
}

// The coefficients of every rule: those that a kernel for all rules may need.
template <class Rule, class R> struct OneOfRules {
  typename Rule::template Coefficients<R> coefficients;
};
template <class R, class List> struct OfRules;
template <class R, class... All> struct OfRules<R, List<All...>> : OneOfRules<All, R>... {
  __device__ __forceinline__ OfRules(const Hyper& h, bool is_pair, const TensorNumbers& numbers)
      : OneOfRules<All, R>{coefficients<All, R>(h, is_pair, numbers)}... {}
  template <class Rule> __device__ __forceinline__ const auto& of() const {
    return static_cast<const OneOfRules<Rule, R>&>(*this).coefficients;
  }
  __device__ __forceinline__ void apply(RuleId id, R& w, R g, R (&state)[kMostBuffers]) const {
    with_rule(List<All...>{}, id, [&](auto rule) {
      using Rule = decltype(rule);
      nk::apply<Rule>(of<Rule>(), w, g, state);
    });
  }
};

// Where coordinate i of each stream is.
template <class Index>
__device__ __forceinline__ void offsets(const StridedTensor& t, Index i, int64_t (&at)[kStreams]) {
#pragma unroll
  for (int stream = 0; stream < kStreams; stream++) at[stream] = 0;
  for (int d = t.ndim - 1; d >= 0; d--) {
    const Index size = (Index)t.shape[d], rest = d == 0 ? 0 : i / size;
    const int64_t k = i - rest * size;
#pragma unroll
    for (int stream = 0; stream < kStreams; stream++) at[stream] += k * t.strides[stream][d];
    i = rest;
  }
}
__device__ __forceinline__ void offsets(const StridedTensor& t, int64_t i, bool is_small, int64_t (&at)[kStreams]) {
  if (is_small)
    offsets<uint32_t>(t, (uint32_t)i, at);
  else
    offsets<int64_t>(t, i, at);
}
__device__ __forceinline__ bool is_small(const StridedTensor& t) { return t.tensor.numel <= 0xffffffff; }

template <Measure kMeasure, class T>
__global__ void __launch_bounds__(kThreads, resident<T>(kMeasure, true))
    update_strided(const StridedTensor __grid_constant__ strided, const Hyper __grid_constant__ given) {
  using R = Real<T>;
  NK_SHARED(double, shared, [kSums<kMeasure>][kWarps]);
  if (skips(given.on_device.found_inf)) return;
  const Tensor& t = strided.tensor;
  const Traits traits = traits_on_device(strided.rule);
  const Hyper hyper = complete(given);
  const OfRules<R, Rules> rules(hyper, kMeasure == Measure::pair, t.numbers);
  const auto pair = PairCoefficients<R>::from(hyper);
  const R unkeep = (R)hyper.gauge.unkeep;
  const bool small = is_small(strided);
  visit<kMeasure>(t, blockIdx.x, strided.columns, hyper, traits.is_gauged, shared,
                  [&](int64_t begin, int n, int thread, int threads, double* s) {
                    for (int i = thread; i < n; i += threads) {
                      int64_t at[kStreams];
                      offsets(strided, begin + i, small, at);
                      const R w_old = real(static_cast<const T*>(t.w)[at[kW]]);
                      R state[kMostBuffers] = {}, held = 0, first = 0, second = 0;
#pragma unroll
                      for (int b = 0; b < kMostBuffers; b++)
                        if (traits.reads_buffers && b < traits.buffers)
                          state[b] = real(static_cast<const T*>(t.v[b])[at[kV + b]]);
                      if constexpr (kMeasure == Measure::pair) held = real(static_cast<const T*>(t.h)[at[kH]]);
                      const R grad =
                          gradient<kMeasure>(pair, (R)real(static_cast<const T*>(t.g)[at[kG]]), held, first, second);
                      R w_new = w_old;
                      rules.apply(strided.rule, w_new, grad, state);
#pragma unroll
                      for (int b = 0; b < kMostBuffers; b++)
                        if (b < traits.buffers) static_cast<T*>(t.v[b])[at[kV + b]] = stored(state[b], T{});
                      if (traits.writes_w) static_cast<T*>(t.w)[at[kW]] = stored(w_new, T{});
                      add_sums<kMeasure>(s, w_old, grad, traits.is_gauged ? unkeep * w_new : w_new, first, second);
                    }
                  });
}

// ---- What run.cu calls ----------------------------------------------------------------------------------------------

inline Tensor tensor_of(const Chunk& c) {
  Tensor t{c.w, c.g, {}, c.h, c.sums, c.size, c.sums ? c.slot_size : c.size, c.numbers};
  for (int b = 0; b < kMostBuffers; b++) t.v[b] = c.v[b];
  return t;
}

// Dimensions that all streams walk through alike are one; a dense tensor has one, or none.
inline StridedTensor strided_tensor_of(const Chunk& c) {
  StridedTensor t;
  t.columns = c.columns, t.rule = c.rule, t.is_gauged = traits_of(c.rule).is_gauged, t.tensor = tensor_of(c);
  t.ndim = 0;
  if (!c.strided) {
    t.ndim = 1, t.shape[0] = c.size;
    for (auto& strides : t.strides) strides[0] = 1;
    return t;
  }
  const Strided& from = *c.strided;
  const int64_t* all[kStreams] = {from.w, from.g, from.h, from.master};
  for (int b = 0; b < kMostBuffers; b++) all[kV + b] = from.v[b];
  for (int d = 0; d < from.ndim; d++) {
    const int64_t size = from.shape[d];
    if (size == 1) continue;
    // A dimension that continues the one before it, in every stream, is part of it.
    const int last = t.ndim - 1;
    bool continues = last >= 0;
    for (int s = 0; s < kStreams; s++) continues = continues && t.strides[s][last] == (all[s] ? all[s][d] : 0) * size;
    const int to = continues ? last : t.ndim++;
    t.shape[to] = continues ? t.shape[to] * size : size;
    for (int s = 0; s < kStreams; s++) t.strides[s][to] = all[s] ? all[s][d] : 0;
  }
  return t;
}

template <class T> struct Updates {  // of one storage type; update.cu
  static void dense(RuleId, Measure, uint32_t blocks, cudaStream_t, const Table&, const Hyper&);
  static void strided(Measure, uint32_t blocks, cudaStream_t, const StridedTensor&, const Hyper&);
};

}  // namespace nk::cuda
