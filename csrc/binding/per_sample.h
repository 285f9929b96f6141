// per_sample.h - arguments of the kernels that own dW: checked, then handed over.
#pragma once
#include <vector>

#include "tensors.h"

namespace nk {

// (outputs, inputs) of a call, or an error sentence.
std::pair<int64_t, int64_t> outer_shape(const py::object& a, const py::object& g);

// Where results go; centred: None, or like total. new_scratch: makes memory, see `Call::scratch`.
struct Results {
  py::object total, centred, sq_norms, new_scratch;
};
void outer_moments(const py::object& a, const py::object& g, const Results&);

// A number for each space dimension.
struct ConvNumbers {
  py::object kernel_size, stride, padding, dilation;
  int64_t groups;
};
std::vector<int64_t> conv_shape(const py::object& x, const py::object& g, const ConvNumbers&);
void conv_moments(const py::object& x, const py::object& g, const ConvNumbers&, const Results&);

}  // namespace nk
