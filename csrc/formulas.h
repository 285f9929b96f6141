// formulas.h - what happens to one coordinate, and what is summed. Every update rule of the project stands here once.
//
// Scalar code for host and device; includes nothing but <stdint.h>. Back ends are loops over `Rules`.
// NK_HD functions are always inlined: each ISA level compiles this header with its own flags, and an out-of-line copy
// made for AVX-512 must never be the one that the linker keeps for an older machine.
#pragma once
#include <stdint.h>

#if defined(__CUDACC__)
#define NK_HD __host__ __device__ __forceinline__
#else
#define NK_HD inline __attribute__((always_inline))
#endif

namespace nk {

// ---- Numbers ------------------------------------------------------------------------------------------------------

// a*b + c with one rounding. The portable baseline has no FMA hardware, where __builtin_fma is a slow library call:
// it rounds twice and stands outside the bitwise promise.
#if defined(__FMA__) || defined(__aarch64__) || defined(__CUDACC__)
NK_HD float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
NK_HD double fma(double a, double b, double c) { return __builtin_fma(a, b, c); }
#else
NK_HD float fma(float a, float b, float c) { return a * b + c; }
NK_HD double fma(double a, double b, double c) { return a * b + c; }
#endif

// x, or y where x is NaN or infinite.
NK_HD float finite_or(float x, float y) { return x - x == 0 ? x : y; }
NK_HD double finite_or(double x, double y) { return x - x == 0 ? x : y; }

NK_HD float as_float(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, 4);
  return x;
}
NK_HD uint32_t as_bits(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  return bits;
}

// Storage types. Arithmetic on them happens in `Real<T>`: double for double, float for everything else.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};
template <class T> struct RealOf {
  using type = float;
};
template <> struct RealOf<double> {
  using type = double;
};
template <class T> using Real = typename RealOf<T>::type;

NK_HD float widen(bf16 x) { return as_float((uint32_t)x.bits << 16); }

// The bits of a float rounded to the nearest bfloat16, ties to even, in the upper half; what is left in the lower half
// means nothing. NaN stays NaN. Or of several floats.
template <class U, class Bool> NK_HD U round_to_bf16(U u, Bool is_nan) {
  const U rounded = u + 0x7fffu + ((u >> 16) & 1u), quiet_nan = U{} + 0x7fc00000u;
  return is_nan ? quiet_nan : rounded;
}
NK_HD bf16 narrow_bf16(float x) { return {(uint16_t)(round_to_bf16(as_bits(x), x != x) >> 16)}; }

// The same, up or down at random: up with the probability that is the position between the two neighbours, so that the
// mean of what is stored is x. `random`: 16 uniform bits. What lies beyond the largest bfloat16 has but one neighbour
// that is a number, and is rounded to nearest.
template <class U, class Bool> NK_HD U round_at_random_to_bf16(U u, U random, Bool is_nan) {
  const auto is_beyond = (u & 0x7fff0000u) == U{} + 0x7f7f0000u;
  const U rounded = u + (is_beyond ? U{} + 0x8000u : random), quiet_nan = U{} + 0x7fc00000u;
  return is_nan ? quiet_nan : rounded;
}
NK_HD bf16 narrow_bf16_at_random(float x, uint16_t random) {
  return {(uint16_t)(round_at_random_to_bf16(as_bits(x), (uint32_t)random, x != x) >> 16)};
}

// binary16 without denormal float operations, so that flush-to-zero mode changes nothing.
NK_HD float widen(f16 x) {
  const uint32_t sign = (uint32_t)(x.bits & 0x8000u) << 16, rest = (uint32_t)(x.bits & 0x7fffu) << 13;
  const uint32_t normal = rest + (112u << 23), special = rest + (224u << 23);
  const float subnormal = as_float(rest + (113u << 23)) - as_float(113u << 23);
  const uint32_t u = rest >= (31u << 23) ? special : rest < (1u << 23) ? as_bits(subnormal) : normal;
  return as_float(sign | u);
}
NK_HD f16 narrow_f16(float x) {
  const uint32_t sign = (as_bits(x) >> 16) & 0x8000u, u = as_bits(x) & 0x7fffffffu;
  const uint32_t special = u > 0x7f800000u ? 0x7e00u : 0x7c00u;            // NaN : overflow and infinity
  const uint32_t subnormal = as_bits(as_float(u) + 0.5f) - as_bits(0.5f);  // the adder rounds for us
  const uint32_t normal = (u + 0xc8000fffu + ((u >> 13) & 1u)) >> 13;
  return {(uint16_t)(sign | (u >= 0x47800000u ? special : u < 0x38800000u ? subnormal : normal))};
}

