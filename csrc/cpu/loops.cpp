// loops.cpp - the coordinate loops, compiled once for each ISA level, in a namespace of its own (NK_ISA).
//
// No torch, no STL: formulas.h applied to several coordinates at a time (simd.h).
#include "isa.h"
#include "simd.h"

namespace nk::cpu::NK_ISA {
namespace {

using Lanes = Eight<double>;

// ---- Statistics ------------------------------------------------------------------------------------------

struct Sums {
  Lanes s[StepSums::count];

  Sums() {
    for (Lanes& x : s) x = Lanes::all(0.0);
  }

  void flush(double* out, double inverse_scale) {
    double total[StepSums::count];
    for (int j = 0; j < StepSums::count; j++) {
      const Lanes& x = s[j];
      total[j] = ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7]));
      s[j] = Lanes::all(0.0);
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

// ---- The update ------------------------------------------------------------------------------------------

// N coordinates, both halves of a measured step in one go: the arithmetic of the sums hides behind the loads of the
// next coordinates. As two loops over an L1-sized block the same sums cost 15 to 20 % of the step; so, 0 to 5 %.
template <class Rule, bool kMeasure, int N, class R, class T>
NK_HD void step(const SgdCoefficients<Side<R, N>>& c, T* w, const T* g, T* v, Lanes (&s)[StepSums::count]) {
  const Side<R, N> w_old = load(w, Width<N>{}), grad = load(g, Width<N>{});
  Side<R, N> w_new = w_old, buffer;
  if constexpr (Rule::reads_v) buffer = load(v, Width<N>{});
  Rule::apply(c, w_new, grad, buffer);
  w_new = store(w, w_new);
  if constexpr (Rule::writes_v) store(v, buffer);
  if constexpr (kMeasure)
    for (int k = 0; k < N / kLanes; k++)
      StepSums::add(s, eight_doubles(w_old, k), eight_doubles(grad, k), eight_doubles(w_new, k));
}

template <int N, class R> NK_HD SgdCoefficients<Side<R, N>> side_by_side(const SgdCoefficients<R>& c) {
  using S = Side<R, N>;
  return {S::all(c.lr),           S::all(c.momentum),    S::all(c.one_minus_dampening),
          S::all(c.weight_decay), S::all(c.grad_factor), c.decays};
}

template <class Rule, bool kMeasure, class T>
void run(const SgdCoefficients<Real<T>>& scalars, T* w, const T* g, T* v, int64_t n, Sums& sums) {
  using R = Real<T>;
  constexpr int kLine = 64 / sizeof(T);  // coordinates in a cache line
  // Of 1 to 8 KB ahead, 2 KB measured best, by a few per cent over what the hardware fetches by itself.
  constexpr int kAhead = 2048 / sizeof(T);
  constexpr int kWide = kAtATime<R> < kLine ? kAtATime<R> : kLine;
  const auto wide = side_by_side<kWide>(scalars);
  const auto eight = side_by_side<kLanes>(scalars);
  Lanes s[StepSums::count];
  for (int j = 0; j < StepSums::count; j++) s[j] = sums.s[j];
  int64_t i = 0;
  for (; i + kLine <= n; i += kLine) {
    __builtin_prefetch(w + i + kAhead, 1);
    __builtin_prefetch(g + i + kAhead, 0);
    if constexpr (Rule::writes_v) __builtin_prefetch(v + i + kAhead, 1);
    for (int k = 0; k < kLine; k += kWide) step<Rule, kMeasure>(wide, w + i + k, g + i + k, v + i + k, s);
  }
  for (; i + kLanes <= n; i += kLanes) step<Rule, kMeasure>(eight, w + i, g + i, v + i, s);
  if (i < n) {  // the same step on a copy, padded with zeros, which add nothing to the sums
    const int rest = (int)(n - i);
    T w_rest[kLanes] = {}, g_rest[kLanes] = {}, v_rest[kLanes] = {};
    for (int k = 0; k < rest; k++) {
      w_rest[k] = w[i + k], g_rest[k] = g[i + k];
      if constexpr (Rule::reads_v) v_rest[k] = v[i + k];
    }
    step<Rule, kMeasure>(eight, w_rest, g_rest, v_rest, s);
    for (int k = 0; k < rest; k++) {
      w[i + k] = w_rest[k];
      if constexpr (Rule::writes_v) v[i + k] = v_rest[k];
    }
  }
  for (int j = 0; j < StepSums::count; j++) sums.s[j] = s[j];
}

template <class Rule, class T>
void run_slots(const SgdCoefficients<Real<T>>& c, T* w, const T* g, T* v, int64_t n, Slots* slots) {
  if (!slots) {
    Sums none;
    return run<Rule, false>(c, w, g, v, n, none);
  }
  slots->each(n, [&](int64_t k, int64_t size, Sums& sums) { run<Rule, true>(c, w + k, g + k, v + k, size, sums); });
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

// ---- One chunk -------------------------------------------------------------------------------------------

template <class R> SgdCoefficients<R> coefficients(const SgdHyper& h) {
  return {(R)h.lr,
          (R)h.momentum,
          (R)(1 - h.dampening),
          (R)h.weight_decay,
          (R)(h.maximize ? -h.inverse_scale : h.inverse_scale),
          h.weight_decay != 0};
}

// Strided memory is gathered into a block that is dense and stays in L1, and scattered from it.
template <class Rule, class T>
void run_strided(const SgdCoefficients<Real<T>>& h, const Chunk& c, Slots* slots) {
  constexpr int kBlock = 512;
  alignas(64) T w[kBlock], g[kBlock], v[kBlock];
  for (int64_t i = 0; i < c.size; i += kBlock) {
    const int n = c.size - i < kBlock ? (int)(c.size - i) : kBlock;
    Walk from(*c.strided, c.begin + i), to = from;
    for (int k = 0; k < n; k++, from.step()) {
      w[k] = ((const T*)c.w)[from.w];
      g[k] = ((const T*)c.g)[from.g];
      if constexpr (Rule::reads_v) v[k] = ((const T*)c.v)[from.v];
    }
    run_slots<Rule>(h, w, g, v, n, slots);
    for (int k = 0; k < n; k++, to.step()) {
      ((T*)c.w)[to.w] = w[k];
      if constexpr (Rule::writes_v) ((T*)c.v)[to.v] = v[k];
    }
  }
}

template <class Rule, class T> void run_chunk(const Chunk& c, Slots* slots) {
  const auto h = coefficients<Real<T>>(*c.hyper);
  if (c.strided)
    run_strided<Rule, T>(h, c, slots);
  else
    run_slots<Rule>(h, (T*)c.w, (const T*)c.g, (T*)c.v, c.size, slots);
}

template <class Rule, class T> void sgd(const Chunk& c) {
  if (!c.sums) return run_chunk<Rule, T>(c, nullptr);
  Slots slots(c);
  run_chunk<Rule, T>(c, &slots);
  slots.finish();
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
