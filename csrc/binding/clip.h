// clip.h - clipping by the global norm: what is outside of a pass.
#pragma once
#include "pass.h"

namespace nk {

// The root of the sum of `sq_norms` and what gradients are to be multiplied with, into one number of float64 each. With
// a `found_inf` that is not 0, of a GradScaler, the norm is NaN.
void clip_coef(const py::object& sq_norms, double max_norm, const py::object& norm, const py::object& coef,
               const py::object& found_inf);

}  // namespace nk