// ---- Random numbers -----------------------------------------------------------------------------------------------
//
// Philox4x32-7 of Salmon, Moraes, Dror and Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3" (SC'11, table 2:
// seven rounds are the fewest that pass BigCrush; rounding needs no margin beyond, and each round is a tenth of a
// step): four words that depend on a counter of four words and a key of two, and on nothing else. U is a word, or
// several side by side.

NK_HD void multiply(uint32_t a, uint32_t b, uint32_t& high, uint32_t& low) {
  const uint64_t product = (uint64_t)a * b;
  high = (uint32_t)(product >> 32), low = (uint32_t)product;
}

NK_HD uint32_t exclusive_or(uint32_t a, uint32_t b, uint32_t c) { return a ^ b ^ c; }

struct Philox {
  static constexpr int kRounds = 7;
  template <class Key> struct Keys {  // of each round
    Key key[kRounds][2];
    explicit NK_HD Keys(uint64_t first) {
      for (int i = 0; i < kRounds; i++) {
        key[i][0] = (uint32_t)first + i * 0x9e3779b9u;
        key[i][1] = (uint32_t)(first >> 32) + i * 0xbb67ae85u;
      }
    }
  };
  template <class U, class Key> static NK_HD void apply(U (&x)[4], const Keys<Key>& keys) {
    for (int i = 0; i < kRounds; i++) {
      U high0, low0, high1, low1;
      multiply(x[0], 0xd2511f53u, high0, low0);
      multiply(x[2], 0xcd9e8d57u, high1, low1);
      x[0] = exclusive_or(high1, x[1], keys.key[i][0]), x[1] = low1;
      x[2] = exclusive_or(high0, x[3], keys.key[i][1]), x[3] = low0;
    }
  }
};

// The bits that round one coordinate: of eight coordinates, in row-major order, the words of one counter, half by half.
// The key is the seed; the counter (coordinates / 8 as two words, the parameter's index in the optimizer, steps so
// far).
struct RandomBits {
  static constexpr int kTogether = 8;
  uint64_t seed;
  uint32_t parameter, step;

  NK_HD void words(uint64_t counter, uint32_t (&x)[4]) const {
    x[0] = (uint32_t)counter, x[1] = (uint32_t)(counter >> 32), x[2] = parameter, x[3] = step;
    Philox::apply(x, Philox::Keys<uint32_t>(seed));
  }
};

// ---- Master weights -----------------------------------------------------------------------------------------------
//
// A weight of low precision and its master copy. Where the copy does not round to the weight somebody else has written
// the weight, which then counts.
template <class R, class Bool> NK_HD R current_weight(R master, R weight, Bool is_rounded_master) {
  return is_rounded_master ? master : weight;
}

// ---- SGD ----------------------------------------------------------------------------------------------------------
//
// torch.optim.SGD, step t (w weights, g gradient, v momentum buffer; lr eta, momentum mu, dampening tau, decay lambda):
//     d  = +-g/scale + lambda w            (+ minimises, - maximises; scale of the GradScaler)
//     v' = mu v + (1-tau) d                (the first gradient of a parameter: v' = d, whatever tau is)
//     u  = v'                              (nesterov: u = d + mu v')
//     w' = w - eta u
// A rule reads and writes only what it says: on the first gradient v is memory that nobody has written yet.
// R is float, double, or several of them side by side.

template <class R> struct Coefficients {
  R lr, momentum, one_minus_dampening, weight_decay;
  R grad_factor;                // +-1/scale; of a pair +-1, for each of the two has a scale of its own:
  R first_scale, second_scale;  // 1/scale
  R half, spread;               // 1/2, sqrt(2l-1)/2
  R share;                      // 1/n
  bool decays;                  // weight_decay != 0
  bool first_only;              // l = 1
  // Of the gauged rules:
  R keep, unkeep, grad_to_buffer, weight_to_buffer, grad_to_weight, buffer_to_weight;
  bool mixes, direct;  // weight_to_buffer != 0, grad_to_weight != 0
};

// d. Without weight decay the weight is not touched: 0 * inf would turn an infinite weight into NaN, which torch keeps.
template <class R> NK_HD R decayed_grad(const Coefficients<R>& c, R w, R g) {
  const R signed_grad = c.grad_factor * g;
  return c.decays ? fma(c.weight_decay, w, signed_grad) : signed_grad;
}

struct Sgd {
  static constexpr bool writes_w = true, reads_v = false, writes_v = false, gauged = false;
  template <class R> static NK_HD void apply(const Coefficients<R>& c, R& w, R g, R&) {
    w = fma(-c.lr, decayed_grad(c, w, g), w);
  }
};

