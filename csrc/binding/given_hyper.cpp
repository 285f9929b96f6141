// given_hyper.cpp - see given_hyper.h.
#include "given_hyper.h"

#include <utility>

#include <pybind11/stl.h>

namespace nk {
namespace {

constexpr int kNumbers = sizeof kHyperNumbers / sizeof *kHyperNumbers;
// The other keywords, counted on from the numbers.
enum Other : int { kGauge = kNumbers, kOnDevice, kRounding, kStateDtype, kKeywords };
constexpr const char* kOthers[] = {"gauge", "on_device", "rounding", "state_dtype"};

const char* keyword_name(int i) { return i < kNumbers ? kHyperNumbers[i].name : kOthers[i - kNumbers]; }

// The position of a keyword, kKeywords if there is none such. Names are kept as Python's own strings: what a caller
// writes in a call is found by its address.
int find(PyObject* keyword) {
  static PyObject* names[kKeywords] = {};
  for (int i = 0; i < kKeywords; i++) {
    if (!names[i]) names[i] = PyUnicode_InternFromString(keyword_name(i));
    if (names[i] == keyword) return i;
  }
  for (int i = 0; i < kKeywords; i++)
    if (PyUnicode_Compare(names[i], keyword) == 0) return i;
  return kKeywords;
}

[[noreturn]] void refuse(const std::string& name, const char* expected, py::handle value) {
  throw py::type_error("Hyper: " + name + " expected " + expected + ", got " + std::string(py::repr(value)));
}

void set_number(Hyper& hyper, const HyperNumber& to, PyObject* value) {
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
  for (const auto& [keyword, value] : given) set(keyword.ptr(), value.ptr());
}

PyObject* GivenHyper::call(PyObject*, PyObject* const* kwargs, size_t positional, PyObject* names) {
  try {
    if (PyVectorcall_NARGS(positional) > 0) throw py::type_error("Hyper: expected keywords alone, got positions");
    GivenHyper hyper;
    for (Py_ssize_t i = 0; names && i < PyTuple_GET_SIZE(names); i++) hyper.set(PyTuple_GET_ITEM(names, i), kwargs[i]);
    return py::cast(std::move(hyper)).release().ptr();
  } catch (const py::builtin_exception& error) {
    error.set_error();
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  }
  return nullptr;
}

void GivenHyper::set(PyObject* keyword, PyObject* value) {
  const int which = find(keyword);
  if (which < kNumbers) return set_number(hyper_, kHyperNumbers[which], value);
  if (which == kKeywords) {
    std::string names;
    for (const HyperNumber& number : kHyperNumbers) names += std::string(number.name) + ", ";
    throw py::type_error("Hyper: expected " + names + "gauge, on_device, rounding or state_dtype, got " +
                         std::string(py::str(py::handle(keyword))));
  }
  if (value == Py_None) return;
  const char* name = keyword_name(which);
  if (which == kGauge) {
    hyper_.gauge = *cast<const GaugeStep*>(name, "a GaugeStep or None", value);
    hyper_.is_gauged = true;
  } else if (which == kOnDevice) {
    on_device_ = py::reinterpret_borrow<py::object>(value);
  } else if (which == kRounding) {
    const auto [seed, step] = cast<std::pair<uint64_t, uint32_t>>(name, "(seed, step) or None", value);
    hyper_.rounding = {true, seed, step};
  } else {
    const int position = cast<int>(name, "a position in the list of dtypes or None", value);
    if (position < 0 || position >= StorageTypes::size) refuse(name, "a position in the list of dtypes or None", value);
    state_dtype_ = DType(position);
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
    if (i >= tensors.size()) return {};
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
  if (const auto v = take(4, "beta1", true)) n.beta1 = v->data, n.beta1_is_double = v->dtype == DType::f64;
  if (const auto v = take(5, "beta2", true)) n.beta2 = v->data, n.beta2_is_double = v->dtype == DType::f64;
  if (const auto v = take(2, "grad_scale", false)) n.grad_scale = static_cast<const float*>(v->data);
  if (const auto v = take(3, "found_inf", false)) n.found_inf = static_cast<const float*>(v->data);
  return hyper;
}

}  // namespace nk
