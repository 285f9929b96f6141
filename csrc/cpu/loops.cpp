// loops.cpp - the coordinate loops, compiled once for each ISA level, in a namespace of its own (NK_ISA).
//
// No torch, no STL: formulas.h applied to several coordinates at a time (simd.h).
#include "kernels.h"
#include "streams.h"

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

// N coordinates, both halves of a measured step in one go: the arithmetic of the sums hides behind the loads of the
// next coordinates. As two loops over an L1-sized block the same sums cost 15 to 20 % of the step; so, 0 to 5 %.
template <class Rule, Measure kMeasure, int N, class R, class At>
NK_HD void step(const Coefficients<Side<R, N>>& c, const At& t, Lanes* s) {
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

template <class Rule, Measure kMeasure, class R, class W, class G, class V, int kItem>
void run(const Coefficients<R>& scalars, const Streams<W, G, V, kItem>& t, int64_t n, Sums<kSums<kMeasure>>& sums) {
  using At = Streams<W, G, V, kItem>;
  constexpr int kLine = At::kLine, kAhead = At::kAhead, kWide = kAtATime<R> < kLine ? kAtATime<R> : kLine;
  const auto wide = side_by_side<kWide>(scalars);
  const auto eight = side_by_side<kLanes>(scalars);
  Lanes s[kSums<kMeasure>];
  for (int j = 0; j < kSums<kMeasure>; j++) s[j] = sums.s[j];
  int64_t i = 0;
  for (; i + kLine <= n; i += kLine) {
    prefetch<Rule::writes_w>(t.w + (i + kAhead));
    prefetch<false>(t.g + (i + kAhead));
    if constexpr (Rule::writes_v) prefetch<true>(t.v + (i + kAhead));
    if constexpr (kMeasure == Measure::pair) prefetch<false>(t.h + (i + kAhead));
    for (int k = 0; k < kLine; k += kWide) step<Rule, kMeasure>(wide, t.at(i + k), s);
  }
  for (; i + kLanes <= n; i += kLanes) step<Rule, kMeasure>(eight, t.at(i), s);
  if (i < n) {  // the same step on a copy, padded with zeros, which add nothing to the sums
    const int rest = (int)(n - i);
    const At from = t.at(i);
    Padded<W> w;
    Padded<G> g, h;
    Padded<V> v;
    const At copy{w.in(from.w, rest), g.in(from.g, rest), v.in(from.v, Rule::reads_v ? rest : 0),
                  h.in(from.h, kMeasure == Measure::pair ? rest : 0)};
    step<Rule, kMeasure>(eight, copy, s);
    if constexpr (Rule::writes_w) w.out(from.w, rest);
    if constexpr (Rule::writes_v) v.out(from.v, rest);
  }
  for (int j = 0; j < kSums<kMeasure>; j++) sums.s[j] = s[j];
}

template <class Rule, Measure kMeasure, class R, class At>
void run_slots(const Coefficients<R>& c, const At& t, int64_t n, Slots<kSums<kMeasure>>* slots) {
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
  int64_t w = 0, g = 0, v = 0, h = 0, master = 0;

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
    if (t.master) master += by * t.master[d];
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
    run_slots<Rule, kMeasure>(c, Uniform<T>{w, g, v, h}, n, slots);
    for (int k = 0; k < n; k++, to.step()) {
      if constexpr (Rule::writes_w) ((T*)chunk.w)[to.w] = w[k];
      if constexpr (Rule::writes_v) ((T*)chunk.v)[to.v] = v[k];
    }
  }
}

template <class Rule, Measure kMeasure, class T> void run_chunk(const Chunk& c, Slots<kSums<kMeasure>>* slots) {
  const auto numbers = coefficients<Real<T>>(*c.hyper, kMeasure == Measure::pair, Rule::gauged, c.of_lr);
  if (c.strided)
    run_strided<Rule, kMeasure, T>(numbers, c, slots);
  else
    run_slots<Rule, kMeasure>(numbers, Uniform<T>{(T*)c.w, (const T*)c.g, (T*)c.v, (const T*)c.h}, c.size, slots);
}

template <class Rule, Measure kMeasure, class T> void measured(const Chunk& c) {
  Slots<kSums<kMeasure>> slots(c, Rule::gauged);
  run_chunk<Rule, kMeasure, T>(c, &slots);
  slots.finish();
}