struct SgdMomentum {
  static constexpr bool writes_w = true, reads_v = true, writes_v = true, gauged = false;
  template <class R> static NK_HD void apply(const Coefficients<R>& c, R& w, R g, R& v) {
    v = fma(c.momentum, v, c.one_minus_dampening * decayed_grad(c, w, g));
    w = fma(-c.lr, v, w);
  }
};

struct SgdMomentumFirst {
  static constexpr bool writes_w = true, reads_v = false, writes_v = true, gauged = false;
  template <class R> static NK_HD void apply(const Coefficients<R>& c, R& w, R g, R& v) {
    v = decayed_grad(c, w, g);
    w = fma(-c.lr, v, w);
  }
};

struct SgdNesterov {
  static constexpr bool writes_w = true, reads_v = true, writes_v = true, gauged = false;
  template <class R> static NK_HD void apply(const Coefficients<R>& c, R& w, R g, R& v) {
    const R d = decayed_grad(c, w, g);
    v = fma(c.momentum, v, c.one_minus_dampening * d);
    w = fma(-c.lr, fma(c.momentum, v, d), w);
  }
};

struct SgdNesterovFirst {
  static constexpr bool writes_w = true, reads_v = false, writes_v = true, gauged = false;
  template <class R> static NK_HD void apply(const Coefficients<R>& c, R& w, R g, R& v) {
    const R d = decayed_grad(c, w, g);
    v = d;
    w = fma(-c.lr, fma(c.momentum, v, d), w);
  }
};

// ---- Weight decay as an exponential learning rate -----------------------------------------------------------------
//
// The steps of gauge.h, which says where the numbers come from:
//     v' = momentum v + grad_to_buffer g + weight_to_buffer w
//     w' = keep w - grad_to_weight g - buffer_to_weight v'
// keep is a power of two, mostly 1: then, without nesterov, this is SGD without weight decay, to the bit.

struct Gauged {
  static constexpr bool writes_w = true, reads_v = false, writes_v = false, gauged = true;
  template <class R> static NK_HD void apply(const Coefficients<R>& c, R& w, R g, R&) {
    w = fma(-c.grad_to_weight, c.grad_factor * g, c.keep * w);
  }
};

// What v' leaves of w. A coefficient of 0 leaves infinite values out, as a step that does not have it would.
template <class R> NK_HD void gauged_by(const Coefficients<R>& c, R& w, R signed_grad, R& v) {
  if (c.mixes) v = fma(c.weight_to_buffer, w, v);
  w = c.keep * w;
  if (c.direct) w = fma(-c.grad_to_weight, signed_grad, w);
  w = fma(-c.buffer_to_weight, v, w);
}

struct GaugedMomentum {
  static constexpr bool writes_w = true, reads_v = true, writes_v = true, gauged = true;
  template <class R> static NK_HD void apply(const Coefficients<R>& c, R& w, R g, R& v) {
    const R signed_grad = c.grad_factor * g;
    v = fma(c.momentum, v, c.grad_to_buffer * signed_grad);
    gauged_by(c, w, signed_grad, v);
  }
};

struct GaugedMomentumFirst {
  static constexpr bool writes_w = true, reads_v = false, writes_v = true, gauged = true;
  template <class R> static NK_HD void apply(const Coefficients<R>& c, R& w, R g, R& v) {
    const R signed_grad = c.grad_factor * g;
    v = c.grad_to_buffer * signed_grad;
    gauged_by(c, w, signed_grad, v);
  }
};

// ---- Two gradients ------------------------------------------------------------------------------------------------
//
// SVAG (Li, Malladi, Arora 2021, arXiv 2102.12470, section 4): of the gradients g1, g2 of two independent batches
//     u = (1+sqrt(2l-1))/2 g1 + (1-sqrt(2l-1))/2 g2
// has the mean of either and l times its covariance. As mean and difference, so that a large l does not cancel.
// l = 1 is g1, to the bit.
template <class R> NK_HD R svag_combination(const Coefficients<R>& c, R g1, R g2) {
  const R mixed = fma(c.spread, g1 - g2, c.half * (g1 + g2));
  return c.first_only ? g1 : mixed;
}

// In place: w = g1, g = g2.
struct SvagCombine {
  static constexpr bool writes_w = true, reads_v = false, writes_v = false, gauged = false;
  template <class R> static NK_HD void apply(const Coefficients<R>& c, R& w, R g, R&) { w = svag_combination(c, w, g); }
};

