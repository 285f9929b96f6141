// gather.h - gradients and state entries, straight from the objects that own them.
#pragma once
#include "tensors.h"

namespace nk {

// One param group, read in order: p.grad and state.get(p, {}).get(key) at the speed of C. A state whose keys come in
// the order of the parameters, as it does after the first step, is read without hashing a tensor.
class Gather {
 public:
  // `state`: the optimizer's, or None if nothing is wanted of it.
  Gather(const py::list& params, const py::object& state, const py::str& key);

  struct Entry {
    py::object grad;  // None: none
    PyObject* value;  // borrowed; None: none
    bool missing;     // there is a gradient, state is wanted, and there is none
  };
  Entry next();  // as often as there are parameters

  // All of it: ([grad], [value], [positions that are missing]).
  static py::tuple lists(const py::list& params, const py::object& state, const py::str& key);

 private:
  PyObject* value_of(PyObject* param);
  bool walk() { return is_dict_ && PyDict_Next(state_, &at_, &walk_key_, &walk_value_); }

  const py::list& params_;
  PyObject *state_, *key_;
  bool is_dict_, walking_;
  Py_ssize_t i_ = 0, at_ = 0;
  PyObject *walk_key_ = nullptr, *walk_value_ = nullptr;
};

}  // namespace nk
