// gauge.cpp - see gauge.h.
#include "gauge.h"

#include <cmath>

namespace nk {
namespace {

constexpr double kRootHalf = 0.70710678118654752440;

// torch ignores dampening at a first step, and where there is no momentum.
double one_minus_dampening(const Schedule& s, Buffers buffers) {
  return buffers == Buffers::kept ? 1 - s.dampening : 1;
}
bool has_history(Buffers buffers) { return buffers == Buffers::kept || buffers == Buffers::resting; }
bool steps_by_buffer(Buffers buffers) { return buffers == Buffers::first || buffers == Buffers::kept; }

}  // namespace

double most_decay(double momentum) {
  const double root = 1 - std::sqrt(momentum);
  return momentum < 1 ? root * root : 0;
}

bool gauge_step(const Gauge& gauge, const Schedule& s, Buffers buffers, GaugeStep& out) {
  const double f = gauge.scale, z = has_history(buffers) ? gauge.z : 0, left = one_minus_dampening(s, buffers);
  const bool moves_by_buffer = steps_by_buffer(buffers), nesterov = s.nesterov && moves_by_buffer;
  // At the bound itself rounding decides on which side the product falls.
  if (!(s.lr * s.weight_decay <= most_decay(s.momentum) * (1 + 1e-12))) return false;

  const double z_new = (moves_by_buffer ? s.momentum * z : 0) + left * s.weight_decay;
  const double drop = s.lr * (nesterov ? s.weight_decay + s.momentum * z_new : z_new);
  const double q = 1 - drop;
  if (!(q > 0) || std::isinf(q)) return false;

  GaugeStep step;
  step.before = gauge;
  step.scale = f, step.moved = q, step.drift = -drop;
  step.next.scale = f * q;
  for (; step.next.scale < kRootHalf; step.shift++) step.next.scale *= 2;
  for (; step.next.scale >= 2 * kRootHalf; step.shift--) step.next.scale /= 2;
  step.next.exponent = gauge.exponent + step.shift;
  step.next.z = moves_by_buffer ? z_new / q : 0;

  const double up = std::ldexp(1.0, step.shift), lr = s.lr / (f * f * q);
  step.has_buffer = buffers != Buffers::none;
  step.keep = 1 / up, step.unkeep = up;
  if (!moves_by_buffer) {
    step.grad_to_weight = lr / up;
    if (buffers == Buffers::resting) {  // b stays: bs' = scale' b, of which z w is no part any more
      step.momentum = q * up;
      step.weight_to_buffer = q * up * f * f * z;
    }
  } else if (!nesterov) {
    step.momentum = s.momentum * up;
    step.grad_to_buffer = left * up;
    step.buffer_to_weight = lr / (up * up);
  } else {
    // b' = mu b + (1-tau) d, w' = w - lr (d + mu b'), the same substitution: the buffer decays by mu (1 - lr lambda).
    const double rest = 1 - s.lr * s.weight_decay;
    step.momentum = s.momentum * rest * up;
    step.grad_to_buffer = (left * rest + s.lr * z_new) * up;
    step.grad_to_weight = lr * q / rest / up;
    step.buffer_to_weight = lr * s.momentum / rest / (up * up);
  }
  out = step;
  return true;
}

GaugeStep gauge_leave(const Gauge& gauge, const Schedule& s, Buffers buffers) {
  const double f = gauge.scale, z = has_history(buffers) ? gauge.z : 0, left = one_minus_dampening(s, buffers);
  GaugeStep step;
  step.before = gauge;
  step.scale = f, step.moved = 1 / f, step.drift = 1 / f - 1;
  step.has_buffer = buffers != Buffers::none;
  if (!steps_by_buffer(buffers)) {
    step.keep = f * (1 - s.lr * s.weight_decay);
    step.grad_to_weight = s.lr / f;
    step.momentum = 1 / f;
    step.weight_to_buffer = z * f;
    return step;
  }
  step.momentum = s.momentum / f;
  step.grad_to_buffer = left / f;
  step.weight_to_buffer = s.momentum * z * f + left * s.weight_decay * f;
  if (s.nesterov) {
    step.keep = f * (1 - s.lr * s.weight_decay);
    step.grad_to_weight = s.lr / f;
    step.buffer_to_weight = s.lr * s.momentum;
  } else {
    step.keep = f;
    step.buffer_to_weight = s.lr;
  }
  return step;
}

}  // namespace nk
