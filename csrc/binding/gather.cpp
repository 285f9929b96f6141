// gather.cpp - see gather.h.
#include "gather.h"

namespace nk {
namespace {

constexpr Py_ssize_t kWorthWalking = 8;

}  // namespace

Gather::Gather(const py::list& params, const py::object& state, const py::tuple& keys)
    : params_(params),
      state_(state.ptr()),
      keys_(keys.ptr()),
      key_count_((int)keys.size()),
      is_dict_(PyDict_Check(state.ptr())) {
  if (key_count_ > kMostKeys)
    throw py::value_error("gather: expected at most " + std::to_string(kMostKeys) + " keys, got " +
                          std::to_string(key_count_));
  walking_ = walk();
  if ((Py_ssize_t)params.size() >= kWorthWalking)  // another group's parameters come first
    while (walking_ && walk_key_ != PyList_GET_ITEM(params.ptr(), 0)) walking_ = walk();
}

PyObject* Gather::entry_of(PyObject* param) {
  PyObject* entry = nullptr;
  if (walking_ && walk_key_ == param) {
    entry = walk_value_;
    walking_ = walk();
  } else if (is_dict_) {
    entry = PyDict_GetItemWithError(state_, param);
  }
  if (!entry && PyErr_Occurred()) throw py::error_already_set();
  return entry && PyDict_Check(entry) ? entry : nullptr;
}

Gather::Entry Gather::next() {
  static PyObject* const grad_name = PyUnicode_InternFromString("grad");
  PyObject* p = PyList_GET_ITEM(params_.ptr(), i_++);
  const bool plain = Py_TYPE(p) == torch.tensor || Py_TYPE(p) == torch.parameter;
  PyObject* grad = plain ? Py_TYPE(torch.grad)->tp_descr_get(torch.grad, p, nullptr) : PyObject_GetAttr(p, grad_name);
  if (!grad) throw py::error_already_set();
  Entry entry{py::reinterpret_steal<py::object>(grad), {}, false};
  PyObject* const of_param = state_ != Py_None ? entry_of(p) : nullptr;
  for (int k = 0; k < key_count_; k++) {
    PyObject* value = of_param ? PyDict_GetItemWithError(of_param, PyTuple_GET_ITEM(keys_, k)) : nullptr;
    if (!value && PyErr_Occurred()) throw py::error_already_set();
    entry.values[k] = value ? value : Py_None;
    entry.missing = entry.missing || (state_ != Py_None && grad != Py_None && entry.values[k] == Py_None);
  }
  return entry;
}

py::tuple Gather::lists(const py::list& params, const py::object& state, const py::tuple& keys) {
  const Py_ssize_t n = (Py_ssize_t)params.size();
  Gather gather(params, state, keys);
  py::list grads(n), missing;
  py::tuple values(keys.size());
  for (size_t k = 0; k < keys.size(); k++) values[k] = py::list(n);
  for (Py_ssize_t i = 0; i < n; i++) {
    Entry entry = gather.next();
    PyList_SET_ITEM(grads.ptr(), i, entry.grad.release().ptr());
    for (size_t k = 0; k < keys.size(); k++) {
      Py_INCREF(entry.values[k]);
      PyList_SET_ITEM(PyTuple_GET_ITEM(values.ptr(), k), i, entry.values[k]);
    }
    if (entry.missing) missing.append(i);
  }
  return py::make_tuple(grads, values, missing);
}

}  // namespace nk
