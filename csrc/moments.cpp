// moments.cpp - see moments.h.
#include "moments.h"

#include <algorithm>
#include <vector>

namespace nk {
namespace {

View take(py::handle tensor) {
  const auto v = view_on_cpu(tensor.ptr());
  if (!v) throw py::type_error("expected a tensor that a kernel takes, got " + describe(tensor.ptr()));
  return *v;
}
void* data_of(const py::object& tensor) { return tensor.is_none() ? nullptr : take(tensor).data; }

template <class Call> void without_gil(int64_t coordinates, Call call) {
  std::optional<py::gil_scoped_release> released;
  if (coordinates > kReleaseGil) released.emplace();
  call();
}

struct Dimension {
  int64_t size, stride, order;  // `order`: the stride of the mean
};

// A row's dimensions in the order of the mean's memory, those that follow each other in both made one.
std::vector<Dimension> row_dimensions(const View& x, const View& mean) {
  std::vector<Dimension> all, merged;
  for (int d = 0; d < mean.ndim; d++)
    if (mean.shape[d] != 1) all.push_back({mean.shape[d], x.strides[d + 1], mean.strides[d]});
  std::sort(all.begin(), all.end(), [](const Dimension& a, const Dimension& b) { return a.order > b.order; });
  for (const Dimension& d : all) {
    if (!merged.empty() && merged.back().stride == d.stride * d.size) {
      merged.back().size *= d.size;
      merged.back().stride = d.stride;
    } else {
      merged.push_back(d);
    }
  }
  return merged;
}

}  // namespace

void moments(const py::list& samples, const py::list& means, const py::object& centred, double factor,
             const py::object& row_sq, const py::object& totals) {
  const size_t count = samples.size();
  const bool squares = !centred.is_none();
  std::vector<Samples> matrices(count);
  std::vector<std::vector<int64_t>> walks(count);  // shape, then strides
  int64_t rows = 0, columns = 0;
  DType dtype{};
  for (size_t i = 0; i < count; i++) {
    const View x = take(samples[i]), mean = take(means[i]);
    const auto dimensions = row_dimensions(x, mean);
    const bool side_by_side = dimensions.empty() || (dimensions.size() == 1 && dimensions[0].stride == 1);
    for (const Dimension& d : dimensions) walks[i].push_back(d.size);
    for (const Dimension& d : dimensions) walks[i].push_back(d.stride);
    rows = x.shape[0], dtype = x.dtype, columns += mean.numel;
    matrices[i] = {x.data,          x.strides[0],
                   mean.numel,      side_by_side ? 0 : (int)dimensions.size(),
                   walks[i].data(), walks[i].data() + dimensions.size(),
                   mean.data,       squares ? take(py::list(centred)[i]).data : nullptr};
  }
  const Moments m{matrices.data(),
                  (int64_t)count,
                  rows,
                  squares,
                  factor,
                  static_cast<double*>(data_of(row_sq)),
                  static_cast<double*>(data_of(totals)),
                  dtype};
  without_gil(rows * columns, [&] { cpu::moments(m); });
}

void row_squares(const py::object& x, const py::object& out) {
  const View v = take(x);
  const RowSquares r{v.data, v.shape[0], v.shape[1], v.strides[0], static_cast<double*>(data_of(out)), v.dtype};
  without_gil(v.numel, [&] { cpu::row_squares(r); });
}

void norm_sums(const py::object& g, const py::object& x, const py::object& mean, const py::object& rstd,
               bool along_rows, const py::object& of_weight, const py::object& of_bias) {
  const View a = take(g), b = take(x);
  const NormBatch n{{a.data, a.strides[0], a.strides[1]},
                    {b.data, b.strides[0], b.strides[1]},
                    a.shape[0],
                    a.shape[1],
                    a.shape[2],
                    data_of(mean),
                    data_of(rstd),
                    along_rows,
                    data_of(of_weight),
                    data_of(of_bias),
                    a.dtype};
  without_gil(a.numel, [&] { cpu::norm_sums(n); });
}

void embedding_moments(uintptr_t ids, const py::object& g, int64_t padding, const py::object& total,
                       const py::object& centred, const py::object& row_sq) {
  const View a = take(g), table = take(total);
  const int64_t samples = a.shape[0], positions = a.shape[1], rows = table.shape[0];
  const auto* id = reinterpret_cast<const int64_t*>(ids);
  for (int64_t i = 0; i < samples * positions; i++)
    if (id[i] < 0 || id[i] >= rows)
      throw py::value_error("embedding_moments: ids[" + std::to_string(i / positions) + ", " +
                            std::to_string(i % positions) + "] is " + std::to_string(id[i]) + "; expected 0 to " +
                            std::to_string(rows - 1) + ", for num_embeddings is " + std::to_string(rows));
  const EmbeddingBatch e{id,
                         a.data,
                         a.strides[0],
                         a.strides[1],
                         samples,
                         positions,
                         a.shape[2],
                         rows,
                         padding,
                         !centred.is_none(),
                         table.data,
                         data_of(centred),
                         static_cast<double*>(data_of(row_sq)),
                         a.dtype};
  without_gil(a.numel, [&] { cpu::embedding_moments(e); });
}

}  // namespace nk
