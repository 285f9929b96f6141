// moments.h - tensors of samples as matrices, for the loops that go down their rows.
#pragma once
#include "tensors.h"

namespace nk {

// `samples`: tensors (rows, *shape). `means` and `centred` (None: only the means): of each one's *shape, dense, in the
// arithmetic type; `row_sq` (rows,) and `totals` (2,) float64. See `Moments`. What fits is ops.py's to check.
void moments(const py::list& samples, const py::list& means, const py::object& centred, const py::object& row_sq,
             const py::object& totals);

}  // namespace nk