// ---- One chunk whose streams are stored differently
// -------------------------------------------------------------------

template <Measure kMeasure> struct Constant {
  constexpr Measure operator()() const { return kMeasure; }
};
Any any(const void* p, DType dtype) { return {(char*)p, dtype}; }

// In blocks, for which there are random bits in L1 if the weights want some.
template <class Rule, Measure kMeasure> class Mixed {
 public:
  Mixed(const Chunk& c, Slots<kSums<kMeasure>>* slots)
      : c_(c),
        slots_(slots),
        numbers_(coefficients<float>(*c.hyper, kMeasure == Measure::pair, Rule::gauged, c.of_lr)),
        block_({c.hyper->rounding.seed, c.parameter, c.hyper->rounding.step}) {}

  void run() {
    if (c_.strided) return run_strided();
    const bool is_bf16 = c_.rounds_at_random && (!Rule::writes_v || c_.v_dtype == DType::bf16);
    for (int64_t i = 0, n; i < c_.size; i += n) {
      n = c_.size - i;
      const uint16_t* bits = next(i, n);
      if (is_bf16) {  // the most common kind is worth a loop that asks nothing
        using At = Streams<AtRandom, const bf16*, bf16*, sizeof(bf16)>;
        const At all{{(bf16*)c_.w + i, bits}, (const bf16*)c_.g + i, (bf16*)c_.v + i, (const bf16*)c_.h + i};
        run_slots<Rule, kMeasure>(numbers_, all, n, slots_);
      } else {
        const Weights w{any(c_.w, c_.dtype) + i, c_.master ? c_.master + i : nullptr, bits};
        run_slots<Rule, kMeasure>(
            numbers_, At{w, any(c_.g, c_.dtype) + i, any(c_.v, c_.v_dtype) + i, any(c_.h, c_.dtype) + i}, n, slots_);
      }
    }
  }

 private:
  using At = Streams<Weights, Any, Any, 2>;

  // Random bits for the next coordinates from the i-th of the chunk, and how many those are.
  const uint16_t* next(int64_t i, int64_t& n) {
    if (!c_.rounds_at_random) return nullptr;
    const int64_t most = RandomBlock::most(c_.begin + i);
    n = n < most ? n : most;
    return block_.fill(c_.begin + i, n);
  }

  void run_strided() {
    constexpr int kBlock = 512;  // of random bits there is one block or a part
    alignas(64) float w[kBlock], g[kBlock], v[kBlock], h[kBlock], master[kBlock];
    const Weights weights{any(w, c_.dtype), c_.master ? master : nullptr, nullptr};
    const Any grad = any(g, c_.dtype), buffer = any(v, c_.v_dtype), held = any(h, c_.dtype);
    for (int64_t i = 0, n; i < c_.size; i += n) {
      n = c_.size - i < kBlock ? c_.size - i : kBlock;
      const uint16_t* bits = next(i, n);
      Walk from(*c_.strided, c_.begin + i), to = from;
      for (int k = 0; k < n; k++, from.step()) {
        copy_item(weights.stored + k, any(c_.w, c_.dtype) + from.w);
        copy_item(grad + k, any(c_.g, c_.dtype) + from.g);
        if (c_.master) master[k] = c_.master[from.master];
        if constexpr (Rule::reads_v) copy_item(buffer + k, any(c_.v, c_.v_dtype) + from.v);
        if constexpr (kMeasure == Measure::pair) copy_item(held + k, any(c_.h, c_.dtype) + from.h);
      }
      run_slots<Rule, kMeasure>(numbers_, At{{weights.stored, weights.master, bits}, grad, buffer, held}, n, slots_);
      for (int k = 0; k < n; k++, to.step()) {
        copy_item(any(c_.w, c_.dtype) + to.w, weights.stored + k);
        if (c_.master) c_.master[to.master] = master[k];
        if constexpr (Rule::writes_v) copy_item(any(c_.v, c_.v_dtype) + to.v, buffer + k);
      }
    }
  }
  static void copy_item(Any to, Any from) { __builtin_memcpy(to.p, from.p, from.item()); }

  const Chunk& c_;
  Slots<kSums<kMeasure>>* slots_;
  Coefficients<float> numbers_;
  RandomBlock block_;
};

