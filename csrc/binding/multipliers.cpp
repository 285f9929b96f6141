// multipliers.cpp - see multipliers.h.
#include "multipliers.h"

#include <cmath>

namespace nk {
namespace {

double number_at(const View& v, int64_t i) {
  const int64_t at = i * v.strides[0];
  return dispatch(v.dtype, [&](auto type) {
    using T = decltype(type);
    const T x = static_cast<const T*>(v.data)[at];
    if constexpr (is_same<T, Real<T>>)
      return (double)x;
    else
      return (double)widen(x);
  });
}

}  // namespace

LrMultipliers::LrMultipliers(const py::object& given, int64_t count, const std::string& where) : where_(where) {
  const std::string expected = where + ": lr_multipliers expected ";
  const std::string of_each = std::to_string(count) + " numbers, one for each parameter of the group, got ";
  if (const auto v = view(given.ptr())) {
    if (v->ndim != 1 || v->numel != count)
      throw py::value_error(expected + of_each + "a tensor of shape " + shape_text(*v));
    if (v->device != kCpu) {
      if (v->dtype != DType::f64 || !v->dense)
        throw py::value_error(expected + "a dense tensor of float64 on a device, got " + describe(given.ptr()));
      tensor_ = given, on_device_ = static_cast<const double*>(v->data), device_ = v->device;
      return;
    }
    for (int64_t i = 0; i < count; i++) numbers_.push_back(number_at(*v, i));
  } else {
    if (py::hasattr(given, "dtype") && py::hasattr(given, "layout"))
      throw py::value_error(expected + "a plain tensor of " + dtypes_text() + ", got " + describe(given.ptr()));
    if (!PySequence_Check(given.ptr()) || PyUnicode_Check(given.ptr()))
      throw py::value_error(expected + "None, a sequence of numbers or a tensor, got " + Py_TYPE(given.ptr())->tp_name);
    const auto all = py::reinterpret_steal<py::object>(PySequence_Fast(given.ptr(), ""));
    if (!all) throw py::error_already_set();
    const Py_ssize_t size = PySequence_Fast_GET_SIZE(all.ptr());
    if (size != count) throw py::value_error(expected + of_each + std::to_string(size));
    for (Py_ssize_t i = 0; i < size; i++) {
      PyObject* entry = PySequence_Fast_GET_ITEM(all.ptr(), i);
      const double x = PyFloat_AsDouble(entry);
      if (x == -1 && PyErr_Occurred()) {
        PyErr_Clear();
        throw py::value_error(where + ": lr_multipliers[" + std::to_string(i) + "] expected a number, got " +
                              std::string(py::repr(entry)));
      }
      numbers_.push_back(x);
    }
  }
  for (size_t i = 0; i < numbers_.size(); i++)
    if (!(numbers_[i] >= 0) || std::isinf(numbers_[i]))
      throw py::value_error(where + ": lr_multipliers[" + std::to_string(i) +
                            "] expected a finite number of at least 0, got " +
                            std::string(py::str(py::float_(numbers_[i]))));
}

Multiplier LrMultipliers::at(int64_t i, int device) const {
  if (!on_device_) return {numbers_[first_ + i], nullptr};
  if (device != device_)
    throw py::value_error(where_ + ": lr_multipliers lie on cuda:" + std::to_string(device_) + " but params[" +
                          std::to_string(first_ + i) + "] does not; expected them there, or on the CPU");
  return {1, on_device_ + first_ + i};
}

LrMultipliers LrMultipliers::only(int64_t i) const {
  LrMultipliers one = *this;
  one.first_ += i;
  return one;
}

py::object LrMultipliers::value(int64_t i) const {
  if (!on_device_) return py::float_(numbers_[first_ + i]);
  return tensor_[py::int_(first_ + i)];
}

}  // namespace nk
