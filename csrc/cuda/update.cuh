// update.cuh - map_reduce over a list of tensors: every rule of formulas.h on every coordinate, and what it sums.
//
// A launch takes a table of tensors as its parameters: nothing is copied to the device beforehand, no buffer of the
// host must stay as it is while the launch waits in a queue or in a graph. Includes no standard library.
#pragma once
#include "../backend.h"
#include "block.cuh"
#include "table.cuh"

namespace nk::cuda {

// ---- What a launch takes ------------------------------------------------------------------------------------------

// A tensor, cut into blocks: of slots with many coordinates each block takes a part of one; of shorter ones each warp
// takes one after another.
struct Tensor {
  void* w;
  const void* g;
  void* v;
  const void* h;
  double* sums;  // a row for each slot, or for each part of each slot
  int64_t numel, slot_size;
  Multiplier of_lr;
};

constexpr int64_t kShort = 4096;  // a slot with fewer coordinates is one of many for a block

struct Table {
  int count, columns;
  uint32_t first_block[kTensors + 1];
  Tensor tensors[kTensors];
};

struct StridedTensor {
  static constexpr int kDims = 64;  // torch's own limit
  int columns, ndim;
  Rule rule;
  Tensor tensor;
  int64_t shape[kDims], w[kDims], g[kDims], v[kDims], h[kDims];
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
  if (d.grad_scale) h.inverse_scale = 1.0 / (double)*d.grad_scale;
  return h;
}

// ---- One coordinate -----------------------------------------------------------------------------------------------

// What the rule makes of w, g and v. Returns the gradient that the sums speak of, and of a pair both parts of it.
template <Measure kMeasure, class R>
__device__ __forceinline__ R gradient(const Coefficients<R>& c, R g, R h, R& first, R& second) {
  if constexpr (kMeasure != Measure::pair) return g;
  first = c.first_scale * h;
  second = c.second_scale * g;
  return svag_combination(c, first, second);
}

template <Measure kMeasure, class R>
__device__ __forceinline__ void add_sums(double* s, R w_old, R g, R w_new, R first, R second) {
  if constexpr (kMeasure != Measure::nothing) StepSums::add(s, (double)w_old, (double)g, (double)w_new);
  if constexpr (kMeasure == Measure::pair) PairSums::add(s + StepSums::count, (double)first, (double)second);
}

// ---- Dense tensors ------------------------------------------------------------------------------------------------

// N coordinates that one thread has in its registers.
template <class Rule, Measure kMeasure, class T, int N> struct Registers {
  using R = Real<T>;
  R w[N], g[N], v[N], h[N], w_old[N], first[N], second[N];

  __device__ __forceinline__ void apply(const Coefficients<R>& c) {
#pragma unroll
    for (int k = 0; k < N; k++) {
      w_old[k] = w[k];
      g[k] = gradient<kMeasure>(c, g[k], h[k], first[k], second[k]);
      Rule::apply(c, w[k], g[k], v[k]);
    }
  }
  // After w has been stored, and is what was stored.
  __device__ __forceinline__ void add(const Coefficients<R>& c, double* s) {
    if constexpr (kMeasure != Measure::nothing)
#pragma unroll
      for (int k = 0; k < N; k++)
        add_sums<kMeasure>(s, w_old[k], g[k], Rule::gauged ? c.unkeep * w[k] : w[k], first[k], second[k]);
  }
};

template <class T> struct Streams {
  T* w;
  const T* g;
  T* v;
  const T* h;
};

// `threads` threads, of which this is number `thread`, on coordinates [0, n).
template <class Rule, Measure kMeasure, class T>
__device__ __forceinline__ void sweep(const Coefficients<Real<T>>& c, const Streams<T>& t, int n, int thread,
                                      int threads, double* s) {
  constexpr int N = Pack<T>::size, kApart = 4;
  // Packs of each stream on their way at once: what hides the latency of the fastest memories.
  constexpr int kTogether = 2;
  const bool aligned = is_aligned(t.w) && is_aligned(t.g) && (!Rule::writes_v || is_aligned(t.v)) &&
                       (kMeasure != Measure::pair || is_aligned(t.h));
  const int packed = aligned ? n / N * N : 0;
#pragma unroll 1
  for (int i = thread * N; i < packed; i += kTogether * threads * N) {
    Pack<T> w[kTogether], g[kTogether], v[kTogether], h[kTogether];
#pragma unroll
    for (int j = 0; j < kTogether; j++) {
      const int at = i + j * threads * N;
      if (at >= packed) continue;
      w[j].load(t.w + at);
      g[j].load(t.g + at);
      if constexpr (Rule::reads_v) v[j].load(t.v + at);
      if constexpr (kMeasure == Measure::pair) h[j].load(t.h + at);
    }
#pragma unroll
    for (int j = 0; j < kTogether; j++) {
      const int at = i + j * threads * N;
      if (at >= packed) continue;
      Registers<Rule, kMeasure, T, N> x;
      w[j].unpack(x.w);
      g[j].unpack(x.g);
      if constexpr (Rule::reads_v) v[j].unpack(x.v);
      if constexpr (kMeasure == Measure::pair) h[j].unpack(x.h);
      x.apply(c);
      if constexpr (Rule::writes_v) Pack<T>::store(t.v + at, x.v);
      if constexpr (Rule::writes_w) Pack<T>::store(t.w + at, x.w);
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
      x.w[k] = x.g[k] = x.v[k] = x.h[k] = 0;  // adds nothing to the sums
      if (at >= n) continue;
      x.w[k] = real(t.w[at]);
      x.g[k] = real(t.g[at]);
      if constexpr (Rule::reads_v) x.v[k] = real(t.v[at]);
      if constexpr (kMeasure == Measure::pair) x.h[k] = real(t.h[at]);
    }
    x.apply(c);
#pragma unroll
    for (int k = 0; k < kApart; k++) {
      const int at = i + k * threads;
      if (at >= n) continue;
      if constexpr (Rule::writes_v) t.v[at] = stored(x.v[k], T{});
      if constexpr (Rule::writes_w) t.w[at] = stored(x.w[k], T{});
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

// Blocks that an SM holds at once, at least: as many as leave each thread the registers for its packs and sums.
constexpr int resident(Measure measure) { return measure == Measure::nothing ? 3 : measure == Measure::step ? 2 : 1; }

template <class Rule, Measure kMeasure, class T>
__global__ void __launch_bounds__(kThreads, resident(kMeasure))
    update(const Table __grid_constant__ table, const Hyper __grid_constant__ given) {
  NK_SHARED(double, shared, [kSums<kMeasure>][kWarps]);
  if (skips(given.on_device.found_inf)) return;
  const int i = entry_of(table, blockIdx.x);
  const Tensor& t = table.tensors[i];
  const Hyper hyper = complete(given);
  const auto c = coefficients<Real<T>>(hyper, kMeasure == Measure::pair, Rule::gauged, t.of_lr);
  const Streams<T> all{static_cast<T*>(t.w), static_cast<const T*>(t.g), static_cast<T*>(t.v),
                       static_cast<const T*>(t.h)};
  visit<kMeasure>(t, blockIdx.x - table.first_block[i], table.columns, hyper, Rule::gauged, shared,
                  [&](int64_t begin, int n, int thread, int threads, double* s) {
                    sweep<Rule, kMeasure>(c, Streams<T>{all.w + begin, all.g + begin, all.v + begin, all.h + begin}, n,
                                          thread, threads, s);
                  });
}

// ---- Strided tensors, in row-major order of the shape --------------------------------------------------------------
//
// One coordinate at a time, and one kernel for all rules: how memory is reached costs more than choosing one.

struct Traits {
  bool reads_v, writes_v, writes_w, gauged;
};

// f(Rule{}) for the rule that is number `index` of the list.
template <class F, class... All> __device__ __forceinline__ void with_rule(List<All...>, int index, F f) {
  int i = 0;
  ((i++ == index ? f(All{}) : void()), ...);
}

template <class Index>
__device__ __forceinline__ void offsets(const StridedTensor& t, Index i, int64_t& w, int64_t& g, int64_t& v,
                                        int64_t& h) {
  w = g = v = h = 0;
  for (int d = t.ndim - 1; d >= 0; d--) {
    const Index size = (Index)t.shape[d], rest = d == 0 ? 0 : i / size;
    const int64_t k = i - rest * size;
    w += k * t.w[d], g += k * t.g[d], v += k * t.v[d], h += k * t.h[d];
    i = rest;
  }
}

template <Measure kMeasure, class T>
__global__ void __launch_bounds__(kThreads, resident(kMeasure))
    update_strided(const StridedTensor __grid_constant__ strided, const Hyper __grid_constant__ given) {
  using R = Real<T>;
  NK_SHARED(double, shared, [kSums<kMeasure>][kWarps]);
  if (skips(given.on_device.found_inf)) return;
  const Tensor& t = strided.tensor;
  Traits is{};
  with_rule(Rules{}, (int)strided.rule, [&](auto rule) {
    is = {decltype(rule)::reads_v, decltype(rule)::writes_v, decltype(rule)::writes_w, decltype(rule)::gauged};
  });
  const Hyper hyper = complete(given);
  const auto c = coefficients<R>(hyper, kMeasure == Measure::pair, is.gauged, t.of_lr);
  const bool is_small = t.numel <= 0xffffffff;
  visit<kMeasure>(
      t, blockIdx.x, strided.columns, hyper, is.gauged, shared,
      [&](int64_t begin, int n, int thread, int threads, double* s) {
        for (int i = thread; i < n; i += threads) {
          int64_t w, g, v, h;
          if (is_small)
            offsets<uint32_t>(strided, (uint32_t)(begin + i), w, g, v, h);
          else
            offsets<int64_t>(strided, begin + i, w, g, v, h);
          const R w_old = real(static_cast<const T*>(t.w)[w]);
          R buffer = is.reads_v ? real(static_cast<const T*>(t.v)[v]) : R(0), held = 0, first = 0, second = 0;
          if constexpr (kMeasure == Measure::pair) held = real(static_cast<const T*>(t.h)[h]);
          const R grad = gradient<kMeasure>(c, (R)real(static_cast<const T*>(t.g)[g]), held, first, second);
          R w_new = w_old;
          with_rule(Rules{}, (int)strided.rule, [&](auto rule) { decltype(rule)::apply(c, w_new, grad, buffer); });
          if (is.writes_v) static_cast<T*>(t.v)[v] = stored(buffer, T{});
          if (is.writes_w) static_cast<T*>(t.w)[w] = stored(w_new, T{});
          add_sums<kMeasure>(s, w_old, grad, is.gauged ? c.unkeep * w_new : w_new, first, second);
        }
      });
}

// ---- Choosing a kernel ----------------------------------------------------------------------------------------------

inline Tensor tensor_of(const Chunk& c) {
  return {c.w, c.g, c.v, c.h, c.sums, c.size, c.sums ? c.slot_size : c.size, c.of_lr};
}

// Dimensions that all streams walk through alike are one; a dense tensor has one, or none. `master`: strides of the
// master copy, as many.
inline StridedTensor strided_tensor_of(const Chunk& c, int64_t* master) {
  StridedTensor t;
  t.columns = c.columns, t.rule = c.rule, t.tensor = tensor_of(c), t.ndim = 0;
  if (!c.strided) {
    t.ndim = 1;
    t.shape[0] = c.size, t.w[0] = t.g[0] = t.v[0] = t.h[0] = master[0] = 1;
    return t;
  }
  const Strided& from = *c.strided;
  for (int d = 0; d < from.ndim; d++) {
    if (from.shape[d] == 1) continue;
    const int64_t size = from.shape[d], w = from.w[d], g = from.g[d], v = from.v ? from.v[d] : 0,
                  h = from.h ? from.h[d] : 0, m = from.master ? from.master[d] : 0;
    const int last = t.ndim - 1;
    // A dimension that continues the one before it, in every stream, is part of it.
    if (last >= 0 && t.w[last] == w * size && t.g[last] == g * size && t.v[last] == v * size && t.h[last] == h * size &&
        master[last] == m * size) {
      t.shape[last] *= size, t.w[last] = w, t.g[last] = g, t.v[last] = v, t.h[last] = h, master[last] = m;
    } else {
      t.shape[t.ndim] = size, t.w[t.ndim] = w, t.g[t.ndim] = g, t.v[t.ndim] = v, t.h[t.ndim] = h;
      master[t.ndim++] = m;
    }
  }
  return t;
}

template <class T> struct Updates {  // of one storage type
  static void launch(Rule, Measure, uint32_t blocks, cudaStream_t, const Table&, const Hyper&);
  static void launch(Measure, uint32_t blocks, cudaStream_t, const StridedTensor&, const Hyper&);
};

namespace {

// No op measures SvagCombine, and without measuring there is nothing to a Difference.
template <class Rule, Measure kMeasure> constexpr bool has_op = true;
template <> constexpr bool has_op<SvagCombine, Measure::step> = false;
template <> constexpr bool has_op<Difference, Measure::nothing> = false;

template <class T> using Launch = void (*)(uint32_t, cudaStream_t, const Table&, const Hyper&);

template <class Rule, Measure kMeasure, class T>
void launch_update(uint32_t blocks, cudaStream_t stream, const Table& table, const Hyper& hyper) {
  if constexpr (has_op<Rule, kMeasure>)
    NK_LAUNCH((update<Rule, kMeasure, T>), dim3(blocks), dim3(kThreads), 0, stream, table, hyper);
}
template <Measure kMeasure, class T, class... All>
void launch_any(List<All...>, int rule, uint32_t blocks, cudaStream_t stream, const Table& table, const Hyper& hyper) {
  static constexpr Launch<T> all[] = {launch_update<All, kMeasure, T>...};
  all[rule](blocks, stream, table, hyper);
}

}  // namespace

template <class T>
void Updates<T>::launch(Rule rule, Measure measure, uint32_t blocks, cudaStream_t stream, const Table& table,
                        const Hyper& hyper) {
  const int index = (int)rule;
  if (measure == Measure::nothing) launch_any<Measure::nothing, T>(Rules{}, index, blocks, stream, table, hyper);
  if (measure == Measure::step) launch_any<Measure::step, T>(Rules{}, index, blocks, stream, table, hyper);
  if (measure == Measure::pair) launch_any<Measure::pair, T>(StepRules{}, index, blocks, stream, table, hyper);
}

template <class T>
void Updates<T>::launch(Measure measure, uint32_t blocks, cudaStream_t stream, const StridedTensor& t,
                        const Hyper& hyper) {
  const dim3 grid(blocks), block(kThreads);
  if (measure == Measure::nothing) NK_LAUNCH((update_strided<Measure::nothing, T>), grid, block, 0, stream, t, hyper);
  if (measure == Measure::step) NK_LAUNCH((update_strided<Measure::step, T>), grid, block, 0, stream, t, hyper);
  if (measure == Measure::pair) NK_LAUNCH((update_strided<Measure::pair, T>), grid, block, 0, stream, t, hyper);
}

// One translation unit each.
extern template struct Updates<double>;
extern template struct Updates<float>;
extern template struct Updates<bf16>;
extern template struct Updates<f16>;

}  // namespace nk::cuda
