// gather.cpp - see gather.h.
#include "gather.h"

namespace nk {
namespace {

constexpr Py_ssize_t kWorthWalking = 8;

}  // namespace

Gather::Gather(const py::list& params, const py::object& state, const py::str& key)
    : params_(params), state_(state.ptr()), key_(key.ptr()), is_dict_(PyDict_Check(state.ptr())) {
  walking_ = walk();
  if ((Py_ssize_t)params.size() >= kWorthWalking)  // another group's parameters come first
    while (walking_ && walk_key_ != PyList_GET_ITEM(params.ptr(), 0)) walking_ = walk();
}

PyObject* Gather::value_of(PyObject* param) {
  PyObject *entry = nullptr, *value = nullptr;
  if (walking_ && walk_key_ == param) {
    entry = walk_value_;
    walking_ = walk();
  } else if (is_dict_) {
    entry = PyDict_GetItemWithError(state_, param);
  }
  if (entry && PyDict_Check(entry)) value = PyDict_GetItemWithError(entry, key_);
  if (!value && PyErr_Occurred()) throw py::error_already_set();
  return value ? value : Py_None;
}

Gather::Entry Gather::next() {
  static PyObject* const grad_name = PyUnicode_InternFromString("grad");
  PyObject* p = PyList_GET_ITEM(params_.ptr(), i_++);
  const bool plain = Py_TYPE(p) == torch.tensor || Py_TYPE(p) == torch.parameter;
  PyObject* grad = plain ? Py_TYPE(torch.grad)->tp_descr_get(torch.grad, p, nullptr) : PyObject_GetAttr(p, grad_name);
  if (!grad) throw py::error_already_set();
  Entry entry{py::reinterpret_steal<py::object>(grad), Py_None, false};
  if (state_ != Py_None) {
    entry.value = value_of(p);
    entry.missing = entry.value == Py_None && grad != Py_None;
  }
  return entry;
}

py::tuple Gather::lists(const py::list& params, const py::object& state, const py::str& key) {
  const Py_ssize_t n = (Py_ssize_t)params.size();
  Gather gather(params, state, key);
  py::list grads(n), values(n), missing;
  for (Py_ssize_t i = 0; i < n; i++) {
    Entry entry = gather.next();
    PyList_SET_ITEM(grads.ptr(), i, entry.grad.release().ptr());
    Py_INCREF(entry.value);
    PyList_SET_ITEM(values.ptr(), i, entry.value);
    if (entry.missing) missing.append(i);
  }
  return py::make_tuple(grads, values, missing);
}

}  // namespace nk
