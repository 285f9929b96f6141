// moments.h - tensors of samples as matrices, for the loops that go down their rows.
#pragma once
#include "tensors.h"

namespace nk {

// `samples`: tensors (rows, *shape). `means` and `centred` (None: only the means): of each one's *shape, dense, in the
// arithmetic type; `row_sq` (rows,) and `totals` (2,) float64. See `Moments`. What fits is ops.py's to check.
void moments(const py::list& samples, const py::list& means, const py::object& centred, double factor,
             const py::object& row_sq, const py::object& totals);

// x (B, P), the columns side by side; out: B numbers, float64, dense. See `RowSquares`.
void row_squares(const py::object& x, const py::object& out);

// g, x (B, rows, columns), the columns side by side; mean (or None) and rstd (B, rows), of_weight and of_bias (B,
// columns) or along rows (B, rows), all dense in the arithmetic type. See `NormBatch`.
void norm_sums(const py::object& g, const py::object& x, const py::object& mean, const py::object& rstd,
               bool along_rows, const py::object& of_weight, const py::object& of_bias);

// `ids`: the address of (B, T) whole numbers of 64 bits; g (B, T, D), the columns side by side; total and centred (or
// None) zeros (V, D) in the arithmetic type; row_sq (B,) float64. Throws py::value_error for an id that is not below V,
// before anything is written. See `EmbeddingBatch`.
void embedding_moments(uintptr_t ids, const py::object& g, int64_t padding, const py::object& total,
                       const py::object& centred, const py::object& row_sq);

}  // namespace nk
