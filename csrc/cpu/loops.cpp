// loops.cpp - the coordinate loops, compiled once for each ISA level, in a namespace of its own (NK_ISA).
//
// No torch, no STL. Plain loops over formulas.h that the compiler vectorises; two things are spelled with GCC's vector
// types because the language forbids the compiler to reorder sums: the lanes of the statistics, and float16.
#include "convert.h"
#include "isa.h"

namespace nk::cpu::NK_ISA {
namespace {

// Coordinates that are in flight between memory and arithmetic: small enough that a block's operands stay in L1.
constexpr int kBlock = 512;

template <class Rule, class R>
void update(const SgdCoefficients<R>& c, R* __restrict w, const R* __restrict g, R* __restrict v, int n) {
  for (int k = 0; k < n; k++) {
    R wk = w[k], vk = 0;
    if constexpr (Rule::reads_v) vk = v[k];
    Rule::apply(c, wk, g[k], vk);
    w[k] = wk;
    if constexpr (Rule::writes_v) v[k] = vk;
  }
}

// ---- Statistics: eight double lanes whatever the machine's width, so that every level adds in the same order ----------

constexpr int kLanes = 8;
typedef double Lanes __attribute__((vector_size(kLanes * sizeof(double))));

template <class R> Lanes lanes(const R* p) {
  typedef R Vector __attribute__((vector_size(kLanes * sizeof(R))));
  Vector x;
  __builtin_memcpy(&x, p, sizeof x);
  return __builtin_convertvector(x, Lanes);
}

struct Sums {
  Lanes s[StepSums::count] = {};

  template <class R> void add(const R* w, const R* g, const R* w_new, int n) {
    int k = 0;
    for (; k + kLanes <= n; k += kLanes) StepSums::add(s, lanes(w + k), lanes(g + k), lanes(w_new + k));
    if (k == n) return;
    R tail[3][kLanes] = {};  // zeros add nothing
    for (int j = 0; k < n; k++, j++) tail[0][j] = w[k], tail[1][j] = g[k], tail[2][j] = w_new[k];
    StepSums::add(s, lanes(tail[0]), lanes(tail[1]), lanes(tail[2]));
  }

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

// Hands each run of coordinates to the slot it belongs to.
struct Slots {
  Sums sums;
  double* out;
  int64_t slot_size, left;
  double inverse_scale;

  explicit Slots(const Chunk& c)
      : out(c.sums), slot_size(c.slot_size), left(c.slot_size), inverse_scale(c.hyper->inverse_scale) {}

  template <class R> void add(const R* w, const R* g, const R* w_new, int n) {
    for (int k = 0; k < n;) {
      const int run = left < n - k ? (int)left : n - k;
      sums.add(w + k, g + k, w_new + k, run);
      k += run;
      if ((left -= run) == 0) next();
    }
  }
  void next() {
    sums.flush(out, inverse_scale);
    out += StepSums::count;
    left = slot_size;
  }
  void finish() {
    if (left != slot_size) next();
  }
};

// ---- Strided tensors: walked in row-major order of the shape -----------------------------------------------------------

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

// ---- One chunk -----------------------------------------------------------------------------------------------------------

template <class R> SgdCoefficients<R> coefficients(const SgdHyper& h) {
  return {(R)h.lr, (R)h.momentum, (R)(1 - h.dampening), (R)h.weight_decay,
          (R)(h.maximize ? -h.inverse_scale : h.inverse_scale)};
}

// Each block goes through two steps that may be nothing: strided memory is gathered into `near` (dense memory is its own
// `near`), and storage that arithmetic cannot use is widened into `real`. Then one update, and the way back.
template <class Rule, class T> void sgd(const Chunk& c) {
  using R = Real<T>;
  constexpr bool kNative = sizeof(T) == sizeof(R);
  struct Block {
    alignas(64) T w[kBlock], g[kBlock], v[kBlock];
  } near;
  struct {
    alignas(64) R w[kBlock], g[kBlock], v[kBlock], old[kBlock];
  } real;

  const SgdCoefficients<R> h = coefficients<R>(*c.hyper);
  Slots slots(c);
  for (int64_t i = 0; i < c.size; i += kBlock) {
    const int n = c.size - i < kBlock ? (int)(c.size - i) : kBlock;
    T *near_w, *near_v;
    const T* near_g;
    if (c.strided) {
      near_w = near.w, near_g = near.g, near_v = near.v;
      Walk at(*c.strided, c.begin + i);
      for (int k = 0; k < n; k++, at.step()) {
        near.w[k] = ((const T*)c.w)[at.w];
        near.g[k] = ((const T*)c.g)[at.g];
        if constexpr (Rule::reads_v) near.v[k] = ((const T*)c.v)[at.v];
      }
    } else {
      near_w = (T*)c.w + i, near_g = (const T*)c.g + i, near_v = (T*)c.v + i;
    }

    R *w, *v;
    const R* g;
    if constexpr (kNative) {
      w = near_w, g = near_g, v = near_v;
    } else {
      w = real.w, g = real.g, v = real.v;
      widen_block(real.w, near_w, n);
      widen_block(real.g, near_g, n);
      if constexpr (Rule::reads_v) widen_block(real.v, near_v, n);
    }

    if (c.sums) __builtin_memcpy(real.old, w, n * sizeof(R));
    update<Rule>(h, w, g, v, n);

    if constexpr (!kNative) {
      narrow_block(near_w, real.w, n);
      if constexpr (Rule::writes_v) narrow_block(near_v, real.v, n);
      if (c.sums) widen_block(real.w, near_w, n);  // the sums speak of the weights as stored
    }
    if (c.sums) slots.add(real.old, g, w, n);
    if (c.strided) {
      Walk at(*c.strided, c.begin + i);
      for (int k = 0; k < n; k++, at.step()) {
        ((T*)c.w)[at.w] = near.w[k];
        if constexpr (Rule::writes_v) ((T*)c.v)[at.v] = near.v[k];
      }
    }
  }
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
