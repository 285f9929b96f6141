// outer.h - arguments of the kernels that own dW: checked, then handed over.
#pragma once
#include <vector>

#include "tensors.h"

namespace nk {

// (outputs, inputs) of a call, or an error sentence.
std::pair<int64_t, int64_t> outer_shape(const py::object& a, const py::object& g);

// centred: None, or like total.
void outer_moments(const py::object& a, const py::object& g, const py::object& total, const py::object& centred,
                   const py::object& sq_norms);

// A number for each space dimension.
struct ConvNumbers {
  py::object kernel_size, stride, padding, dilation;
  int64_t groups;
};
std::vector<int64_t> conv_shape(const py::object& x, const py::object& g, const ConvNumbers&);
void conv_moments(const py::object& x, const py::object& g, const ConvNumbers&, const py::object& total,
                  const py::object& centred, const py::object& sq_norms);

}  // namespace nk