// Nothing is written. The "update" that is summed is g - w: |w|^2, |g|^2, <w,g>, |g-w|^2.
struct Difference {
  static constexpr bool writes_w = false, reads_v = false, writes_v = false, gauged = false;
  template <class R> static NK_HD void apply(const Coefficients<R>&, R& w, R g, R&) { w = g; }
};

// Welford's update of a running mean w and of the sum v of squared deviations by the n-th sample g, share = 1/n:
//     w' = w + (g - w)/n,  v' = v + (g - w)(g - w')
struct Welford {
  static constexpr bool writes_w = true, reads_v = true, writes_v = true, gauged = false;
  template <class R> static NK_HD void apply(const Coefficients<R>& c, R& w, R g, R& v) {
    const R deviation = g - w;
    w = fma(c.share, deviation, w);
    v = fma(deviation, g - w, v);
  }
};

// Of the n-th sample c, with the sum of all n and 1/(n (n-1)) as share (0 for n = 1):
//     total' = total + c,  centred' = centred + (n c - total')^2 / (n (n-1))
// Youngs and Cramer 1971, Technometrics 13(3). Welford's sum without a division, and on the sum instead of the mean.
struct YoungsCramer {
  template <class R> static NK_HD void first(R& total, R& centred, R c) {
    total = c;
    centred = c - c;  // a NaN or an infinity shows
  }
  template <class R> static NK_HD void add(R& total, R& centred, R c, R minus_n, R share) {
    total = total + c;
    const R deviation = fma(minus_n, c, total);
    centred = fma(share * deviation, deviation, centred);
  }
  // Of n0 contributions and n1 more, by = 1/(n0 n1 (n0+n1)); Chan, Golub, LeVeque 1983, Am. Stat. 37(3):
  //     total' = total + total1,  centred' = centred + centred1 + (n1 total - n0 total1)^2 / (n0 n1 (n0+n1))
  template <class D> static NK_HD void join(D& total, D& centred, D more_total, D more_centred, D n0, D n1, D by) {
    const D deviation = fma(n1, total, -n0 * more_total);
    total = total + more_total;
    centred = centred + fma(by * deviation, deviation, more_centred);
  }
  // As many contributions of zero more that there are B instead of n: by = 1/n - 1/B.
  template <class R> static NK_HD void add_zeros(R total, R& centred, R by) {
    centred = fma(by * total, total, centred);
  }
};

// sum_b (c_b - mean)^2 of raw = sum_b c_b^2 and total = sum_b c_b, share = 1/B; a NaN stays one. False: it is less than
// `least` of the raw sum, so that the subtraction has cost digits.
struct Recentred {
  template <class R> static NK_HD bool apply(R& raw, R total, R share, R least) {
    const R centred = raw - share * total * total;
    const bool is_kept = !(centred < least * raw);
    raw = centred < 0 ? 0 : centred;
    return is_kept;
  }
};

// ---- What a step sums ---------------------------------------------------------------------------------------------
//
// w and g before the step, w_new as stored (after its rounding), u = w_new - w:
//     |w|^2, |g|^2, <w,g>, |u|^2, <w,u>
// D is double, or several doubles side by side. The product of two floats is exact in double: the sums of float32,
// bfloat16 and float16 come out the same with or without FMA hardware, and no float's square leaves the range.
struct StepSums {
  static constexpr int count = 5;
  template <class D> static NK_HD void add(D* s, D w, D g, D w_new) {
    const D u = w_new - w;
    s[0] = fma(w, w, s[0]);
    s[1] = fma(g, g, s[1]);
    s[2] = fma(w, g, s[2]);
    s[3] = fma(u, u, s[3]);
    s[4] = fma(w, u, s[4]);
  }
  // The loops sum the gradient as it lies in memory; the sums speak of g/scale.
  static NK_HD void unscale(double* s, double inverse_scale) {
    s[1] *= inverse_scale * inverse_scale;
    s[2] *= inverse_scale;
  }
  // Of gauged weights: w -> scale w, g -> g/scale, u -> scale (moved u + drift w).
  static NK_HD void to_true_scale(double* s, double scale, double moved, double drift) {
    const double sq = scale * scale;
    s[3] = sq * (drift * (drift * s[0] + 2 * moved * s[4]) + moved * moved * s[3]);
    s[4] = sq * (drift * s[0] + moved * s[4]);
    s[0] *= sq;
    s[1] /= sq;
  }
};

