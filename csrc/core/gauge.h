// gauge.h - weight decay as a growing scale: the recurrence, on plain numbers, that lets a step without weight decay
// follow a run with it.
//
// Of a function that is invariant to the scale of w, the gradient at w/a is a times that at w. So the run with decay,
// (w, b), can be kept as (ws, bs) whose weights nothing shrinks:
//     w = scale ws,   b = bs/scale + z w,   scale in [1/sqrt2, sqrt2)
// scale and z come of the optimizer's own recurrence on one number with zero gradient (Li and Arora, arXiv 1910.07454,
// for constant hyperparameters; here for any schedule of all of them): with a all the decay so far,
//     z' = (mu z + (1-tau) lambda)/q,   a'/a = q = 1 - lr (mu z + (1-tau) lambda),   lr of the kept run = lr/(a a')
// a falls without end and lr/(a a') grows, so a = scale 2^-exponent: where scale would leave its range, the step
// multiplies ws by 2^-shift and bs by 2^shift, exactly, and the exponent takes it up. In these units lr stays the
// user's within a factor of 2.
#pragma once
#include <stdint.h>

namespace nk {

struct Gauge {
  double scale = 1, z = 0;  // z in units of a: dimension of a weight decay
  int64_t exponent = 0;
};

// What a group has of momentum buffers.
enum class Buffers : int { none, first, kept, resting };  // resting: momentum is 0, but buffers of earlier steps exist

// One step as the kernels take it, on what is stored (g the stored gradient, up to its unscaling and sign):
//     v' = momentum v + grad_to_buffer g + weight_to_buffer w
//     w' = keep w - grad_to_weight g - buffer_to_weight v'
struct GaugeStep {
  double keep = 1, unkeep = 1, momentum = 0, grad_to_buffer = 0, weight_to_buffer = 0, grad_to_weight = 0,
         buffer_to_weight = 0;
  bool has_buffer = false;
  int shift = 0;  // keep has a factor of 2^-shift, and unkeep is 2^shift
  // Of the true run: w = scale (stored w); w' - w = scale (moved u + drift w), u = unkeep w' - w of what is stored.
  double scale = 1, moved = 1, drift = 0;
  Gauge before, next;
};

struct Schedule {  // of the run with weight decay, at this step
  double lr, momentum, dampening, weight_decay;
  bool nesterov;
};

// The largest lr * weight_decay for which the scale stays positive for ever: (1 - sqrt(momentum))^2.
double most_decay(double momentum);

// False, and `out` is not written: lr * weight_decay is more than that, or no number.
bool gauge_step(const Gauge&, const Schedule&, Buffers, GaugeStep& out);

// The step that leaves: coupled weight decay from now on, and (w, b) as they are.
GaugeStep gauge_leave(const Gauge&, const Schedule&, Buffers);

}  // namespace nk
