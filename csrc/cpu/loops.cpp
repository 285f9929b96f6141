// loops.cpp - the coordinate loops, compiled once for each ISA level, in a namespace of its own (NK_ISA).
//
// No torch, no STL. Plain loops over formulas.h that the compiler vectorises; what it may not or cannot vectorise by
// itself, the sums and float16, is behind simd.h and convert.h.
#include "convert.h"
#include "isa.h"
#include "simd.h"

namespace nk::cpu::NK_ISA {
namespace {

// ---- Statistics
// --------------------------------------------------------------------------------------------------------

struct Sums {
  Lanes s[StepSums::count] = {};

  void flush(double* out, double inverse_scale) {
    double total[StepSums::count];
    for (int j = 0; j < StepSums::count; j++) {
      const Lanes& x = s[j];
      total[j] = ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7]));
      s[j] = Lanes{};
    }
    StepSums::unscale(total, inverse_scale);
    for (int j = 0; j < StepSums::count; j++) out[j] = total[j];
  }
};

// Cuts a chunk's coordinates, which come in one or more portions, into runs that belong to one slot each.
class Slots {
 public:
  explicit Slots(const Chunk& c)
      : out_(c.sums), slot_size_(c.slot_size), left_(c.slot_size), inverse_scale_(c.hyper->inverse_scale) {}

  template <class Run> void each(int64_t n, Run run) {  // run(begin, size, sums)
    for (int64_t k = 0; k < n;) {
      const int64_t size = left_ < n - k ? left_ : n - k;
      run(k, size, sums_);
      k += size;
      if ((left_ -= size) == 0) next();
    }
  }
  void finish() {
    if (left_ != slot_size_) next();
  }

 private:
  void next() {
    sums_.flush(out_, inverse_scale_);
    out_ += StepSums::count;
    left_ = slot_size_;
  }
  Sums sums_;
  double* out_;
  int64_t slot_size_, left_;
  double inverse_scale_;
};

// ---- The update
// --------------------------------------------------------------------------------------------------------

// Coordinates that go through registers together. Lane l sums coordinates l, l+8, l+16, ... whichever it is.
constexpr int kStep = kWidth == 8 ? 2 * kLanes : kLanes;

// Both halves of a measured step in one go: the arithmetic of the sums hides behind the loads of the next coordinates.
// As two loops over an L1-sized block the same sums cost 15 to 20 % of the step; so, 0 to 3 %.
template <class Rule, bool kMeasure, class R>
inline void step(const SgdCoefficients<R>& c, R* __restrict w, const R* __restrict g, R* __restrict v,
                 Lanes (&s)[StepSums::count]) {
  const Eight<R> old[] = {Eight<R>(w), Eight<R>(w + kStep - kLanes)};
#pragma GCC unroll 1  // unrolled it would reach the vectoriser as straight-line scalars
  for (int k = 0; k < kStep; k++) {
    R wk = w[k], vk = 0;
    if constexpr (Rule::reads_v) vk = v[k];
    Rule::apply(c, wk, g[k], vk);
    w[k] = wk;
    if constexpr (Rule::writes_v) v[k] = vk;
  }
  if constexpr (kMeasure)
    for (int k = 0; k < kStep; k += kLanes)
      StepSums::add(s, old[k / kLanes].widened(), Eight<R>(g + k).widened(), Eight<R>(w + k).widened());
}

// Asks for the lines that `step` will need soon: 512 coordinates ahead measured best, 5 to 15 % over the hardware
// alone.
template <bool kWritesV, class R> inline void prefetch(const R* w, const R* g, const R* v) {
  constexpr int kAhead = 512, kLine = 64 / sizeof(R);
  for (int k = 0; k < kStep; k += kLine) {
    __builtin_prefetch(w + kAhead + k, 1);
    __builtin_prefetch(g + kAhead + k, 0);
    if constexpr (kWritesV) __builtin_prefetch(v + kAhead + k, 1);
  }
}

template <class Rule, bool kMeasure, class R>
void run(const SgdCoefficients<R>& c, R* __restrict w, const R* __restrict g, R* __restrict v, int64_t n, Sums& sums) {
  Lanes s[StepSums::count];
  for (int j = 0; j < StepSums::count; j++) s[j] = sums.s[j];
  int64_t i = 0;
  for (; i + kStep <= n; i += kStep) {
    prefetch<Rule::writes_v>(w + i, g + i, v + i);
    step<Rule, kMeasure>(c, w + i, g + i, v + i, s);
  }
  if (i < n) {  // the same step on a copy, padded with zeros, which add nothing to the sums
    const int rest = (int)(n - i);
    R w_rest[kStep] = {}, g_rest[kStep] = {}, v_rest[kStep] = {};
    for (int k = 0; k < rest; k++) {
      w_rest[k] = w[i + k], g_rest[k] = g[i + k];
      if constexpr (Rule::reads_v) v_rest[k] = v[i + k];
    }
    step<Rule, kMeasure>(c, w_rest, g_rest, v_rest, s);
    for (int k = 0; k < rest; k++) {
      w[i + k] = w_rest[k];
      if constexpr (Rule::writes_v) v[i + k] = v_rest[k];
    }
  }
  for (int j = 0; j < StepSums::count; j++) sums.s[j] = s[j];
}

template <class Rule, class R>
void run_slots(const SgdCoefficients<R>& c, R* w, const R* g, R* v, int64_t n, bool measure, Slots& slots) {
  Sums none;
  if (!measure) return run<Rule, false>(c, w, g, v, n, none);
  slots.each(n, [&](int64_t k, int64_t size, Sums& sums) { run<Rule, true>(c, w + k, g + k, v + k, size, sums); });
}

