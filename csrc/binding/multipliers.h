// multipliers.h - what multiplies the learning rate of each parameter of a group.
#pragma once
#include <vector>

#include "../core/hyper.h"
#include "tensors.h"

namespace nk {

// A sequence of numbers or a tensor, read once; one of float64 in a CUDA device's memory is left to the kernels, and
// its numbers are not looked at.
class LrMultipliers {
 public:
  // Throws py::value_error, in a sentence that begins with `where`, for what is not `count` numbers of at least 0.
  LrMultipliers(const py::object& given, int64_t count, const std::string& where);

  // That of parameter i, which lies on `device`; throws py::value_error if the kernels there cannot read it.
  Multiplier at(int64_t i, int device) const;
  // That of parameter i alone, as that of a list's only one.
  LrMultipliers only(int64_t i) const;
  // The number of parameter i, or the tensor that holds it.
  py::object value(int64_t i) const;

 private:
  LrMultipliers() = default;

  std::string where_;
  std::vector<double> numbers_;  // none where they lie on a device
  py::object tensor_;            // that holds them there
  const double* on_device_ = nullptr;
  int device_ = kCpu;
  int64_t first_ = 0;
};

}  // namespace nk
