// aliasing.h - which of a step's tensors share memory, and what that asks of the order in which they run.
//
// torch steps one parameter after another, so tensors that share memory have a defined result there. Here parameters
// run at the same time: those that share memory are put into successive rounds, in list order; memory that is shared in
// a way that no order explains is an error.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "tensors.h"

namespace nk {

// One parameter of a step and what it runs with.
struct Operands {
  const Op* op;
  int group;                 // of the optimizer; negative: a bare call of the op
  int index;                 // position in its lists
  int buffers;               // of state
  bool has_h, copies_first;  // copies_first: set by `rounds`: the gradient lies in the very memory that is written
  View w, g, v[kMostBuffers], h;
  std::optional<View> master;
  bool is_alike = false;      // all dense, with the same strides
  PyObject* param = nullptr;  // borrowed
  size_t first_read = 0;      // where `Pass` keeps its views, see there
};

constexpr int kNoGroup = -1;
std::string where(const Op&, int group);  // how an error sentence begins
// The sentence for a pair whose second gradient lies on the first.
std::string shared_pair(const Op&, int group, int index);

// Throws py::value_error if some of a tensor's own coordinates share memory.
void check_no_self_overlap(const View&, const Op&, const char* list, int index, int group);

// The round of each parameter; empty: all in one. Throws py::value_error if no order explains it.
std::vector<int> rounds(std::vector<Operands>&);

}  // namespace nk
