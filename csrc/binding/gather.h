// gather.h - gradients and state entries, straight from the objects that own them.
#pragma once
#include "tensors.h"

namespace nk {

// Entries of a parameter's state that a step reads: its buffers, the count of its steps, the norms that it keeps.
constexpr int kMostKeys = kMostBuffers + 2;

// One param group, read in order: p.grad and state.get(p, {}).get(key) of every key, at the speed of C. A state whose
// entries come in the order of the parameters, as after the first step, is read without hashing a tensor.
class Gather {
 public:
  // `state`: the optimizer's, or None: no entries are wanted. `keys`: strings, the names of the entries.
  Gather(const py::list& params, const py::object& state, const py::tuple& keys);

  struct Entry {
    py::object grad;              // None: none
    PyObject* values[kMostKeys];  // borrowed; None: none
    bool missing;                 // there is a gradient, state is wanted, and some of it is not there
  };
  Entry next();  // to be called once for each parameter

  // All of it: ([grad], ([value] of each key), [positions that miss some]).
  static py::tuple lists(const py::list& params, const py::object& state, const py::tuple& keys);

 private:
  PyObject* entry_of(PyObject* param);
  bool walk() { return is_dict_ && PyDict_Next(state_, &at_, &walk_key_, &walk_value_); }

  const py::list& params_;
  PyObject *state_, *keys_;
  int key_count_;
  bool is_dict_, walking_;
  Py_ssize_t i_ = 0, at_ = 0;
  PyObject *walk_key_ = nullptr, *walk_value_ = nullptr;
};

}  // namespace nk
