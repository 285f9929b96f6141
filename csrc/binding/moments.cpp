// moments.cpp - see moments.h.
#include "moments.h"

#include <algorithm>
#include <vector>

#include "launch.h"

namespace nk {
namespace {

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

void check_ids(const int64_t* ids, int64_t samples, int64_t positions, int64_t rows) {
  for (int64_t i = 0; i < samples * positions; i++)
    if (ids[i] < 0 || ids[i] >= rows)
      throw py::value_error("embedding_moments: ids[" + std::to_string(i / positions) + ", " +
                            std::to_string(i % positions) + "] is " + std::to_string(ids[i]) + "; expected 0 to " +
                            std::to_string(rows - 1) + ", for num_embeddings is " + std::to_string(rows));
}

}  // namespace

void moments(const py::list& samples, const py::list& means, const py::object& centred, double factor,
             const py::object& row_sq, const py::object& totals, const py::object& new_scratch) {
  Call call("moments");
  const size_t count = samples.size();
  const bool squares = !centred.is_none();
  std::vector<Samples> matrices(count);
  std::vector<std::vector<int64_t>> walks(count);  // shape, then strides
  int64_t rows = 0, columns = 0;
  DType dtype{};
  for (size_t i = 0; i < count; i++) {
    const View x = call.take("x", samples[i]), mean = call.take("mean", means[i]);
    const auto dimensions = row_dimensions(x, mean);
    const bool side_by_side = dimensions.empty() || (dimensions.size() == 1 && dimensions[0].stride == 1);
    for (const Dimension& d : dimensions) walks[i].push_back(d.size);
    for (const Dimension& d : dimensions) walks[i].push_back(d.stride);
    rows = x.shape[0], dtype = x.dtype, columns += mean.numel;
    matrices[i] = {x.data,          x.strides[0],
                   mean.numel,      side_by_side ? 0 : (int)dimensions.size(),
                   walks[i].data(), walks[i].data() + dimensions.size(),
                   mean.data,       squares ? call.take("centred", py::list(centred)[i]).data : nullptr};
  }
  Moments m{matrices.data(),
            (int64_t)count,
            rows,
            squares,
            factor,
            static_cast<double*>(call.data("row_sq", row_sq)),
            static_cast<double*>(call.data("totals", totals)),
            dtype,
            nullptr};
  if (!call.is_on_cpu()) m.scratch = call.scratch(new_scratch, cuda_kernels->moments_scratch(m));
  call.run(
      rows * columns > kReleaseGil, [&] { cpu::moments(m); },
      [&](const cuda::Queue& queue) { return cuda_kernels->moments(m, queue); });
}

void row_sums(const py::object& x, bool squares, const py::object& out, const py::object& new_scratch) {
  Call call("row_sums");
  const View v = call.take("x", x);
  RowSums r{v.data,  v.shape[0], v.shape[1], v.strides[0], squares, static_cast<double*>(call.data("out", out)),
            v.dtype, nullptr};
  if (!call.is_on_cpu()) r.scratch = call.scratch(new_scratch, cuda_kernels->row_sums_scratch(r));
  call.run(
      v.numel > kReleaseGil, [&] { cpu::row_sums(r); },
      [&](const cuda::Queue& queue) { return cuda_kernels->row_sums(r, queue); });
}

bool recentre(const py::object& raw, const py::object& total, double share, double least) {
  Call call("recentre");
  const View v = call.take("raw", raw);
  const SecondMoments m{v.data, call.data("total", total), v.numel, share, least, v.dtype};
  bool is_kept = true;
  call.run(
      v.numel > kReleaseGil, [&] { is_kept = cpu::recentre(m); },
      [](const cuda::Queue&) -> const char* { return "this op has no kernel for CUDA; torch does it"; });
  return is_kept;
}

void norm_sums(const py::object& g, const py::object& x, const py::object& mean, const py::object& rstd,
               bool along_rows, const py::object& of_weight, const py::object& of_bias) {
  Call call("norm_sums");
  const View a = call.take("g", g), b = call.take("x", x);
  const NormBatch n{{a.data, a.strides[0], a.strides[1]},
                    {b.data, b.strides[0], b.strides[1]},
                    a.shape[0],
                    a.shape[1],
                    a.shape[2],
                    call.data("mean", mean),
                    call.data("rstd", rstd),
                    along_rows,
                    call.data("of_weight", of_weight),
                    call.data("of_bias", of_bias),
                    a.dtype};
  call.run(
      a.numel > kReleaseGil, [&] { cpu::norm_sums(n); },
      [&](const cuda::Queue& queue) { return cuda_kernels->norm_sums(n, queue); });
}

void embedding_moments(const py::object& ids, const py::object& order, const py::object& begin, const py::object& g,
                       int64_t padding, const py::object& total, const py::object& centred, const py::object& row_sq,
                       const py::object& new_scratch) {
  Call call("embedding_moments");
  const View a = call.take("g", g), table = call.take("total", total);
  const int64_t samples = a.shape[0], positions = a.shape[1], rows = table.shape[0];
  const int64_t* id = call.take_ids("ids", ids).data;
  if (call.is_on_cpu()) check_ids(id, samples, positions, rows);
  EmbeddingBatch e{id,
                   call.is_on_cpu() ? nullptr : call.take_ids("order", order).data,
                   call.is_on_cpu() ? nullptr : call.take_ids("begin", begin).data,
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
                   call.data("centred", centred),
                   static_cast<double*>(call.data("row_sq", row_sq)),
                   a.dtype,
                   nullptr};
  if (!call.is_on_cpu()) e.scratch = call.scratch(new_scratch, cuda_kernels->embedding_scratch(e));
  call.run(
      a.numel > kReleaseGil, [&] { cpu::embedding_moments(e); },
      [&](const cuda::Queue& queue) { return cuda_kernels->embedding_moments(e, queue); });
}

}  // namespace nk
