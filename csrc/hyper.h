// hyper.h - the numbers of a call, as users give them, and the coefficients that the formulas take.
#pragma once
#include "formulas.h"
#include "gauge.h"

namespace nk {

// Numbers that lie in a device's memory and take the place of those in Hyper when a kernel runs: nobody waits for them.
struct DeviceNumbers {
  const void *lr = nullptr, *weight_decay = nullptr;  // a float or a double
  bool lr_is_double = false, weight_decay_is_double = false;
  const float *grad_scale = nullptr, *found_inf = nullptr;  // of the GradScaler; found_inf not 0: nothing is written
  const double* clip_coef = nullptr;                        // of the step, on the CPU too; see formulas.h
};

// Of a parameter's learning rate: a number, or one in the memory of whoever runs the loop.
struct Multiplier {
  double number;
  const double* at;  // null: `number`

  NK_HD double value() const { return at ? *at : number; }
};

// How bfloat16 weights are stored: to nearest, or at random.
struct Rounding {
  bool is_random = false;
  uint64_t seed = 0;
  uint32_t step = 0;  // how many there have been
};

// The numbers of one param group, or of one call of an op.
struct Hyper {
  double lr, momentum, dampening, weight_decay;
  double inverse_scale;  // 1/scale of the GradScaler, else 1; of a pair, that of the first gradient
  bool maximize;
  double second_inverse_scale;  // of a pair
  double l;                     // of SVAG
  double share;                 // 1/n, of Welford's update
  GaugeStep gauge{};            // of the gauged rules, which need no lr, momentum, dampening or weight_decay
  DeviceNumbers on_device{};
  Rounding rounding{};
};

template <class R>
NK_HD Coefficients<R> coefficients(const Hyper& h, bool is_pair, bool is_gauged, const Multiplier& of_lr) {
  const double clip = h.on_device.clip_coef ? *h.on_device.clip_coef : 1.0;
  const double scale = clip * (is_pair ? 1.0 : h.inverse_scale);
  const GaugeStep& g = h.gauge;
  return {(R)(h.lr * of_lr.value()),
          (R)(is_gauged ? g.momentum : h.momentum),
          (R)(1 - h.dampening),
          (R)h.weight_decay,
          (R)(h.maximize ? -scale : scale),
          (R)h.inverse_scale,
          (R)h.second_inverse_scale,
          (R)0.5,
          (R)(__builtin_sqrt(2 * h.l - 1) / 2),
          (R)h.share,
          h.weight_decay != 0,
          h.l == 1,
          (R)g.keep,
          (R)g.unkeep,
          (R)g.grad_to_buffer,
          (R)g.weight_to_buffer,
          (R)g.grad_to_weight,
          (R)g.buffer_to_weight,
          g.weight_to_buffer != 0,
          g.grad_to_weight != 0};
}

// Sums as the loops make them, turned into what the user is told: a single gradient is summed as it lies in memory, a
// pair after its unscaling; gauged weights stand for others.
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
  sums[1] = sum;
  in_user_units<N>(sums, h, is_gauged);
  return sums[1];
}

}  // namespace nk
