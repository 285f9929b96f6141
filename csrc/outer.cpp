// outer.cpp - see outer.h.
#include "outer.h"

#include <algorithm>

namespace nk {
namespace {

constexpr int64_t kReleaseGil = 1 << 17;  // multiply-adds; below, to release it takes longer than to finish

// An argument that kernels take, of a given number of dimensions.
View taken(const char* op, const char* name, const py::object& argument, const char* shape, int ndim) {
  const auto v = view(argument.ptr());
  if (!v)
    throw py::type_error(std::string(op) + ": " + name + " is " + describe(argument.ptr()) +
                         "; expected a torch.Tensor of float64, float32, bfloat16 or float16 on cpu");
  if (v->ndim != ndim)
    throw py::value_error(std::string(op) + ": " + name + " expected shape " + shape + ", got " + shape_text(*v));
  return *v;
}

void check_dtype(const char* op, const View& a, const py::object& of_a, const char* name, const View& b,
                 const py::object& of_b, const char* other) {
  if (a.dtype != b.dtype)
    throw py::type_error(std::string(op) + ": " + name + " is " + describe(of_a.ptr()) + " but " + other + " is " +
                         describe(of_b.ptr()) + "; expected one dtype");
}

struct OuterViews {
  View a, g;
};
OuterViews outer_views(const py::object& a, const py::object& g) {
  constexpr const char* op = "outer_moments";
  OuterViews v{taken(op, "a", a, "(B, T, I)", 3), taken(op, "g", g, "(B, T, O)", 3)};
  check_dtype(op, v.g, g, "g", v.a, a, "a");
  if (v.a.shape[0] != v.g.shape[0] || v.a.shape[1] != v.g.shape[1])
    throw py::value_error(std::string(op) + ": g has shape " + shape_text(v.g) + " but a has " + shape_text(v.a) +
                          "; expected the same (B, T)");
  return v;
}

// Memory that ops.py has made for the results.
template <class X> X* result(const char* op, const char* name, const py::object& o, DType dtype, int64_t numel) {
  const auto v = view(o.ptr());
  if (!v || v->dtype != dtype || v->numel != numel || !v->dense)
    throw py::value_error(std::string(op) + ": " + name + " expected " + std::to_string(numel) +
                          " dense numbers of the real type, got " + (v ? shape_text(*v) : describe(o.ptr())));
  return static_cast<X*>(v->data);
}

SampleSums sample_sums(const char* op, DType dtype, int64_t numel, int64_t batch, const py::object& total,
                       const py::object& centred, const py::object& sq_norms) {
  const DType real = dtype == DType::f64 ? DType::f64 : DType::f32;
  return {result<void>(op, "total", total, real, numel),
          centred.is_none() ? nullptr : result<void>(op, "centred", centred, real, numel),
          result<double>(op, "sq_norms", sq_norms, DType::f64, batch)};
}

}  // namespace

std::pair<int64_t, int64_t> outer_shape(const py::object& a, const py::object& g) {
  const OuterViews v = outer_views(a, g);
  return {v.g.shape[2], v.a.shape[2]};
}

void outer_moments(const py::object& a, const py::object& g, const py::object& total, const py::object& centred,
                   const py::object& sq_norms) {
  const OuterViews v = outer_views(a, g);
  const int64_t batch = v.a.shape[0], steps = v.a.shape[1], inputs = v.a.shape[2], outputs = v.g.shape[2];
  for (const View& x : {v.a, v.g})
    if (x.shape[2] > 1 && x.strides[2] != 1)
      throw py::value_error(
          "outer_moments: expected operands that are dense along their last dimension, got a stride of " +
          std::to_string(x.strides[2]));
  const Outer outer{
      v.a.dtype,      batch,
      steps,          outputs,
      inputs,         v.a.data,
      v.g.data,       v.a.strides[0],
      v.a.strides[1], v.g.strides[0],
      v.g.strides[1], sample_sums("outer_moments", v.a.dtype, outputs * inputs, batch, total, centred, sq_norms)};
  std::optional<py::gil_scoped_release> released;
  if (batch * steps * outputs * inputs > kReleaseGil) released.emplace();
  cpu::outer_moments(outer);
}

}  // namespace nk
