// formulas.h - what happens to one coordinate, and what is summed. Every update rule of the project stands here once.
//
// Scalar code for host and device. Back ends are loops over `Rules`; the binding runs `kOps`.
#pragma once
#include "hyper.h"
#include "scalar.h"

namespace nk {

// A weight of low precision and its master copy. If the copy does not round to the weight, other code has written the
// weight since the last step, and the weight counts.
template <class R, class Bool> NK_HD R current_weight(R master, R weight, Bool is_rounded_master) {
  return is_rounded_master ? master : weight;
}

// ---- What a rule declares -------------------------------------------------------------------------------------------
//
// struct Rule {
//   static constexpr Traits traits                what it reads and writes, for the loops and the binding
//   using First                                   the rule of a parameter whose state holds nothing yet
//   template <class R> using Coefficients         the numbers of the formula, with
//     from(hyper, of_tensor)                      made of the numbers of the call
//     broadcast<S>()                              the same for several coordinates side by side
//   apply(coefficients, w, g, state...)           updates w and every state buffer; g is read
// };
// A rule touches only what its traits say: at a first step its state is memory that is not written yet.
// R is float, double, or several of them side by side.

constexpr int kMostBuffers = 2;

struct Traits {
  bool is_step = false;       // takes tensors that are stored differently
  bool has_pairs = false;     // takes one gradient or a pair
  bool counts_steps = false;  // of each parameter
  bool writes_w = true;
  int buffers = 0;  // of state that it writes
  bool reads_buffers = false;
  bool divides = false;     // by the last buffer: what pads that is 1
  bool is_gauged = false;   // weights stand for others: see gauge.h
  bool keeps_norm = false;  // runs as two passes: see "On a sphere"
  bool writes_buffers = true, reads_grad = true;
  bool sums_direction = false;             // in place of the update
  bool has_sums = true, has_plain = true;  // whether an op runs it with statistics, and without