// What a pair of gradients sums besides, each after its unscaling:
//     <g1,g2>, |g1-g2|^2, |g1|^2, |g2|^2
// <g1,g2> estimates |grad L|^2 and |g1-g2|^2/2 the trace of a batch gradient's covariance, both without bias.
struct PairSums {
  static constexpr int count = 4;
  template <class D> static NK_HD void add(D* s, D g1, D g2) {
    const D d = g1 - g2;
    s[0] = fma(g1, g2, s[0]);
    s[1] = fma(d, d, s[1]);
    s[2] = fma(g1, g1, s[2]);
    s[3] = fma(g2, g2, s[3]);
  }
  static NK_HD void to_true_scale(double* s, double scale) {
    for (int j = 0; j < count; j++) s[j] /= scale * scale;
  }
};

// What clipping by the global norm multiplies every gradient with: min(1, max_norm/(norm + 1e-6)), as
// torch.nn.utils.clip_grad_norm_ has it. A NaN stays one, and an infinite norm makes 0.
NK_HD double clip_coef(double norm, double max_norm) {
  const double coef = max_norm / (norm + 1e-6);
  return coef > 1 ? 1.0 : coef;
}

// How much of it a loop sums. A pair is always measured.
enum class Measure { nothing, step, pair };
template <Measure kMeasure>
constexpr int kSums = kMeasure == Measure::pair ? StepSums::count + PairSums::count : StepSums::count;

// ---- Moments down the rows of a matrix ----------------------------------------------------------------------------
//
// Of groups of rows. Within one, with a shift k near its values, in the arithmetic type:
//     s = sum (x-k),   q = sum (x-k)^2
// The groups are joined in double (Chan, Golub, LeVeque 1983, Am. Stat. 37(3)): n0 rows with mean m and sum of squared
// deviations c, and n1 more with mean k + s/n1:
//     e = k + s/n1 - m,   c' = c + (q - s^2/n1) + e^2 n0 n1/(n0+n1),   m' = m + e n1/(n0+n1)
// k is m itself, rounded; of the first group, the mean of some of its rows. If those are f of n1, (m-k)^2 is at most
// 1/f of sum (x-m)^2, whatever the rows are: q - s^2/n1 loses a factor of 1 + n1/f, and no more.
struct GroupMoments {
  static constexpr int kRows = 128;    // of a group
  static constexpr int kTogether = 8;  // of them are summed before all: fewer roundings on any one row's way
  static constexpr int kFirst = 8;     // rows whose mean is the first shift
  // A sum of n squares of floats in float arithmetic is right if it is at least n times this: whatever the squares lost
  // below float's smallest normal number (2^-126; flushed to zero, all of it) is less than its last digit.
  static constexpr double kLeast = 0x1p-126 * 0x1p24;

  // The mean of a few rows, counted from the first of them, x, so that of a constant column it is exactly that
  // constant: s = sum (x_r - x), share = one over their number.
  template <class R> static NK_HD R first_shift(R x, R s, R share, R zero) { return finite_or(fma(share, s, x), zero); }
  template <bool kSquares, class R> static NK_HD void add(R& s, R& q, R shift, R x) {
    const R d = x - shift;
    s = s + d;
    if constexpr (kSquares) q = fma(d, d, q);
  }
  // Where the mean is not finite the shift is 0, so that infinite means come out as such.
  // share = 1/n1, moved = n1/(n0+n1), cross = n0 n1/(n0+n1)
  template <class D>
  static NK_HD void join(D& mean, D& centred, D shift, D s, D q, D share, D moved, D cross) {
    const D by = share * s, e = (shift - finite_or(mean, shift)) + by;
    centred = centred + fma(-by, s, q) + cross * e * e;
    mean = fma(moved, e, mean);
  }
};

// What a normalisation layer's weight and bias get of one coordinate: g times the normalised x, and g.
struct NormSums {
  static constexpr int kRows = 128;    // whose sums down the columns are in the arithmetic type; then in double
  static constexpr int kTogether = 8;  // of them are summed before all
  template <class R> static NK_HD void add(R& of_weight, R& of_bias, R g, R x, R mean, R rstd) {
    of_weight = fma(g, (x - mean) * rstd, of_weight);
    of_bias = of_bias + g;
  }
};

// ---- The lists that back ends instantiate their loops over ----------------------------------------------------------

template <class... Members> struct List {
  static constexpr int size = sizeof...(Members);
};
// Those that take one gradient or two, and those that are not steps.
using StepRules = List<Sgd, SgdMomentum, SgdMomentumFirst, SgdNesterov, SgdNesterovFirst, Gauged, GaugedMomentum,
                       GaugedMomentumFirst>;
using Rules = List<Sgd, SgdMomentum, SgdMomentumFirst, SgdNesterov, SgdNesterovFirst, Gauged, GaugedMomentum,
                   GaugedMomentumFirst, SvagCombine, Difference, Welford>;
using StorageTypes = List<double, float, bf16, f16>;

}  // namespace nk