template <class Rule> void mixed(const Chunk& c) {
  const auto measured = [&](auto measure) {
    Slots<kSums<measure()>> slots(c, Rule::gauged);
    Mixed<Rule, measure()>(c, &slots).run();
    slots.finish();
  };
  if (c.h) return measured(Constant<Measure::pair>{});
  if (c.sums) return measured(Constant<Measure::step>{});
  Mixed<Rule, Measure::nothing>(c, nullptr).run();
}

// ---- The table ---------------------------------------------------------------------------------------------------

template <class Rule, class T> void one(const Chunk& c) {
  if (c.sums) return measured<Rule, Measure::step, T>(c);
  run_chunk<Rule, Measure::nothing, T>(c, nullptr);
}
template <class Rule, class T> void pair(const Chunk& c) { measured<Rule, Measure::pair, T>(c); }

// ---- |g|^2 alone ------------------------------------------------------------------------------------------

// What lies anywhere, or is made of two, comes through a block that is dense and stays in L1.
template <class T> double sq_norm_by_blocks(const Chunk& chunk) {
  using R = Real<T>;
  constexpr int kBlock = 512;
  alignas(64) T g[kBlock], h[kBlock];
  alignas(64) R combined[kBlock];
  const auto c = side_by_side<kLanes>(coefficients<R>(*chunk.hyper, true, false, chunk.of_lr));
  double sum = 0;
  for (int64_t i = 0; i < chunk.size; i += kBlock) {
    const int n = chunk.size - i < kBlock ? (int)(chunk.size - i) : kBlock;
    const T *from_g = (const T*)chunk.g + i, *from_h = (const T*)chunk.h + i;
    if (chunk.strided) {
      Walk at(*chunk.strided, chunk.begin + i);
      for (int k = 0; k < n; k++, at.step()) {
        g[k] = ((const T*)chunk.g)[at.g];
        if (chunk.h) h[k] = ((const T*)chunk.h)[at.h];
      }
      from_g = g, from_h = h;
    } else if (n < kBlock) {  // whole lanes are read
      __builtin_memcpy(g, from_g, n * sizeof(T));
      if (chunk.h) __builtin_memcpy(h, from_h, n * sizeof(T));
      from_g = g, from_h = h;
    }
    if (!chunk.h) {
      sum += nk::cpu::NK_ISA::sum<T>(from_g, n, true);
      continue;
    }
    for (int k = n; k < kBlock && k % kLanes; k++) g[k] = h[k] = T{};
    for (int k = 0; k < n; k += kLanes)
      store(combined + k, svag_combination(c, c.first_scale * load(from_h + k, Width<kLanes>{}),
                                           c.second_scale * load(from_g + k, Width<kLanes>{})));
    sum += nk::cpu::NK_ISA::sum<R>(combined, n, true);
  }
  return sum;
}

template <class T> void sq_norm(const Chunk& c) {
  const double sum = c.strided || c.h ? sq_norm_by_blocks<T>(c) : nk::cpu::NK_ISA::sum<T>(c.g, c.size, true);
  *c.sums = c.h ? sq_norm_in_user_units<kSums<Measure::pair>>(sum, *c.hyper, is_gauged(c.rule))
                : sq_norm_in_user_units<kSums<Measure::step>>(sum, *c.hyper, is_gauged(c.rule));
}

// ---- The table --------------------------------------------------------------------------------------------

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
  ((isa.moments[t] = moments<Types>, isa.sum[t] = sum<Types>, isa.sq_norm[t] = sq_norm<Types>,
    isa.norm_columns[t] = norm_columns<Types>, isa.norm_rows[t] = norm_rows<Types>,
    isa.embedding_row[t++] = embedding_row<Types>),
   ...);
}
template <class... All, class... Steps> constexpr Isa fill(List<All...>, List<Steps...>) {
  Isa isa{};
  fill_kernels(isa, StorageTypes{});
  int r = 0;
  (fill_row<All>(isa.run[r++], StorageTypes{}), ...);
  r = 0;
  (fill_pair_row<Steps>(isa.run_pair[r++], StorageTypes{}), ...);
  r = 0;
  ((isa.run_mixed[r++] = mixed<Steps>), ...);
  isa.outer = outer;
  isa.conv = conv;
  return isa;
}

}  // namespace

const Isa table = fill(Rules{}, StepRules{});

}  // namespace nk::cpu::NK_ISA