// The sums alone, for coordinates that were updated elsewhere.
inline void measure(const float* w, const float* g, const float* w_new, int64_t n, Sums& sums) {
  int64_t k = 0;
  const auto add = [&](const float* a, const float* b, const float* a_new) {
    StepSums::add(sums.s, Eight<float>(a).widened(), Eight<float>(b).widened(), Eight<float>(a_new).widened());
  };
  for (; k + kLanes <= n; k += kLanes) add(w + k, g + k, w_new + k);
  if (k == n) return;
  float rest[3][kLanes] = {};
  for (int j = 0; k < n; k++, j++) rest[0][j] = w[k], rest[1][j] = g[k], rest[2][j] = w_new[k];
  add(rest[0], rest[1], rest[2]);
}

// ---- Strided tensors, walked in row-major order of the shape -------------------------------------------------------

struct Walk {
  const Strided& t;
  int64_t index[64] = {};  // torch's own limit on dimensions
  int64_t w = 0, g = 0, v = 0;

  Walk(const Strided& strided, int64_t begin) : t(strided) {
    for (int d = t.ndim - 1; d >= 0; d--) {
      index[d] = begin % t.shape[d];
      begin /= t.shape[d];
      move(d, index[d]);
    }
  }
  void move(int d, int64_t by) {
    w += by * t.w[d];
    g += by * t.g[d];
    if (t.v) v += by * t.v[d];
  }
  void step() {
    for (int d = t.ndim - 1; d >= 0; d--) {
      if (++index[d] < t.shape[d]) return move(d, 1);
      index[d] = 0;
      move(d, 1 - t.shape[d]);
    }
  }
};

// ---- One chunk
// ---------------------------------------------------------------------------------------------------------

// Coordinates of a block: what is staged between memory and arithmetic stays in L1.
constexpr int kBlock = 512;

template <class R> SgdCoefficients<R> coefficients(const SgdHyper& h) {
  return {(R)h.lr, (R)h.momentum, (R)(1 - h.dampening), (R)h.weight_decay,
          (R)(h.maximize ? -h.inverse_scale : h.inverse_scale)};
}

// Storage that arithmetic cannot use is widened into a block, updated there and narrowed on the way back. The sums wait
// for the rounded weights.
template <class Rule, class T>
void run_narrow(const SgdCoefficients<float>& h, T* w, const T* g, T* v, int n, bool measured, Slots& slots) {
  alignas(64) float w_real[kBlock], g_real[kBlock], v_real[kBlock], old[kBlock];
  Sums none;
  widen_block(w_real, w, n);
  widen_block(g_real, g, n);
  if constexpr (Rule::reads_v) widen_block(v_real, v, n);
  if (measured) __builtin_memcpy(old, w_real, n * sizeof(float));
  run<Rule, false>(h, w_real, g_real, v_real, n, none);
  narrow_block(w, w_real, n);
  if constexpr (Rule::writes_v) narrow_block(v, v_real, n);
  if (!measured) return;
  widen_block(w_real, w, n);
  slots.each(n, [&](int64_t k, int64_t size, Sums& sums) { measure(old + k, g_real + k, w_real + k, size, sums); });
}

template <class Rule, class T>
void run_dense(const SgdCoefficients<Real<T>>& h, T* w, const T* g, T* v, int64_t n, bool measured, Slots& slots) {
  if constexpr (sizeof(T) == sizeof(Real<T>)) {
    run_slots<Rule>(h, w, g, v, n, measured, slots);
  } else {
    for (int64_t i = 0; i < n; i += kBlock)
      run_narrow<Rule>(h, w + i, g + i, v + i, n - i < kBlock ? (int)(n - i) : kBlock, measured, slots);
  }
}

// Strided memory is gathered into a block that is dense, and scattered from it.
template <class Rule, class T>
void run_strided(const SgdCoefficients<Real<T>>& h, const Chunk& c, Slots& slots) {
  alignas(64) T w[kBlock], g[kBlock], v[kBlock];
  for (int64_t i = 0; i < c.size; i += kBlock) {
    const int n = c.size - i < kBlock ? (int)(c.size - i) : kBlock;
    Walk from(*c.strided, c.begin + i), to = from;
    for (int k = 0; k < n; k++, from.step()) {
      w[k] = ((const T*)c.w)[from.w];
      g[k] = ((const T*)c.g)[from.g];
      if constexpr (Rule::reads_v) v[k] = ((const T*)c.v)[from.v];
    }
    run_dense<Rule>(h, w, g, v, n, c.sums != nullptr, slots);
    for (int k = 0; k < n; k++, to.step()) {
      ((T*)c.w)[to.w] = w[k];
      if constexpr (Rule::writes_v) ((T*)c.v)[to.v] = v[k];
    }
  }
}

template <class Rule, class T> void sgd(const Chunk& c) {
  const auto h = coefficients<Real<T>>(*c.hyper);
  Slots slots(c);
  if (c.strided)
    run_strided<Rule, T>(h, c, slots);
  else
    run_dense<Rule>(h, (T*)c.w, (const T*)c.g, (T*)c.v, c.size, c.sums != nullptr, slots);
  if (c.sums) slots.finish();
}

template <class Rule, class... Types> constexpr void fill_row(void (**row)(const Chunk&), List<Types...>) {
  ((*row++ = sgd<Rule, Types>), ...);
}
template <class... Rules, class... Types> constexpr Isa fill(List<Rules...>, List<Types...> types) {
  Isa isa{};
  int r = 0;
  (fill_row<Rules>(isa.sgd[r++], types), ...);
  return isa;
}

}  // namespace

extern const Isa table;
const Isa table = fill(SgdRules{}, StorageTypes{});

}  // namespace nk::cpu::NK_ISA
