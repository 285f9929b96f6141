// given_hyper.h - the numbers of a param group as Python gives them: by keyword, once, for any number of steps.
#pragma once
#include <optional>
#include <string>

#include "tensors.h"

namespace nk {

class GivenHyper {
 public:
  // Keywords: the names of kHyperNumbers and
  //   gauge: GaugeStep or None
  //   on_device: None, or lr, weight_decay, grad_scale, found_inf and, of Adam, beta1 and beta2 where they lie on a
  //     device, each else None
  //   rounding: None, or (seed, steps so far) of rounding at random
  //   state_dtype: None, or the dtype that state buffers are to have, a position in StorageTypes
  // Throws py::type_error for other names, and for values of other types.
  explicit GivenHyper(const py::kwargs&);
  // The same without a dict: the call of the Python class, `kwargs` the values and `names` their tuple or null.
  static PyObject* call(PyObject* type, PyObject* const* kwargs, size_t positional, PyObject* names);
  // The signature of the constructor, for the docstring.
  static std::string signature();

  // With the numbers on a device in their place; `device` becomes theirs. Throws py::value_error, in a sentence that
  // begins with `where`, for tensors that no kernel reads.
  Hyper numbers(std::optional<int>& device, const std::string& where) const;
  bool has_numbers_on_device() const { return !on_device_.is_none(); }

  const Hyper& plain() const { return hyper_; }
  const py::object& on_device() const { return on_device_; }
  std::optional<DType> state_dtype() const { return state_dtype_; }

 private:
  GivenHyper() = default;
  void set(PyObject* keyword, PyObject* value);

  Hyper hyper_;
  py::object on_device_ = py::none();
  std::optional<DType> state_dtype_;
};

}  // namespace nk
