// moments.h - tensors of samples as matrices, for the loops that go down their rows.
#pragma once
#include "tensors.h"

namespace nk {

// `samples`: tensors (rows, *shape). `means` and `centred` (None: only the means): of each one's *shape, dense, in the
// arithmetic type; `row_sq` (rows,) and `totals` (2,) float64. See `Moments`. What fits is ops/samples.py's to check.
// `new_scratch`: makes memory, see `Call::scratch`.
void moments(const py::list& samples, const py::list& means, const py::object& centred, double factor,
             const py::object& row_sq, const py::object& totals, const py::object& new_scratch);

// x (B, P), the columns side by side; out: B numbers, float64, dense. See `RowSums`.
void row_sums(const py::object& x, bool squares, const py::object& out, const py::object& new_scratch);

// raw, total: CPU tensors of one shape, dense, float64 or float32. See `SecondMoments`.
bool recentre(const py::object& raw, const py::object& total, double share, double least);

// g, x (B, rows, columns), the columns side by side; mean (or None) and rstd (B, rows), of_weight and of_bias (B,
// columns) or along rows (B, rows), all dense in the arithmetic type. See `NormBatch`.
void norm_sums(const py::object& g, const py::object& x, const py::object& mean, const py::object& rstd,
               bool along_rows, const py::object& of_weight, const py::object& of_bias);

// ids (B, T), whole numbers of 64 bits; g (B, T, D), the columns side by side; total and centred (or None) (V, D) in
// the arithmetic type, on the CPU zeros; row_sq (B,) float64. See `EmbeddingBatch`. On the CPU order and begin are
// None, and an id that is not below V throws py::value_error before anything is written.
void embedding_moments(const py::object& ids, const py::object& order, const py::object& begin, const py::object& g,
                       int64_t padding, const py::object& total, const py::object& centred, const py::object& row_sq,
                       const py::object& new_scratch);

}  // namespace nk
