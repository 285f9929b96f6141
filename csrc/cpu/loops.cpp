// loops.cpp - the coordinate loops, compiled once for each ISA level, in a namespace of its own (NK_ISA).
//
// No torch, no STL: formulas.h applied to several coordinates at a time (simd.h).
#include "kernels.h"
#include "streams.h"
#include "strided.h"

namespace nk::cpu::NK_ISA {

namespace {

using Lanes = Eight<double>;

template <Measure kMeasure> struct Constant {
  constexpr Measure operator()() const { return kMeasure; }
};

// ---- Statistics ------------------------------------------------------------------------------------------

template <int N> struct Sums {
  Lanes s[N];

  Sums() {
    for (Lanes& x : s) x = Lanes::all(0.0);
  }

  // Every loop over sums is written out: g++ would make copies of memory of them, which cost as much as a short row.
  void flush(double* out, const Hyper& hyper, bool is_gauged) {
    double sums[N];
#pragma GCC unroll 16
    for (int j = 0; j < N; j++) {
      sums[j] = total(s[j]);
      s[j] = Lanes::all(0.0);
    }
    in_user_units<N>(sums, hyper, is_gauged);
#pragma GCC unroll 16
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

// The coefficients of a rule and, of a pair, of its combination; R a number, or several side by side.
template <class Rule, Measure kMeasure, class R> struct StepNumbers {
  typename Rule::template Coefficients<R> rule;
  PairCoefficients<R> pair;
  R unkeep;  // of a gauged rule

  static StepNumbers from(const Chunk& c) {
    return {coefficients<Rule, R>(*c.hyper, kMeasure == Measure::pair, c.numbers, c.turn),
            PairCoefficients<R>::from(*c.hyper), (R)c.hyper->gauge.unkeep};
  }
  template <int N> NK_HD StepNumbers<Rule, kMeasure, Side<R, N>> side_by_side() const {
    using S = Side<R, N>;
    return {rule.template broadcast<S>(), pair.template broadcast<S>(), S::all(unkeep)};
  }
};

// N coordinates, both halves of a measured step in one go: the arithmetic of the sums hides behind the loads of the
// next coordinates. As two loops over an L1-sized block the same sums cost 15 to 20 % of the step; so, 0 to 5 %.
template <class Rule, Measure kMeasure, int N, class R, class At>
NK_HD void step(const StepNumbers<Rule, kMeasure, Side<R, N>>& c, const At& t, Lanes* s) {
  constexpr int kBuffers = Rule::traits.buffers;
  const Side<R, N> w_old = load(t.w, Width<N>{});
  Side<R, N> grad = load(t.g, Width<N>{}), first, second;
  if constexpr (kMeasure == Measure::pair) {
    first = c.pair.first_scale * load(t.h, Width<N>{});
    second = c.pair.second_scale * grad;
    grad = c.pair.combination(first, second);
  }
  Side<R, N> w_new = w_old, state[kRoom<Rule>], direction;
  if constexpr (Rule::traits.reads_buffers)
    for (int k = 0; k < kBuffers; k++) state[k] = load(t.v[k], Width<N>{});
  if constexpr (Rule::traits.keeps_norm)
    Rule::apply(c.rule, w_new, grad, state);
  else
    apply<Rule>(c.rule, w_new, grad, state);
  if constexpr (Rule::traits.writes_w) w_new = store(t.w, w_new);
  if constexpr (Rule::traits.is_gauged && kMeasure != Measure::nothing) w_new = c.unkeep * w_new;
  if constexpr (Rule::traits.writes_buffers)
    for (int k = 0; k < kBuffers; k++) state[k] = store(t.v[k], state[k]);
  if constexpr (Rule::traits.sums_direction) direction = Rule::direction(c.rule, grad, state);
  for (int k = 0; k < N / kLanes; k++) {
    if constexpr (Rule::traits.sums_direction)
      StepSums::add_direction(s, eight_doubles(w_old, k), eight_doubles(direction, k));
    else if constexpr (kMeasure != Measure::nothing)
      StepSums::add(s, eight_doubles(w_old, k), eight_doubles(grad, k), eight_doubles(w_new, k));
    if constexpr (kMeasure == Measure::pair)
      PairSums::add(s + StepSums::count, eight_doubles(first, k), eight_doubles(second, k));
  }
}

template <class Rule, Measure kMeasure, class R, class W, class G, class V, int kItem>
void run(const StepNumbers<Rule, kMeasure, R>& scalars, const Streams<W, G, V, kItem, kRoom<Rule>> t, int64_t n,
         Sums<kSums<kMeasure>>* sums) {  // `t` by value: what is stored could change what a reference names
  using At = Streams<W, G, V, kItem, kRoom<Rule>>;
  constexpr Traits kTraits = Rule::traits;
  constexpr int kLine = At::kLine, kAhead = At::kAhead, kWide = kAtATime<R> < kLine ? kAtATime<R> : kLine;
  const auto wide = scalars.template side_by_side<kWide>();
  const auto eight = scalars.template side_by_side<kLanes>();
  Lanes s[kSums<kMeasure>];
  if constexpr (kMeasure != Measure::nothing)
#pragma GCC unroll 16
    for (int j = 0; j < kSums<kMeasure>; j++) s[j] = sums->s[j];
  int64_t i = 0;
  for (; i + kLine <= n; i += kLine) {
    prefetch<kTraits.writes_w>(t.w + (i + kAhead));
    if constexpr (kTraits.reads_grad || kMeasure != Measure::nothing) prefetch<false>(t.g + (i + kAhead));
    for (int k = 0; k < kTraits.buffers; k++) prefetch<kTraits.writes_buffers>(t.v[k] + (i + kAhead));
    if constexpr (kMeasure == Measure::pair) prefetch<false>(t.h + (i + kAhead));
    if constexpr (At::kUnrolls) {
      for (int k = 0; k < kLine; k += kWide) step<Rule, kMeasure>(wide, t.at(i + k), s);
    } else {
#pragma GCC unroll 1
      for (int k = 0; k < kLine; k += kWide) step<Rule, kMeasure>(wide, t.at(i + k), s);
    }
  }
#pragma GCC unroll 1
  for (; i < n; i += kLanes) {
    const At from = t.at(i);
    At now = from;
    const int rest = n - i < kLanes ? (int)(n - i) : 0;
    Padded<W> w;
    Padded<G> g, h;
    Padded<V> v[kRoom<Rule>];
    if (rest) {  // the same step on a copy, padded with what adds nothing to the sums
      now = {w.in(from.w, rest), g.in(from.g, rest), {}, h.in(from.h, kMeasure == Measure::pair ? rest : 0)};
      for (int k = 0; k < kRoom<Rule>; k++)
        now.v[k] = v[k].in(from.v[k], kTraits.reads_buffers ? rest : 0, kTraits.divides && k == kTraits.buffers - 1);
    }
    step<Rule, kMeasure>(eight, now, s);
    if (rest) {
      if constexpr (kTraits.writes_w) w.out(from.w, rest);
      if constexpr (kTraits.writes_buffers)
        for (int k = 0; k < kTraits.buffers; k++) v[k].out(from.v[k], rest);
    }
  }
  if constexpr (kMeasure != Measure::nothing)
#pragma GCC unroll 16
    for (int j = 0; j < kSums<kMeasure>; j++) sums->s[j] = s[j];
}

template <class Rule, Measure kMeasure, class R, class At>
void run_slots(const StepNumbers<Rule, kMeasure, R>& c, const At& t, int64_t n, Slots<kSums<kMeasure>>* slots) {
  if constexpr (kMeasure == Measure::nothing) {
    run(c, t, n, (Sums<kSums<kMeasure>>*)nullptr);
  } else {
    slots->each(n, [&](int64_t k, int64_t size, auto& sums) { run(c, t.at(k), size, &sums); });
  }
}

// ---- One chunk -------------------------------------------------------------------------------------------

// Strided memory is gathered into a block, and scattered from it.
template <class Rule, Measure kMeasure, class T>
void run_strided(const StepNumbers<Rule, kMeasure, Real<T>>& c, const Chunk& chunk, Slots<kSums<kMeasure>>* slots) {
  StridedBlock block;
  Uniform<T, Rule> all{(T*)block.w(), (const T*)block.g(), {}, (const T*)block.h()};
  for (int k = 0; k < kRoom<Rule>; k++) all.v[k] = (T*)block.v(k);
  for (int64_t i = 0, n; i < chunk.size; i += n) {
    n = chunk.size - i < kStridedBlock ? chunk.size - i : kStridedBlock;
    const Position at(*chunk.strided, chunk.begin + i);
    gather(chunk, Rule::traits, at, n, block);
    run_slots(c, all, n, slots);
    scatter(chunk, Rule::traits, at, n, block);
  }
}

template <class Rule, Measure kMeasure, class T> void run_chunk(const Chunk& c, Slots<kSums<kMeasure>>* slots) {
  const auto numbers = StepNumbers<Rule, kMeasure, Real<T>>::from(c);
  if (c.strided) return run_strided<Rule, kMeasure, T>(numbers, c, slots);
  Uniform<T, Rule> all{(T*)c.w, (const T*)c.g, {}, (const T*)c.h};
  for (int k = 0; k < kRoom<Rule>; k++) all.v[k] = (T*)c.v[k];
  run_slots(numbers, all, c.size, slots);
}

template <class Rule, Measure kMeasure, class T> void run_uniform(const Chunk& c) {
  if constexpr (kMeasure == Measure::nothing) {
    run_chunk<Rule, kMeasure, T>(c, nullptr);
  } else {
    Slots<kSums<kMeasure>> slots(c, Rule::traits.is_gauged);
    run_chunk<Rule, kMeasure, T>(c, &slots);
    slots.finish();
  }
}

// ---- One chunk whose streams are stored differently -----------------------------------------------------------------

Any any(const void* p, DType dtype) { return {(char*)p, dtype}; }

// In blocks, for which there are random bits in L1 if the weights want some.
template <class Rule, Measure kMeasure> class Mixed {
 public:
  Mixed(const Chunk& c, Slots<kSums<kMeasure>>* slots)
      : c_(c),
        slots_(slots),
        numbers_(StepNumbers<Rule, kMeasure, float>::from(c)),
        block_({c.hyper->rounding.seed, c.parameter, c.hyper->rounding.step}) {}

  void run() {
    if (c_.strided) return run_strided();
    bool is_bf16 = c_.rounds_at_random;
    for (int k = 0; k < kBuffers; k++) is_bf16 = is_bf16 && c_.v_dtype[k] == DType::bf16;
    for (int64_t i = 0, n; i < c_.size; i += n) {
      n = c_.size - i;
      const uint16_t* bits = next(i, n);
      if (is_bf16) {  // the most common kind is worth a loop without a branch on the type
        using At = Streams<AtRandom, const bf16*, bf16*, sizeof(bf16), kRoom<Rule>>;
        At all{{(bf16*)c_.w + i, bits}, (const bf16*)c_.g + i, {}, (const bf16*)c_.h + i};
        for (int k = 0; k < kRoom<Rule>; k++) all.v[k] = (bf16*)c_.v[k] + i;
        run_slots(numbers_, all, n, slots_);
      } else {
        At all{{any(c_.w, c_.dtype) + i, c_.master ? c_.master + i : nullptr, bits},
               any(c_.g, c_.dtype) + i,
               {},
               any(c_.h, c_.dtype) + i};
        for (int k = 0; k < kRoom<Rule>; k++) all.v[k] = any(c_.v[k], c_.v_dtype[k]) + i;
        run_slots(numbers_, all, n, slots_);
      }
    }
  }

 private:
  static constexpr int kBuffers = Rule::traits.buffers;
  using At = Streams<Weights, Any, Any, 2, kRoom<Rule>>;

  // Random bits for the next coordinates from the i-th of the chunk, and how many those are.
  const uint16_t* next(int64_t i, int64_t& n) {
    if (!c_.rounds_at_random) return nullptr;
    const int64_t most = RandomBlock::most(c_.begin + i);
    n = n < most ? n : most;
    return block_.fill(c_.begin + i, n);
  }

  void run_strided() {
    StridedBlock room;
    At block{{any(room.w(), c_.dtype), c_.master ? room.master : nullptr, nullptr},
             any(room.g(), c_.dtype),
             {},
             any(room.h(), c_.dtype)};
    for (int k = 0; k < kRoom<Rule>; k++) block.v[k] = any(room.v(k), c_.v_dtype[k]);
    for (int64_t i = 0, n; i < c_.size; i += n) {
      n = c_.size - i < kStridedBlock ? c_.size - i : kStridedBlock;  // of random bits there is one block or a part
      block.w.bits = next(i, n);
      const Position at(*c_.strided, c_.begin + i);
      gather(c_, Rule::traits, at, n, room);
      run_slots(numbers_, block, n, slots_);
      scatter(c_, Rule::traits, at, n, room);
    }
  }

  const Chunk& c_;
  Slots<kSums<kMeasure>>* slots_;
  StepNumbers<Rule, kMeasure, float> numbers_;
  RandomBlock block_;
};

template <class Rule> void mixed(const Chunk& c) {
  const auto measured = [&](auto measure) {
    Slots<kSums<measure()>> slots(c, Rule::traits.is_gauged);
    Mixed<Rule, measure()>(c, &slots).run();
    slots.finish();
  };
  if constexpr (has_op<Rule, Measure::pair>)
    if (c.h) return measured(Constant<Measure::pair>{});
  if (c.sums) return measured(Constant<Measure::step>{});
  Mixed<Rule, Measure::nothing>(c, nullptr).run();
}

// ---- On a sphere --------------------------------------------------------------------------------------------------

template <class Direction> void advance_mixed(const Chunk& c) {
  Slots<kSums<Measure::step>> slots(c, false);
  Mixed<Advance<Direction>, Measure::step>(c, &slots).run();
  slots.finish();
}
template <class Direction> void turn_mixed(const Chunk& c) {
  using Rule = Turned<typename Direction::Later>;
  if (!c.sums) return Mixed<Rule, Measure::nothing>(c, nullptr).run();
  Slots<kSums<Measure::step>> slots(c, false);
  Mixed<Rule, Measure::step>(c, &slots).run();
  slots.finish();
}

// ---- |g|^2 alone ------------------------------------------------------------------------------------------

// What lies anywhere, or is made of two, comes through a block that is dense and stays in L1.
template <class T> double sq_norm_by_blocks(const Chunk& chunk) {
  using R = Real<T>;
  constexpr int kBlock = kStridedBlock;
  alignas(64) T g[kBlock], h[kBlock];
  alignas(64) R combined[kBlock];
  const auto c = PairCoefficients<R>::from(*chunk.hyper).template broadcast<Side<R, kLanes>>();
  double sum = 0;
  for (int64_t i = 0; i < chunk.size; i += kBlock) {
    const int n = chunk.size - i < kBlock ? (int)(chunk.size - i) : kBlock;
    const T *from_g = (const T*)chunk.g + i, *from_h = (const T*)chunk.h + i;
    if (chunk.strided) {
      const Position at(*chunk.strided, chunk.begin + i);
      gather(sizeof(T), at, chunk.strided->g, n, chunk.g, g);
      if (chunk.h) gather(sizeof(T), at, chunk.strided->h, n, chunk.h, h);
      from_g = g, from_h = h;
    } else if (n < kBlock) {  // whole lanes are read
      __builtin_memcpy(g, from_g, n * sizeof(T));
      if (chunk.h) __builtin_memcpy(h, from_h, n * sizeof(T));
      from_g = g, from_h = h;
    }
    if (!chunk.h) {
      sum += sum_loops.sum[(int)dtype_of<T>](from_g, n, true);
      continue;
    }
    for (int k = n; k < kBlock && k % kLanes; k++) g[k] = h[k] = T{};
    for (int k = 0; k < n; k += kLanes)
      store(combined + k, c.combination(c.first_scale * load(from_h + k, Width<kLanes>{}),
                                        c.second_scale * load(from_g + k, Width<kLanes>{})));
    sum += sum_loops.sum[(int)dtype_of<R>](combined, n, true);
  }
  return sum;
}

template <class T> void sq_norm(const Chunk& c, bool is_gauged) {
  const double sum = c.strided || c.h ? sq_norm_by_blocks<T>(c) : sum_loops.sum[(int)dtype_of<T>](c.g, c.size, true);
  *c.sums = c.h ? sq_norm_in_user_units<kSums<Measure::pair>>(sum, *c.hyper, is_gauged)
                : sq_norm_in_user_units<kSums<Measure::step>>(sum, *c.hyper, is_gauged);
}

// ---- The table --------------------------------------------------------------------------------------------

using Loop = void (*)(const Chunk&);
template <class Rule, Measure kMeasure, class T> constexpr Loop loop() {
  if constexpr (has_op<Rule, kMeasure>)
    return run_uniform<Rule, kMeasure, T>;
  else
    return nullptr;
}
template <class Rule> constexpr Loop mixed_loop() {
  if constexpr (Rule::traits.is_step)
    return mixed<Rule>;
  else
    return nullptr;
}
template <Measure kMeasure, class Rule, class... Types> constexpr void fill_row(Loop* row, List<Types...>) {
  ((*row++ = loop<Rule, kMeasure, Types>()), ...);
}
template <class... All> constexpr void fill_rules(Isa& isa, List<All...>) {
  int r = 0;
  ((fill_row<Measure::nothing, All>(isa.run[(int)Measure::nothing][r], StorageTypes{}),
    fill_row<Measure::step, All>(isa.run[(int)Measure::step][r], StorageTypes{}),
    fill_row<Measure::pair, All>(isa.run[(int)Measure::pair][r], StorageTypes{}), isa.run_mixed[r] = mixed_loop<All>(),
    r++),
   ...);
}
template <class Direction, class... Types> constexpr void fill_direction(Isa& isa, int d, List<Types...>) {
  using Rule = Turned<typename Direction::Later>;
  int t = 0;
  ((isa.advance[d][t] = run_uniform<Advance<Direction>, Measure::step, Types>,
    isa.turn[0][d][t] = run_uniform<Rule, Measure::nothing, Types>,
    isa.turn[1][d][t] = run_uniform<Rule, Measure::step, Types>, t++),
   ...);
  isa.advance_mixed[d] = advance_mixed<Direction>, isa.turn_mixed[d] = turn_mixed<Direction>;
}
template <class... All> constexpr void fill_directions(Isa& isa, List<All...>) {
  int d = 0;
  (fill_direction<All>(isa, d++, StorageTypes{}), ...);
}
template <class... Types> constexpr void fill_types(Isa& isa, List<Types...>) {
  int t = 0;
  ((isa.sq_norm[t++] = sq_norm<Types>), ...);
}
constexpr Isa filled() {
  Isa isa{};
  fill_rules(isa, Rules{});
  fill_directions(isa, Directions{});
  fill_types(isa, StorageTypes{});
  isa.sums = &sum_loops, isa.moments = &moment_loops, isa.norm_sums = &norm_loops, isa.embedding = &embedding_loops;
  isa.outer = outer, isa.conv = conv;
  return isa;
}

}  // namespace

const Isa table = filled();

}  // namespace nk::cpu::NK_ISA