  static constexpr Traits step() {
    Traits t;
    t.is_step = t.has_pairs = true;
    return t;
  }
  constexpr Traits counting() const {
    Traits t = *this;
    t.counts_steps = true;
    return t;
  }
  constexpr Traits dividing() const {
    Traits t = *this;
    t.divides = true;
    return t;
  }
  constexpr Traits without_pairs() const {
    Traits t = *this;
    t.has_pairs = false;
    return t;
  }
  constexpr Traits keeping(int n) const {
    Traits t = *this;
    t.buffers = n, t.reads_buffers = n > 0;
    return t;
  }
  constexpr Traits first() const {
    Traits t = *this;
    t.reads_buffers = false;
    return t;
  }
  constexpr Traits in_gauge() const {
    Traits t = *this;
    t.is_gauged = true;
    return t;
  }
  constexpr Traits without_sums() const {
    Traits t = *this;
    t.has_sums = false;
    return t;
  }
  constexpr Traits on_sphere() const {
    Traits t = *this;
    t.keeps_norm = true, t.has_pairs = false;
    return t;
  }
  constexpr Traits by_state_alone() const {  // its direction
    Traits t = *this;
    t.reads_grad = false;
    return t;
  }
  constexpr Traits first_pass() const {
    Traits t = *this;
    t.writes_w = false, t.reads_grad = true, t.sums_direction = true;
    return t;
  }
  constexpr Traits second_pass() const {
    Traits t = *this;
    t.writes_buffers = false;
    return t;
  }
  constexpr Traits only_sums() const {  // writes nothing else
    Traits t = *this;
    t.writes_w = t.has_plain = false;
    return t;
  }
};

// How a vector goes on along the sphere: see "On a sphere".
struct Turn {
  double grow = 0, move = 0;
};

// Numbers of one parameter of a call.
struct OfTensor {
  double lr;           // times its multiplier
  double grad_factor;  // see Hyper
  Bias bias;
  Turn turn;
};

template <class Rule, class R>
NK_HD auto coefficients(const Hyper& h, bool is_pair, const TensorNumbers& numbers, const Turn& turn = {}) {
  Bias bias{1, 1};
  if constexpr (Rule::traits.counts_steps) bias = numbers.count.value(h);
  return Rule::template Coefficients<R>::from(
      h, OfTensor{h.lr * numbers.of_lr.value(), h.grad_factor(is_pair), bias, turn});
}

// One coordinate of any rule; `state` has as many numbers as it keeps buffers.
template <class Rule, class C, class R> NK_HD void apply(const C& c, R& w, R g, R* state) {
  static_assert(Rule::traits.buffers <= kMostBuffers);
  if constexpr (Rule::traits.buffers == 0)
    Rule::apply(c, w, g);
  else if constexpr (Rule::traits.buffers == 1)
    Rule::apply(c, w, g, state[0]);
  else
    Rule::apply(c, w, g, state[0], state[1]);
}

// ---- SGD ------------------------------------------------------------------------------------------------------------
//
// torch.optim.SGD, step t (w weights, g gradient, v momentum buffer; lr eta, momentum mu, dampening tau, decay lambda):
//     d  = +-g/scale + lambda w            (+ minimises, - maximises; scale of the GradScaler)
//     v' = mu v + (1-tau) d                (the first gradient of a parameter: v' = d, whatever tau is)
//     u  = v'                              (nesterov: u = d + mu v')
//     w' = w - eta u

template <class R> struct SgdCoefficients {
  R lr, momentum, one_minus_dampening, weight_decay;
  R grad_factor;  // +-1/scale; of a pair +-1
  bool decays;    // weight_decay != 0

  static NK_HD SgdCoefficients from(const Hyper& h, const OfTensor& t) {
    return {(R)t.lr, (R)h.momentum, (R)(1 - h.dampening), (R)h.weight_decay, (R)t.grad_factor, h.weight_decay != 0};
  }
  template <class S> NK_HD SgdCoefficients<S> broadcast() const {
    return {S::all(lr),           S::all(momentum),    S::all(one_minus_dampening),
            S::all(weight_decay), S::all(grad_factor), decays};
  }
  // d. Without weight decay the weight is not touched: 0 * inf would turn an infinite weight into NaN, which torch
  // keeps.
  NK_HD R decayed_grad(R w, R g) const {
    const R signed_grad = grad_factor * g;
    return decays ? fma(weight_decay, w, signed_grad) : signed_grad;
  }
};

struct Sgd {
  static constexpr Traits traits = Traits::step();
  using First = Sgd;
  template <class R> using Coefficients = SgdCoefficients<R>;
  template <class R> static NK_HD void apply(const SgdCoefficients<R>& c, R& w, R g) {
    w = fma(-c.lr, c.decayed_grad(w, g), w);
  }
};

struct SgdMomentumFirst {
  static constexpr Traits traits = Traits::step().keeping(1).first();
  using First = SgdMomentumFirst;
  template <class R> using Coefficients = SgdCoefficients<R>;
  template <class R> static NK_HD void apply(const SgdCoefficients<R>& c, R& w, R g, R& v) {
    v = c.decayed_grad(w, g);
    w = fma(-c.lr, v, w);
  }
};

struct SgdMomentum {
  static constexpr Traits traits = Traits::step().keeping(1);
  using First = SgdMomentumFirst;
  template <class R> using Coefficients = SgdCoefficients<R>;
  template <class R> static NK_HD void apply(const SgdCoefficients<R>& c, R& w, R g, R& v) {
    v = fma(c.momentum, v, c.one_minus_dampening * c.decayed_grad(w, g));
    w = fma(-c.lr, v, w);
  }
};

struct SgdNesterovFirst {
  static constexpr Traits traits = Traits::step().keeping(1).first();
  using First = SgdNesterovFirst;
  template <class R> using Coefficients = SgdCoefficients<R>;
  template <class R> static NK_HD void apply(const SgdCoefficients<R>& c, R& w, R g, R& v) {
    const R d = c.decayed_grad(w, g);
    v = d;
    w = fma(-c.lr, fma(c.momentum, v, d), w);
  }
};

struct SgdNesterov {
  static constexpr Traits traits = Traits::step().keeping(1);
  using First = SgdNesterovFirst;
  template <class R> using Coefficients = SgdCoefficients<R>;
  template <class R> static NK_HD void apply(const SgdCoefficients<R>& c, R& w, R g, R& v) {
    const R d = c.decayed_grad(w, g);
    v = fma(c.momentum, v, c.one_minus_dampening * d);
    w = fma(-c.lr, fma(c.momentum, v, d), w);
  }
};

// ---- Weight decay as an exponential learning rate -----------------------------------------------------------------
//
// The steps of gauge.h, which derives the numbers:
//     v' = momentum v + grad_to_buffer g + weight_to_buffer w
//     w' = keep w - grad_to_weight g - buffer_to_weight v'
// keep is a power of two, mostly 1: then, without nesterov, this is SGD without weight decay, to the bit.

template <class R> struct GaugedCoefficients {
  R grad_factor;  // as of SGD
  R momentum, keep, unkeep, grad_to_buffer, weight_to_buffer, grad_to_weight, buffer_to_weight;
  bool mixes, direct;  // weight_to_buffer != 0, grad_to_weight != 0

  static NK_HD GaugedCoefficients from(const Hyper& h, const OfTensor& t) {
    const GaugeStep& g = h.gauge;
    return {(R)t.grad_factor,        (R)g.momentum,         (R)g.keep,           (R)g.unkeep,
            (R)g.grad_to_buffer,     (R)g.weight_to_buffer, (R)g.grad_to_weight, (R)g.buffer_to_weight,
            g.weight_to_buffer != 0, g.grad_to_weight != 0};
  }
  template <class S> NK_HD GaugedCoefficients<S> broadcast() const {
    return {S::all(grad_factor),
            S::all(momentum),
            S::all(keep),
            S::all(unkeep),
            S::all(grad_to_buffer),
            S::all(weight_to_buffer),
            S::all(grad_to_weight),
            S::all(buffer_to_weight),
            mixes,
            direct};
  }
  // What v' leaves of w. A coefficient of 0 leaves infinite values out, as a step that does not have it would.
  NK_HD void step_by(R& w, R signed_grad, R& v) const {
    if (mixes) v = fma(weight_to_buffer, w, v);
    w = keep * w;
    if (direct) w = fma(-grad_to_weight, signed_grad, w);
    w = fma(-buffer_to_weight, v, w);
  }
};

struct Gauged {
  static constexpr Traits traits = Traits::step().in_gauge();
  using First = Gauged;
  template <class R> using Coefficients = GaugedCoefficients<R>;
  template <class R> static NK_HD void apply(const GaugedCoefficients<R>& c, R& w, R g) {
    w = fma(-c.grad_to_weight, c.grad_factor * g, c.keep * w);
  }
};

struct GaugedMomentumFirst {
  static constexpr Traits traits = Traits::step().keeping(1).first().in_gauge();
  using First = GaugedMomentumFirst;
  template <class R> using Coefficients = GaugedCoefficients<R>;
  template <class R> static NK_HD void apply(const GaugedCoefficients<R>& c, R& w, R g, R& v) {
    const R signed_grad = c.grad_factor * g;
    v = c.grad_to_buffer * signed_grad;
    c.step_by(w, signed_grad, v);
  }
};

struct GaugedMomentum {
  static constexpr Traits traits = Traits::step().keeping(1).in_gauge();
  using First = GaugedMomentumFirst;
  template <class R> using Coefficients = GaugedCoefficients<R>;
  template <class R> static NK_HD void apply(const GaugedCoefficients<R>& c, R& w, R g, R& v) {
    const R signed_grad = c.grad_factor * g;
    v = fma(c.momentum, v, c.grad_to_buffer * signed_grad);
    c.step_by(w, signed_grad, v);
  }
};

// ---- Adam -----------------------------------------------------------------------------------------------------------
//
// torch.optim.Adam and AdamW, step t of the parameter (m, v averages of the gradient and of its square, both 0 at
// first):
//     d  = +-g/scale + lambda w              (decoupled: d = +-g/scale)
//     m' = beta1 m + (1-beta1) d
//     v' = beta2 v + (1-beta2) d^2
//     u  = eta/(1-beta1^t) m' / (sqrt(v')/sqrt(1-beta2^t) + eps)      (decoupled: u + eta lambda w)
//     w' = w - u
// Kingma and Ba, arXiv 1412.6980; Loshchilov and Hutter, arXiv 1711.05101. u is rounded before w' is, so that eta
// lambda keeps its digits, of which 1 - eta lambda has few.

template <class R> struct AdamCoefficients {
  R grad_factor, beta1, rest1, beta2, rest2;  // rest = 1 - beta
  R coupled, shrink;                          // lambda of the gradient, eta lambda of the weight; one of them is 0
  R lr, unbias, eps;                          // eta/(1-beta1^t), 1/sqrt(1-beta2^t)
  bool decays;                                // coupled != 0

  static NK_HD AdamCoefficients from(const Hyper& h, const OfTensor& t) {
    const double coupled = h.decoupled ? 0.0 : h.weight_decay, shrink = h.decoupled ? t.lr * h.weight_decay : 0.0;
    return {(R)t.grad_factor,
            (R)h.beta1,
            (R)(1 - h.beta1),
            (R)h.beta2,
            (R)(1 - h.beta2),
            (R)coupled,
            (R)shrink,
            (R)(t.lr / t.bias.first),
            (R)(1 / t.bias.second_root),
            (R)h.eps,
            coupled != 0};
  }
  template <class S> NK_HD AdamCoefficients<S> broadcast() const {
    return {S::all(grad_factor), S::all(beta1), S::all(rest1),  S::all(beta2), S::all(rest2), S::all(coupled),
            S::all(shrink),      S::all(lr),    S::all(unbias), S::all(eps),   decays};
  }
};

struct Adam {
  static constexpr Traits traits = Traits::step().keeping(2).counting().dividing().without_pairs();
  using First = Adam;
  template <class R> using Coefficients = AdamCoefficients<R>;
  template <class R> static NK_HD void apply(const AdamCoefficients<R>& c, R& w, R g, R& m, R& v) {
    const R signed_grad = c.grad_factor * g;
    const R d = c.decays ? fma(c.coupled, w, signed_grad) : signed_grad;
    m = fma(c.beta1, m, c.rest1 * d);
    v = fma(c.beta2, v, c.rest2 * d * d);
    const R u = c.lr * (m / fma(c.unbias, sqrt(v), c.eps));
    // An infinite weight stays, as in torch; its decay is NaN.
    w = finite_or(w - fma(c.shrink, w, u), w - u);
  }
};

// ---- Two gradients ------------------------------------------------------------------------------------------------
//
// SVAG (Li, Malladi, Arora 2021, arXiv 2102.12470, section 4): of the gradients g1, g2 of two independent batches
//     u = (1+sqrt(2l-1))/2 g1 + (1-sqrt(2l-1))/2 g2
// has the mean of either and l times its covariance. As mean and difference, so that a large l does not cancel.
// l = 1 is g1, to the bit.
template <class R> struct PairCoefficients {
  R first_scale, second_scale;  // 1/scale of each of the two
  R half, spread;               // 1/2, sqrt(2l-1)/2
  bool first_only;              // l = 1

  static NK_HD PairCoefficients from(const Hyper& h, const OfTensor&) { return from(h); }
  static NK_HD PairCoefficients from(const Hyper& h) {
    return {(R)h.inverse_scale, (R)h.second_inverse_scale, (R)0.5, (R)(__builtin_sqrt(2 * h.l - 1) / 2), h.l == 1};
  }
  template <class S> NK_HD PairCoefficients<S> broadcast() const {
    return {S::all(first_scale), S::all(second_scale), S::all(half), S::all(spread), first_only};
  }
  NK_HD R combination(R g1, R g2) const {
    const R mixed = fma(spread, g1 - g2, half * (g1 + g2));
    return first_only ? g1 : mixed;
  }
};

// In place: w = g1, g = g2.
struct SvagCombine {
  static constexpr Traits traits = Traits{}.without_sums();
  using First = SvagCombine;
  template <class R> using Coefficients = PairCoefficients<R>;
  template <class R> static NK_HD void apply(const PairCoefficients<R>& c, R& w, R g) { w = c.combination(w, g); }
};

// The coefficients of a rule without any.
template <class R> struct NoCoefficients {
  static NK_HD NoCoefficients from(const Hyper&, const OfTensor&) { return {}; }
  template <class S> NK_HD NoCoefficients<S> broadcast() const { return {}; }
};

// Nothing is written. The "update" that is summed is g - w: |w|^2, |g|^2, <w,g>, |g-w|^2.
struct Difference {
  static constexpr Traits traits = Traits{}.only_sums();
  using First = Difference;
  template <class R> using Coefficients = NoCoefficients<R>;
  template <class R> static NK_HD void apply(const NoCoefficients<R>&, R& w, R g) { w = g; }
};

template <class R> struct WelfordCoefficients {
  R share;  // 1/n

  static NK_HD WelfordCoefficients from(const Hyper& h, const OfTensor&) { return {(R)h.share}; }
  template <class S> NK_HD WelfordCoefficients<S> broadcast() const { return {S::all(share)}; }
};

// Welford's update of a running mean w and of the sum v of squared deviations by the n-th sample g, share = 1/n:
//     w' = w + (g - w)/n,  v' = v + (g - w)(g - w')
struct Welford {
  static constexpr Traits traits = Traits{}.keeping(1);
  using First = Welford;
  template <class R> using Coefficients = WelfordCoefficients<R>;
  template <class R> static NK_HD void apply(const WelfordCoefficients<R>& c, R& w, R g, R& v) {
    const R deviation = g - w;
    w = fma(c.share, deviation, w);
    v = fma(deviation, g - w, v);
  }
};

// ---- On a sphere ----------------------------------------------------------------------------------------------------
//
// Steps that keep |w| = R, of a tensor or of each of its rows (Hyperball, arXiv 2606.16899), u being the direction of
// SGD or Adam, without learning rate and weight decay:
//     w' = R N(w - eta R N(u)),  N(x) = x/|x|
// In two passes and no third: the first writes the state and sums |w|^2, <w,u> and |u|^2, the second is, with
//     c = eta R/|u|,  a = R/sqrt(|w|^2 - 2c <w,u> + c^2 |u|^2),  w' = w + ((a-1) w - a c u)
// Both take u from the state as it is stored, so that what its type rounds away costs no norm.

// A direction declares Traits, First and Coefficients as a rule does, and
//   advance(coefficients, g, state)    updates the array of state buffers; g is read
//   of(coefficients, g, state)         returns u, of the state after that
//   using Later                        the direction whose `of` it shares
struct SgdDirection {
  static constexpr Traits traits = Traits::step().on_sphere();
  using First = SgdDirection;
  using Later = SgdDirection;
  template <class R> using Coefficients = SgdCoefficients<R>;
  template <class R> static NK_HD void advance(const SgdCoefficients<R>&, R, R*) {}
  template <class R> static NK_HD R of(const SgdCoefficients<R>& c, R g, const R*) { return c.grad_factor * g; }
};

struct MomentumDirectionFirst;
struct MomentumDirection {
  static constexpr Traits traits = Traits::step().keeping(1).on_sphere().by_state_alone();
  using First = MomentumDirectionFirst;
  using Later = MomentumDirection;
  template <class R> using Coefficients = SgdCoefficients<R>;
  template <class R> static NK_HD void advance(const SgdCoefficients<R>& c, R g, R* v) {
    v[0] = fma(c.momentum, v[0], c.one_minus_dampening * (c.grad_factor * g));
  }
  template <class R> static NK_HD R of(const SgdCoefficients<R>&, R, const R* v) { return v[0]; }
};
struct MomentumDirectionFirst : MomentumDirection {
  static constexpr Traits traits = MomentumDirection::traits.first();
  template <class R> static NK_HD void advance(const SgdCoefficients<R>& c, R g, R* v) { v[0] = c.grad_factor * g; }
};

struct NesterovDirectionFirst;
struct NesterovDirection {
  static constexpr Traits traits = Traits::step().keeping(1).on_sphere();
  using First = NesterovDirectionFirst;
  using Later = NesterovDirection;
  template <class R> using Coefficients = SgdCoefficients<R>;
  template <class R> static NK_HD void advance(const SgdCoefficients<R>& c, R g, R* v) {
    MomentumDirection::advance(c, g, v);
  }
  template <class R> static NK_HD R of(const SgdCoefficients<R>& c, R g, const R* v) {
    return fma(c.momentum, v[0], c.grad_factor * g);
  }
};
struct NesterovDirectionFirst : NesterovDirection {
  static constexpr Traits traits = NesterovDirection::traits.first();
  template <class R> static NK_HD void advance(const SgdCoefficients<R>& c, R g, R* v) { v[0] = c.grad_factor * g; }
};

// m'/(sqrt(v')/sqrt(1-beta2^t) + eps); its factor 1/(1-beta1^t) does not turn it. Zero where m' is: without eps, 0/0.
struct AdamDirection {
  static constexpr Traits traits = Traits::step().keeping(2).counting().on_sphere().by_state_alone();
  using First = AdamDirection;
  using Later = AdamDirection;
  template <class R> using Coefficients = AdamCoefficients<R>;
  template <class R> static NK_HD void advance(const AdamCoefficients<R>& c, R g, R* state) {
    const R d = c.grad_factor * g;
    state[0] = fma(c.beta1, state[0], c.rest1 * d);
    state[1] = fma(c.beta2, state[1], c.rest2 * d * d);
  }
  template <class R> static NK_HD R of(const AdamCoefficients<R>& c, R, const R* state) {
    return zero_or(state[0], state[0] / fma(c.unbias, sqrt(state[1]), c.eps));
  }
};

// The first pass, which sums u in place of the update.
template <class Direction> struct Advance {
  static constexpr Traits traits = Direction::traits.first_pass();
  template <class R> using Coefficients = typename Direction::template Coefficients<R>;
  template <class C, class R> static NK_HD void apply(const C& c, R&, R g, R* state) {
    Direction::advance(c, g, state);
  }
  template <class C, class R> static NK_HD R direction(const C& c, R g, const R* state) {
    return Direction::of(c, g, state);
  }
};

template <class Direction, class R> struct TurnCoefficients {
  typename Direction::template Coefficients<R> of_direction;
  R grow, move;

  static NK_HD TurnCoefficients from(const Hyper& h, const OfTensor& t) {
    return {Direction::template Coefficients<R>::from(h, t), (R)t.turn.grow, (R)t.turn.move};
  }
  template <class S> NK_HD TurnCoefficients<Direction, S> broadcast() const {
    return {of_direction.template broadcast<S>(), S::all(grow), S::all(move)};
  }
};

// The second pass.
template <class Direction> struct Turned {
  static constexpr Traits traits = Direction::traits.second_pass();
  template <class R> using Coefficients = TurnCoefficients<Direction, R>;
  template <class C, class R> static NK_HD void apply(const C& c, R& w, R g, R* state) {
    w = w + fma(c.grow, w, -(c.move * Direction::of(c.of_direction, g, state)));
  }
};

// ---- The list that back ends instantiate their loops over -----------------------------------------------------------

using Rules = List<Sgd, SgdMomentum, SgdMomentumFirst, SgdNesterov, SgdNesterovFirst, Gauged, GaugedMomentum,
                   GaugedMomentumFirst, Adam, SvagCombine, Difference, Welford>;

// Those of the CPU's loops on a sphere.
using Directions = List<SgdDirection, MomentumDirection, MomentumDirectionFirst, NesterovDirection,
                        NesterovDirectionFirst, AdamDirection>;

// A position in Rules, and behind them in Directions.
enum class RuleId : uint8_t {};
template <class... A, class... B> constexpr List<A..., B...> joined(List<A...>, List<B...>) { return {}; }
using AllRules = decltype(joined(Rules{}, Directions{}));
template <class Rule> constexpr RuleId id_of = (RuleId)position<Rule>(AllRules{});
[[maybe_unused]] static constexpr int direction_of(RuleId rule) { return (int)rule - Rules::size; }

template <class... All> struct RuleTable {
  Traits traits[sizeof...(All)] = {All::traits...};
  RuleId first[sizeof...(All)] = {id_of<typename All::First>...};
};
template <class... All> constexpr RuleTable<All...> rule_table(List<All...>) { return {}; }
// For the host's code.
constexpr auto kRules = rule_table(AllRules{});
[[maybe_unused]] static const Traits& traits_of(RuleId rule) { return kRules.traits[(int)rule]; }

// ---- The ops over lists of tensors ----------------------------------------------------------------------------------

// An op, its lists of tensors, and the rule that the numbers of a call ask for. Error sentences have these names.
struct Op {
  const char *name, *optimizer;  // optimizer: null if there is none
  const char *w, *g, *buffers[kMostBuffers], *held, *masters;
  RuleId (*rule)(const Hyper&);
  const char* why_state = "";  // when a rule of it keeps state, as the beginning of a clause
  const char* counts = "";     // of a rule that counts steps
};

[[maybe_unused]] static RuleId sgd_rule(const Hyper& h) {
  if (h.keeps_norm)
    return h.momentum == 0 ? id_of<SgdDirection> : h.nesterov ? id_of<NesterovDirection> : id_of<MomentumDirection>;
  if (h.is_gauged) return h.gauge.has_buffer ? id_of<GaugedMomentum> : id_of<Gauged>;
  return h.momentum == 0 ? id_of<Sgd> : h.nesterov ? id_of<SgdNesterov> : id_of<SgdMomentum>;
}
[[maybe_unused]] static RuleId adam_rule(const Hyper& h) { return h.keeps_norm ? id_of<AdamDirection> : id_of<Adam>; }
template <class Rule> static RuleId always(const Hyper&) { return id_of<Rule>; }

constexpr Op kOps[] = {
    {"sgd_", "SGD", "params", "grads", {"momentum_buffers"}, "held", "masters", sgd_rule, "momentum is not 0, "},
    {"adamw_", "AdamW", "params", "grads", {"exp_avgs", "exp_avg_sqs"}, "", "masters", adam_rule, "", "steps"},
    {"adam_", "Adam", "params", "grads", {"exp_avgs", "exp_avg_sqs"}, "", "masters", adam_rule, "", "steps"},
    {"apply_updates_", nullptr, "params", "updates", {}, "", "", sgd_rule},
    {"svag_combine_", nullptr, "grads_a", "grads_b", {}, "", "", always<SvagCombine>},
    {"pair_sums", nullptr, "grads_a", "grads_b", {}, "", "", always<Difference>},
    {"welford_", nullptr, "means", "samples", {"squares"}, "", "", always<Welford>},
    // |g|^2 alone, of which nothing is run.
    {"grad_sq_norms", nullptr, "grads", "grads", {}, "held", "", always<Difference>}};

// ---- What a step sums -----------------------------------------------------------------------------------------------
//
// w and g before the step, w_new as stored (after its rounding), u = w_new - w:
//     |w|^2, |g|^2, <w,g>, |u|^2, <w,u>
// D is double, or several doubles side by side. The product of two floats is exact in double: the sums of float32,
// bfloat16 and float16 come out the same with or without FMA hardware, and no float's square leaves the range.
struct StepSums {
  enum Column { weight_sq, grad_sq, weight_grad_dot, update_sq, weight_update_dot, count };
  template <class D> static NK_HD void add(D* s, D w, D g, D w_new) {
    add_direction(s, w, w_new - w);
    s[grad_sq] = fma(g, g, s[grad_sq]);
    s[weight_grad_dot] = fma(w, g, s[weight_grad_dot]);
  }
  // Those without g, of any u.
  template <class D> static NK_HD void add_direction(D* s, D w, D u) {
    s[weight_sq] = fma(w, w, s[weight_sq]);
    s[update_sq] = fma(u, u, s[update_sq]);
    s[weight_update_dot] = fma(w, u, s[weight_update_dot]);
  }
  // The loops sum the gradient as it lies in memory; users get the sums of g/scale.
  static NK_HD void unscale(double* s, double inverse_scale) {
    s[grad_sq] *= inverse_scale * inverse_scale;
    s[weight_grad_dot] *= inverse_scale;
  }
  // Of gauged weights: w -> scale w, g -> g/scale, u -> scale (moved u + drift w).
  static NK_HD void to_true_scale(double* s, double scale, double moved, double drift) {
    const double sq = scale * scale;
    s[update_sq] =
        sq * (drift * (drift * s[weight_sq] + 2 * moved * s[weight_update_dot]) + moved * moved * s[update_sq]);
    s[weight_update_dot] = sq * (drift * s[weight_sq] + moved * s[weight_update_dot]);
    s[weight_sq] *= sq;
    s[grad_sq] /= sq;
  }
};

// Makes the turn from the sums of the first pass, u being its direction. A u or w that is not finite makes both numbers
// NaN. A zero u leaves the direction of w.
NK_HD Turn turn_of(const double* s, double radius, double lr) {
  const double u = s[StepSums::update_sq], c = u == 0 ? 0 : lr * radius / sqrt(u), by = u == 0 ? 0 : lr * radius;
  const double a = radius / sqrt(s[StepSums::weight_sq] - 2 * c * s[StepSums::weight_update_dot] + by * by);
  return {a - 1, a * c};
}

// What a pair of gradients sums besides, each after its unscaling:
//     <g1,g2>, |g1-g2|^2, |g1|^2, |g2|^2
// <g1,g2> estimates |grad L|^2 and |g1-g2|^2/2 the trace of a batch gradient's covariance, both without bias.
struct PairSums {
  enum Column { pair_dot, pair_difference_sq, first_sq, second_sq, count };
  template <class D> static NK_HD void add(D* s, D g1, D g2) {
    const D d = g1 - g2;
    s[pair_dot] = fma(g1, g2, s[pair_dot]);
    s[pair_difference_sq] = fma(d, d, s[pair_difference_sq]);
    s[first_sq] = fma(g1, g1, s[first_sq]);
    s[second_sq] = fma(g2, g2, s[second_sq]);
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
constexpr int kSums = kMeasure == Measure::pair ? (int)StepSums::count + (int)PairSums::count : (int)StepSums::count;

// Whether there is an op that runs a rule so.
template <class Rule, Measure kMeasure>
constexpr bool has_op = kMeasure == Measure::nothing ? Rule::traits.has_plain
                        : kMeasure == Measure::step  ? Rule::traits.has_sums
                                                     : Rule::traits.has_pairs;

// Sums as the loops make them, turned into those of the user: a single gradient is summed as it lies in memory, a pair
// after its unscaling; gauged weights stand for others.
template <int N> NK_HD void in_user_units(double* sums, const Hyper& h, bool is_gauged) {
  constexpr bool is_pair = N > StepSums::count;
  StepSums::unscale(sums, is_pair ? 1.0 : h.inverse_scale);
  if (!is_gauged) return;
  StepSums::to_true_scale(sums, h.gauge.scale, h.gauge.moved, h.gauge.drift);
  if constexpr (is_pair) PairSums::to_true_scale(sums + StepSums::count, h.gauge.scale);
}

// The same of |g|^2 alone.
template <int N> NK_HD double sq_norm_in_user_units(double sum, const Hyper& h, bool is_gauged) {
  double sums[N] = {};
  sums[StepSums::grad_sq] = sum;
  in_user_units<N>(sums, h, is_gauged);
  return sums[StepSums::grad_sq];
}

// ---- Moments of samples ---------------------------------------------------------------------------------------------

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

// Moments down the rows of a matrix, by groups of rows. Within one, with a shift k near its values, in the arithmetic
// type:
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

}  // namespace nk
