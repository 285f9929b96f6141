// loops.cpp - the coordinate loops, compiled once for each ISA level, in a namespace of its own (NK_ISA).
//
// No torch, no STL: formulas.h applied to several coordinates at a time (simd.h).
#include "kernels.h"
#include "simd.h"

namespace nk::cpu::NK_ISA {

namespace {

using Lanes = Eight<double>;

// ---- Statistics ------------------------------------------------------------------------------------------

template <int N> struct Sums {
  Lanes s[N];

  Sums() {
    for (Lanes& x : s) x = Lanes::all(0.0);
  }

  void flush(double* out, const Hyper& hyper, bool is_gauged) {
    double sums[N];
    for (int j = 0; j < N; j++) {
      sums[j] = total(s[j]);
      s[j] = Lanes::all(0.0);
    }
    in_user_units<N>(sums, hyper, is_gauged);
    for (int j = 0; j < N; j++) out[j] = sums[j];
  }
};

// Cuts a chunk's coordinates, which come in one or more portions, into runs that belong to one slot each.
template <int N> class Slots {
 public:
  Slots(const Chunk& c, bool is_gauged)
      : out_(c.sums),
        columns_(c.columns),
        slot_size_(c.slot_size),
        left_(c.slot_size),
        hyper_(*c.hyper),
        is_gauged_(is_gauged) {}

  template <class Run> void each(int64_t n, Run run) {  // run(begin, size, sums)
    for (int64_t k = 0; k < n;) {
      const int64_t size = left_ < n - k ? left_ : n - k;
      run(k, size, sums_);
      k += size;
      left_ -= size;
      if (left_ == 0) next();
    }
  }
  void finish() {
    if (left_ != slot_size_) next();
  }

 private:
  void next() {
    sums_.flush(out_, hyper_, is_gauged_);
    out_ += columns_;
    left_ = slot_size_;
  }
  Sums<N> sums_;
  double* out_;
  int columns_;
  int64_t slot_size_, left_;
  const Hyper& hyper_;
  bool is_gauged_;
};

// ---- The update ------------------------------------------------------------------------------------------

// Where the coordinates of a run begin: weights, gradient, buffer, first gradient of a pair.
template <class T> struct Streams {
  T* w;
  const T* g;
  T* v;
  const T* h;
  NK_HD Streams at(int64_t i) const { return {w + i, g + i, v + i, h + i}; }
};

// N coordinates, both halves of a measured step in one go: the arithmetic of the sums hides behind the loads of the
// next coordinates. As two loops over an L1-sized block the same sums cost 15 to 20 % of the step; so, 0 to 5 %.
template <class Rule, Measure kMeasure, int N, class R, class T>
NK_HD void step(const Coefficients<Side<R, N>>& c, const Streams<T>& t, Lanes* s) {
  const Side<R, N> w_old = load(t.w, Width<N>{});
  Side<R, N> grad = load(t.g, Width<N>{}), first, second;
  if constexpr (kMeasure == Measure::pair) {
    first = c.first_scale * load(t.h, Width<N>{});
    second = c.second_scale * grad;
    grad = svag_combination(c, first, second);
  }
  Side<R, N> w_new = w_old, buffer;
  if constexpr (Rule::reads_v) buffer = load(t.v, Width<N>{});
  Rule::apply(c, w_new, grad, buffer);
  if constexpr (Rule::writes_w) w_new = store(t.w, w_new);
  if constexpr (Rule::gauged && kMeasure != Measure::nothing) w_new = c.unkeep * w_new;
  if constexpr (Rule::writes_v) store(t.v, buffer);
  for (int k = 0; k < N / kLanes; k++) {
    if constexpr (kMeasure != Measure::nothing)
      StepSums::add(s, eight_doubles(w_old, k), eight_doubles(grad, k), eight_doubles(w_new, k));
    if constexpr (kMeasure == Measure::pair)
      PairSums::add(s + StepSums::count, eight_doubles(first, k), eight_doubles(second, k));
  }
}

template <int N, class R> NK_HD Coefficients<Side<R, N>> side_by_side(const Coefficients<R>& c) {
  using S = Side<R, N>;
  return {S::all(c.lr),
          S::all(c.momentum),
          S::all(c.one_minus_dampening),
          S::all(c.weight_decay),
          S::all(c.grad_factor),
          S::all(c.first_scale),
          S::all(c.second_scale),
          S::all(c.half),
          S::all(c.spread),
          S::all(c.share),
          c.decays,
          c.first_only,
          S::all(c.keep),
          S::all(c.unkeep),
          S::all(c.grad_to_buffer),
          S::all(c.weight_to_buffer),
          S::all(c.grad_to_weight),
          S::all(c.buffer_to_weight),
          c.mixes,
          c.direct};
}

template <class Rule, Measure kMeasure, class T>
void run(const Coefficients<Real<T>>& scalars, const Streams<T>& t, int64_t n, Sums<kSums<kMeasure>>& sums) {
  using R = Real<T>;
  constexpr int kLine = 64 / sizeof(T);  // coordinates in a cache line
  // Of 1 to 8 KB ahead, 2 KB measured best, by a few per cent over what the hardware fetches by itself.
  constexpr int kAhead = 2048 / sizeof(T);
  constexpr int kWide = kAtATime<R> < kLine ? kAtATime<R> : kLine;
  const auto wide = side_by_side<kWide>(scalars);
  const auto eight = side_by_side<kLanes>(scalars);
  Lanes s[kSums<kMeasure>];
  for (int j = 0; j < kSums<kMeasure>; j++) s[j] = sums.s[j];
  int64_t i = 0;
  for (; i + kLine <= n; i += kLine) {
    __builtin_prefetch(t.w + i + kAhead, Rule::writes_w);
    __builtin_prefetch(t.g + i + kAhead, 0);
    if constexpr (Rule::writes_v) __builtin_prefetch(t.v + i + kAhead, 1);
    if constexpr (kMeasure == Measure::pair) __builtin_prefetch(t.h + i + kAhead, 0);
    for (int k = 0; k < kLine; k += kWide) step<Rule, kMeasure>(wide, t.at(i + k), s);
  }
  for (; i + kLanes <= n; i += kLanes) step<Rule, kMeasure>(eight, t.at(i), s);
  if (i < n) {  // the same step on a copy, padded with zeros, which add nothing to the sums
    const int rest = (int)(n - i);
    T w[kLanes] = {}, g[kLanes] = {}, v[kLanes] = {}, h[kLanes] = {};
    for (int k = 0; k < rest; k++) {
      w[k] = t.w[i + k], g[k] = t.g[i + k];
      if constexpr (Rule::reads_v) v[k] = t.v[i + k];
      if constexpr (kMeasure == Measure::pair) h[k] = t.h[i + k];
    }
    step<Rule, kMeasure>(eight, Streams<T>{w, g, v, h}, s);
    for (int k = 0; k < rest; k++) {
      if constexpr (Rule::writes_w) t.w[i + k] = w[k];
      if constexpr (Rule::writes_v) t.v[i + k] = v[k];
    }
  }
  for (int j = 0; j < kSums<kMeasure>; j++) sums.s[j] = s[j];
}

template <class Rule, Measure kMeasure, class T>
void run_slots(const Coefficients<Real<T>>& c, const Streams<T>& t, int64_t n, Slots<kSums<kMeasure>>* slots) {
  if constexpr (kMeasure == Measure::nothing) {
    Sums<kSums<kMeasure>> none;
    run<Rule, kMeasure>(c, t, n, none);
  } else {
    slots->each(n, [&](int64_t k, int64_t size, auto& sums) { run<Rule, kMeasure>(c, t.at(k), size, sums); });
  }
}

// ---- Strided tensors, walked in row-major order of the shape -------------------------------------------------------

struct Walk {
  const Strided& t;
  int64_t index[64] = {};  // torch's own limit on dimensions
  int64_t w = 0, g = 0, v = 0, h = 0;

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
    if (t.h) h += by * t.h[d];
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

// Strided memory is gathered into a block that is dense and stays in L1, and scattered from it.
template <class Rule, Measure kMeasure, class T>
void run_strided(const Coefficients<Real<T>>& c, const Chunk& chunk, Slots<kSums<kMeasure>>* slots) {
  constexpr int kBlock = 512;
  alignas(64) T w[kBlock], g[kBlock], v[kBlock], h[kBlock];
  for (int64_t i = 0; i < chunk.size; i += kBlock) {
    const int n = chunk.size - i < kBlock ? (int)(chunk.size - i) : kBlock;
    Walk from(*chunk.strided, chunk.begin + i), to = from;
    for (int k = 0; k < n; k++, from.step()) {
      w[k] = ((const T*)chunk.w)[from.w];
      g[k] = ((const T*)chunk.g)[from.g];
      if constexpr (Rule::reads_v) v[k] = ((const T*)chunk.v)[from.v];
      if constexpr (kMeasure == Measure::pair) h[k] = ((const T*)chunk.h)[from.h];
    }
    run_slots<Rule, kMeasure>(c, Streams<T>{w, g, v, h}, n, slots);
    for (int k = 0; k < n; k++, to.step()) {
      if constexpr (Rule::writes_w) ((T*)chunk.w)[to.w] = w[k];
      if constexpr (Rule::writes_v) ((T*)chunk.v)[to.v] = v[k];
    }
  }
}

template <class Rule, Measure kMeasure, class T> void run_chunk(const Chunk& c, Slots<kSums<kMeasure>>* slots) {
  const auto numbers = coefficients<Real<T>>(*c.hyper, kMeasure == Measure::pair, Rule::gauged);
  if (c.strided)
    run_strided<Rule, kMeasure, T>(numbers, c, slots);
  else
    run_slots<Rule, kMeasure>(numbers, Streams<T>{(T*)c.w, (const T*)c.g, (T*)c.v, (const T*)c.h}, c.size, slots);
}

template <class Rule, Measure kMeasure, class T> void measured(const Chunk& c) {
  Slots<kSums<kMeasure>> slots(c, Rule::gauged);
  run_chunk<Rule, kMeasure, T>(c, &slots);
  slots.finish();
}

template <class Rule, class T> void one(const Chunk& c) {
  if (c.sums) return measured<Rule, Measure::step, T>(c);
  run_chunk<Rule, Measure::nothing, T>(c, nullptr);
}
template <class Rule, class T> void pair(const Chunk& c) { measured<Rule, Measure::pair, T>(c); }

using Loop = void (*)(const Chunk&);
template <class Rule, class... Types> constexpr void fill_row(Loop* row, List<Types...>) {
  ((*row++ = one<Rule, Types>), ...);
}
template <class Rule, class... Types> constexpr void fill_pair_row(Loop* row, List<Types...>) {
  ((*row++ = pair<Rule, Types>), ...);
}
template <class... Types> constexpr void fill_kernels(Isa& isa, List<Types...>) {
  int t = 0;
  isa.recentre[0] = recentre<double>, isa.recentre[1] = recentre<float>;
  ((isa.moments[t] = moments<Types>, isa.sum[t] = sum<Types>, isa.norm_columns[t] = norm_columns<Types>,
    isa.norm_rows[t] = norm_rows<Types>, isa.embedding_row[t++] = embedding_row<Types>),
   ...);
}
template <class... All, class... Steps> constexpr Isa fill(List<All...>, List<Steps...>) {
  Isa isa{};
  fill_kernels(isa, StorageTypes{});
  int r = 0;
  (fill_row<All>(isa.run[r++], StorageTypes{}), ...);
  r = 0;
  (fill_pair_row<Steps>(isa.run_pair[r++], StorageTypes{}), ...);
  isa.outer = outer;
  isa.conv = conv;
  return isa;
}

}  // namespace

const Isa table = fill(Rules{}, StepRules{});

}  // namespace nk::cpu::NK_ISA
