// moments.cpp - see moments.h.
#include "moments.h"

#include <algorithm>
#include <vector>

namespace nk {
namespace {

View take(py::handle tensor) {
  const auto v = view_on_cpu(tensor.ptr());
  if (!v) throw py::type_error("moments: no kernel takes " + describe(tensor.ptr()));
  return *v;
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

void moments(const py::list& samples, const py::list& means, const py::object& centred, const py::object& row_sq,
             const py::object& totals) {
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
                  static_cast<double*>(take(row_sq).data),
                  static_cast<double*>(take(totals).data),
                  dtype};
  std::optional<py::gil_scoped_release> released;
  if (rows * columns > kReleaseGil) released.emplace();
  cpu::moments(m);
}

}  // namespace nk
