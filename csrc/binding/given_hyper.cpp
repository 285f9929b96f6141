// given_hyper.cpp - see given_hyper.h.
#include "given_hyper.h"

#include <utility>

#include <pybind11/stl.h>

namespace nk {
namespace {

constexpr int kNumbers = sizeof kHyperNumbers / sizeof *kHyperNumbers;

// The names as Python's own strings, so that most keywords are found by their address.
const HyperNumber* find(PyObject* keyword) {
  static PyObject* names[kNumbers] = {};
  for (int i = 0; i < kNumbers; i++) {
    if (!names[i]) names[i] = PyUnicode_InternFromString(kHyperNumbers[i].name);
    if (names[i] == keyword) return &kHyperNumbers[i];
  }
  for (int i = 0; i < kNumbers; i++)
    if (PyUnicode_Compare(names[i], keyword) == 0) return &kHyperNumbers[i];
  return nullptr;
}

[[noreturn]] void refuse(const std::string& name, const char* expected, py::handle value) {
  throw py::type_error("Hyper: " + name + " expected " + expected + ", got " + std::string(py::repr(value)));
}

void set(Hyper& hyper, const HyperNumber& to, PyObject* value) {
  if (!to.number) {
    const int is_true = PyObject_IsTrue(value);
    if (is_true < 0) throw py::error_already_set();
    hyper.*to.flag = is_true;
    return;
  }
  const double x = PyFloat_AsDouble(value);
  if (x == -1 && PyErr_Occurred()) {
    PyErr_Clear();
    refuse(to.name, "a number", value);
  }
  hyper.*to.number = x;
}

template <class T> T cast(const std::string& name, const char* expected, py::handle value) {
  try {
    return value.cast<T>();
  } catch (const py::cast_error&) {
    refuse(name, expected, value);
  }
}

}  // namespace

GivenHyper::GivenHyper(const py::kwargs& given) {
  for (const auto& [keyword, value] : given) {
    if (const HyperNumber* number = find(keyword.ptr())) {
      set(hyper_, *number, value.ptr());
      continue;
    }
    const std::string name = py::str(keyword);
    if (name == "gauge") {
      const auto* step = cast<const GaugeStep*>(name, "a GaugeStep or None", value);
      hyper_.is_gauged = step != nullptr;
      if (step) hyper_.gauge = *step;
    } else if (name == "on_device") {
      on_device_ = py::reinterpret_borrow<py::object>(value);
    } else if (name == "rounding") {
      using Seeded = std::optional<std::pair<uint64_t, uint32_t>>;
      const auto rounding = cast<Seeded>(name, "(seed, step) or None", value);
      if (rounding) hyper_.rounding = {true, rounding->first, rounding->second};
    } else if (name == "state_dtype") {
      const auto position = cast<std::optional<int>>(name, "a position in the list of dtypes or None", value);
      if (position && (*position < 0 || *position >= StorageTypes::size))
        refuse(name, "a position in the list of dtypes or None", value);
      if (position) state_dtype_ = DType(*position);
    } else {
      std::string names;
      for (const HyperNumber& number : kHyperNumbers) names += std::string(number.name) + ", ";
      throw py::type_error("Hyper: expected " + names + "gauge, on_device, rounding or state_dtype, got " + name);
    }
  }
}

std::string GivenHyper::signature() {
  std::string text = "__init__(self: normkern._C.Hyper, *";
  for (const HyperNumber& number : kHyperNumbers) {
    const Hyper defaults;
    text += std::string(", ") + number.name;
    text += number.number ? ": float = " + std::string(py::repr(py::float_(defaults.*number.number)))
                          : std::string(": bool = ") + (defaults.*number.flag ? "True" : "False");
  }
  return text +
         ", gauge: normkern._C.GaugeStep | None = None, on_device: object = None, "
         "rounding: tuple[int, int] | None = None, state_dtype: int | None = None) -> None";
}

Hyper GivenHyper::numbers(std::optional<int>& device, const std::string& where) const {
  Hyper hyper = hyper_;
  const auto tensors = on_device_.cast<py::tuple>();
  const auto take = [&](size_t i, const char* name, bool may_be_double) -> std::optional<View> {
    const py::object entry = tensors[i];
    if (entry.is_none()) return {};
    const auto v = view(entry.ptr());
    const bool fits = v && v->numel == 1 && (v->dtype == DType::f32 || (may_be_double && v->dtype == DType::f64));
    if (!fits || v->device == kCpu || (device && *device != v->device))
      throw py::value_error(where + ": " + name + " on a device expected one float32" +
                            (may_be_double ? " or float64" : "") + " number beside the others, got " +
                            (v ? shape_text(*v) + " " : "") + describe(entry.ptr()));
    device = v->device;
    return v;
  };
  DeviceNumbers& n = hyper.on_device;
  if (const auto v = take(0, "lr", true)) n.lr = v->data, n.lr_is_double = v->dtype == DType::f64;
  if (const auto v = take(1, "weight_decay", true))
    n.weight_decay = v->data, n.weight_decay_is_double = v->dtype == DType::f64;
  if (const auto v = take(2, "grad_scale", false)) n.grad_scale = static_cast<const float*>(v->data);
  if (const auto v = take(3, "found_inf", false)) n.found_inf = static_cast<const float*>(v->data);
  return hyper;
}

}  // namespace nk
