// per_sample.cpp - see per_sample.h.
#include "per_sample.h"

#include <algorithm>

#include "launch.h"

namespace nk {
namespace {

constexpr int64_t kReleaseGilWork = 1 << 17;  // multiply-adds; below, to release it takes longer than to finish

// Of a kernel's size, stride, padding and dilation, and of the positions of x that they reach over: sizes in bytes stay
// far inside 64 bits.
constexpr int64_t kMostNumber = 1 << 20;
constexpr double kMostReach = 0x1p40;

// An argument of a given number of dimensions.
View taken(Call& call, const char* op, const char* name, const py::object& argument, const char* shape, int ndim) {
  const View v = call.take(name, argument);
  if (ndim && v.ndim != ndim)
    throw py::value_error(std::string(op) + ": " + name + " expected shape " + shape + ", got " + shape_text(v));
  return v;
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
OuterViews outer_views(Call& call, const py::object& a, const py::object& g) {
  constexpr const char* op = "outer_moments";
  OuterViews v{taken(call, op, "a", a, "(B, T, I)", 3), taken(call, op, "g", g, "(B, T, O)", 3)};
  check_dtype(op, v.g, g, "g", v.a, a, "a");
  if (v.a.shape[0] != v.g.shape[0] || v.a.shape[1] != v.g.shape[1])
    throw py::value_error(std::string(op) + ": g has shape " + shape_text(v.g) + " but a has " + shape_text(v.a) +
                          "; expected the same (B, T)");
  return v;
}

// Dimensions that there are not have size 1.
struct ConvViews {
  View x, g;
  int64_t kernel[3] = {1, 1, 1}, stride[3] = {1, 1, 1}, padding[3] = {0, 0, 0}, dilation[3] = {1, 1, 1};
};

std::string text(const py::object& o) { return py::repr(o); }

void read(const char* name, const py::object& from, int dims, int64_t least, int64_t* to) {
  const bool is_tuple = py::isinstance<py::tuple>(from) || py::isinstance<py::list>(from);
  bool fits = is_tuple && (int)py::len(from) == dims;
  for (int d = 0; fits && d < dims; d++) {
    const py::object one = from[py::int_(d)];
    fits = PyLong_Check(one.ptr()) && !PyBool_Check(one.ptr());
    const long long value = fits ? PyLong_AsLongLong(one.ptr()) : 0;
    if (PyErr_Occurred()) PyErr_Clear(), fits = false;
    fits = fits && value >= least && value <= kMostNumber;
    to[3 - dims + d] = value;
  }
  if (!fits)
    throw py::value_error(std::string("conv_moments: ") + name + " expected " + std::to_string(dims) +
                          " whole numbers" + (least == 1 ? " from 1" : "") + ", one for each space dimension, got " +
                          text(from));
}

ConvViews conv_views(Call& call, const py::object& x, const py::object& g, const ConvNumbers& numbers) {
  constexpr const char* op = "conv_moments";
  ConvViews v{taken(call, op, "x", x, "", 0), {}};
  if (v.x.ndim < 3 || v.x.ndim > 5)
    throw py::value_error("conv_moments: x expected shape (B, C, *space) with 1 to 3 space dimensions, got " +
                          shape_text(v.x));
  v.g = taken(call, op, "g", g,
              v.x.ndim == 3   ? "(B, O, L)"
              : v.x.ndim == 4 ? "(B, O, H, W)"
                              : "(B, O, D, H, W)",
              v.x.ndim);
  check_dtype(op, v.g, g, "g", v.x, x, "x");
  if (v.x.shape[0] != v.g.shape[0])
    throw py::value_error("conv_moments: g has shape " + shape_text(v.g) + " but x has " + shape_text(v.x) +
                          "; expected the same B");
  const int dims = v.x.ndim - 2;
  read("kernel_size", numbers.kernel_size, dims, 1, v.kernel);
  read("stride", numbers.stride, dims, 1, v.stride);
  read("padding", numbers.padding, dims, -kMostNumber, v.padding);
  read("dilation", numbers.dilation, dims, 1, v.dilation);
  double reach = 1;
  for (int d = 0; d < dims; d++) {
    const int at = 3 - dims + d;
    reach *= (double)(v.g.shape[2 + d] - 1) * v.stride[at] + (double)(v.kernel[at] - 1) * v.dilation[at] + 1;
  }
  if (reach > kMostReach)
    throw py::value_error(
        "conv_moments: kernel_size, stride and dilation expected to reach over at most 2^40 positions"
        " of x, got " +
        text(py::float_(reach)));
  if (numbers.groups < 1 || v.x.shape[1] % numbers.groups || v.g.shape[1] % numbers.groups)
    throw py::value_error("conv_moments: groups expected a divisor of the channels of x and of g, " +
                          std::to_string(v.x.shape[1]) + " and " + std::to_string(v.g.shape[1]) + ", got " +
                          std::to_string(numbers.groups));
  return v;
}

// Memory that ops.py has made for the results.
template <class X>
X* result(Call& call, const char* op, const char* name, const py::object& o, DType dtype, int64_t numel) {
  const View v = call.take(name, o);
  if (v.dtype != dtype || v.numel != numel || !v.dense)
    throw py::value_error(std::string(op) + ": " + name + " expected " + std::to_string(numel) +
                          " dense numbers of the real type, got " + shape_text(v) + " of " + describe(o.ptr()));
  return static_cast<X*>(v.data);
}

SampleSums sample_sums(Call& call, const char* op, DType dtype, int64_t numel, int64_t batch, const Results& to) {
  const DType real = dtype == DType::f64 ? DType::f64 : DType::f32;
  return {result<void>(call, op, "total", to.total, real, numel),
          to.centred.is_none() ? nullptr : result<void>(call, op, "centred", to.centred, real, numel),
          result<double>(call, op, "sq_norms", to.sq_norms, DType::f64, batch), nullptr};
}

}  // namespace

std::pair<int64_t, int64_t> outer_shape(const py::object& a, const py::object& g) {
  Call call("outer_moments");
  const OuterViews v = outer_views(call, a, g);
  return {v.g.shape[2], v.a.shape[2]};
}

void outer_moments(const py::object& a, const py::object& g, const Results& to) {
  Call call("outer_moments");
  const OuterViews v = outer_views(call, a, g);
  const int64_t batch = v.a.shape[0], steps = v.a.shape[1], inputs = v.a.shape[2], outputs = v.g.shape[2];
  for (const View& x : {v.a, v.g})
    if (x.shape[2] > 1 && x.strides[2] != 1)
      throw py::value_error(
          "outer_moments: expected operands that are dense along their last dimension, got a stride of " +
          std::to_string(x.strides[2]));
  Outer outer{
      v.a.dtype,      batch,          steps,
      outputs,        inputs,         v.a.data,
      v.g.data,       v.a.strides[0], v.a.strides[1],
      v.g.strides[0], v.g.strides[1], sample_sums(call, "outer_moments", v.a.dtype, outputs * inputs, batch, to)};
  if (!call.is_on_cpu()) outer.sums.scratch = call.scratch(to.new_scratch, cuda_kernels->outer_scratch(outer));
  call.run(
      batch * steps * outputs * inputs > kReleaseGilWork, [&] { cpu::outer_moments(outer); },
      [&](const cuda::Queue& queue) { return cuda_kernels->outer_moments(outer, queue); });
}

std::vector<int64_t> conv_shape(const py::object& x, const py::object& g, const ConvNumbers& numbers) {
  Call call("conv_moments");
  const ConvViews v = conv_views(call, x, g, numbers);
  std::vector<int64_t> shape{v.g.shape[1], v.x.shape[1] / numbers.groups};
  shape.insert(shape.end(), v.kernel + 5 - v.x.ndim, v.kernel + 3);
  return shape;
}

void conv_moments(const py::object& x, const py::object& g, const ConvNumbers& numbers, const Results& to) {
  Call call("conv_moments");
  const ConvViews v = conv_views(call, x, g, numbers);
  const int dims = v.x.ndim - 2;
  Conv conv{};
  conv.dtype = v.x.dtype;
  conv.batch = v.x.shape[0];
  conv.groups = numbers.groups;
  conv.outputs = v.g.shape[1] / numbers.groups, conv.inputs = v.x.shape[1] / numbers.groups;
  std::copy(v.kernel, v.kernel + 3, conv.kernel);
  std::copy(v.stride, v.stride + 3, conv.stride);
  std::copy(v.padding, v.padding + 3, conv.padding);
  std::copy(v.dilation, v.dilation + 3, conv.dilation);
  conv.x = v.x.data, conv.x_sample = v.x.strides[0], conv.x_channel = v.x.strides[1];
  conv.g = v.g.data, conv.g_sample = v.g.strides[0], conv.g_channel = v.g.strides[1];
  for (int d = 0; d < 3; d++) {
    const int from = d - 3 + v.x.ndim;
    conv.in[d] = d < 3 - dims ? 1 : v.x.shape[from];
    conv.out[d] = d < 3 - dims ? 1 : v.g.shape[from];
    if (d == 2) {
      for (const View& y : {v.x, v.g})
        if (y.shape[from] > 1 && y.strides[from] != 1)
          throw py::value_error(
              "conv_moments: expected operands that are dense along their last dimension, got a stride of " +
              std::to_string(y.strides[from]));
    } else if (d >= 3 - dims) {
      conv.x_space[d] = v.x.strides[from], conv.g_space[d] = v.g.strides[from];
    }
  }
  int64_t size = v.g.shape[1] * conv.inputs, positions = conv.out[0] * conv.out[1] * conv.out[2];
  for (int64_t k : conv.kernel) size *= k;
  conv.sums = sample_sums(call, "conv_moments", conv.dtype, size, conv.batch, to);
  if (!call.is_on_cpu()) conv.sums.scratch = call.scratch(to.new_scratch, cuda_kernels->conv_scratch(conv));
  call.run(
      conv.batch * positions * size > kReleaseGilWork, [&] { cpu::conv_moments(conv); },
      [&](const cuda::Queue& queue) { return cuda_kernels->conv_moments(conv, queue); });
}

}  // namespace nk
