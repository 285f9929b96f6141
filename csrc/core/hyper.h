// hyper.h - the numbers of a call, as users give them.
#pragma once
#include "gauge.h"
#include "scalar.h"

namespace nk {

// Numbers that lie in a device's memory and take the place of those in Hyper when a kernel runs, so that the host does
// not wait for them.
struct DeviceNumbers {
  const void *lr = nullptr, *weight_decay = nullptr, *beta1 = nullptr, *beta2 = nullptr;  // a float or a double
  bool lr_is_double = false, weight_decay_is_double = false, beta1_is_double = false, beta2_is_double = false;
  const float *grad_scale = nullptr, *found_inf = nullptr;  // of the GradScaler; found_inf not 0: nothing is written
  const double* clip_coef = nullptr;                        // of the step, on the CPU too; see `clip_coef`
};

// What multiplies the learning rate of one parameter: a number, or one in the memory of the device that runs the loop.
struct Multiplier {
  double number;
  const double* at;  // null: `number`

  NK_HD double value() const { return at ? *at : number; }
};

// How bfloat16 weights are stored: rounded to nearest, or at random.
struct Rounding {
  bool is_random = false;
  uint64_t seed = 0;
  uint32_t step = 0;  // how many there have been
};

// The numbers of one param group, or of one call of an op.
struct Hyper {
  double lr = 0, momentum = 0, dampening = 0, weight_decay = 0;
  double inverse_scale = 1;         // 1/scale of the GradScaler, else 1; of a pair, that of the first gradient
  double second_inverse_scale = 1;  // of a pair
  double l = 1;                     // of SVAG
  double share = 0;                 // 1/n, of Welford's update
  double beta1 = 0, beta2 = 0, eps = 0;
  bool nesterov = false, maximize = false;
  bool decoupled = false;                   // weight decay is no part of the gradient
  bool keeps_norm = false, by_row = false;  // of the tensor, or of each row
  bool is_gauged = false;
  GaugeStep gauge{};  // of the gauged rules, which need no lr, momentum, dampening or weight_decay
  DeviceNumbers on_device{};
  Rounding rounding{};

  // What a gradient is multiplied with before a rule takes it. Both gradients of a pair are unscaled by themselves.
  NK_HD double grad_factor(bool is_pair) const {
    const double clip = on_device.clip_coef ? *on_device.clip_coef : 1.0;
    const double scale = clip * (is_pair ? 1.0 : inverse_scale);
    return maximize ? -scale : scale;
  }
};

// The names under which Python sets those that are plain numbers, or flags.
struct HyperNumber {
  const char* name;
  double Hyper::* number;  // null: a flag
  bool Hyper::* flag;
};
constexpr HyperNumber kHyperNumbers[] = {{"lr", &Hyper::lr, nullptr},
                                         {"momentum", &Hyper::momentum, nullptr},
                                         {"dampening", &Hyper::dampening, nullptr},
                                         {"weight_decay", &Hyper::weight_decay, nullptr},
                                         {"nesterov", nullptr, &Hyper::nesterov},
                                         {"maximize", nullptr, &Hyper::maximize},
                                         {"inverse_scale", &Hyper::inverse_scale, nullptr},
                                         {"second_inverse_scale", &Hyper::second_inverse_scale, nullptr},
                                         {"l", &Hyper::l, nullptr},
                                         {"share", &Hyper::share, nullptr},
                                         {"beta1", &Hyper::beta1, nullptr},
                                         {"beta2", &Hyper::beta2, nullptr},
                                         {"eps", &Hyper::eps, nullptr},
                                         {"decoupled", nullptr, &Hyper::decoupled},
                                         {"keeps_norm", nullptr, &Hyper::keeps_norm},
                                         {"by_row", nullptr, &Hyper::by_row}};

// x^n by squaring: the same bits on every back end, which a library's pow does not promise.
NK_HD double power(double x, uint64_t n) {
  double y = 1;
  for (; n; n >>= 1, x *= x)
    if (n & 1) y *= x;
  return y;
}

// What averages that began at zero have grown to after t steps: 1 - beta1^t, sqrt(1 - beta2^t). NaN for what is no
// count.
struct Bias {
  double first, second_root;

  static NK_HD Bias after(double steps, const Hyper& h) {
    if (!(steps >= 1 && steps < 0x1p63)) return {__builtin_nan(""), __builtin_nan("")};
    const auto t = (uint64_t)steps;
    return {1 - power(h.beta1, t), sqrt(1 - power(h.beta2, t))};
  }
};

// How many steps a parameter has taken, this one included: in the memory of the device that runs the loop, else what
// follows from it.
struct StepCount {
  Bias bias;
  const void* at;  // null: `bias`; else a float or a double
  bool is_double;

  NK_HD Bias value(const Hyper& h) const {
    if (!at) return bias;
    return Bias::after(is_double ? *static_cast<const double*>(at) : (double)*static_cast<const float*>(at), h);
  }
};

// The numbers of one tensor.
struct TensorNumbers {
  Multiplier of_lr{1, nullptr};
  StepCount count{{1, 1}, nullptr, false};
};

}  // namespace nk
