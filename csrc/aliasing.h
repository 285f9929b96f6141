// aliasing.h - which of a step's tensors share memory, and what that asks of the order in which they run.
//
// torch steps one parameter after another, so tensors that share memory have a defined result there. Ours run at the
// same time: those that share memory are put into successive rounds, in list order; what has no sensible order is an
// error.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "tensors.h"

namespace nk {

// One parameter of a step and what it runs with.
struct Operands {
  View w, g, v, h;
  bool has_v, has_h;
  int index;          // position in its lists
  int group;          // of the optimizer; negative: a bare call of an op
  bool copies_first;  // set by `rounds`: the gradient lies in the very memory that is written
  std::optional<View> master;
};

// What the caller calls the op and its lists, for error sentences.
struct Names {
  const char *op, *w, *g, *v, *h, *master;
};
const Names& names(int group);
std::string where(int group);                   // how an error sentence begins
std::string shared_pair(int group, int index);  // the sentence for a pair whose second gradient lies on the first

// Throws py::value_error if some of a tensor's own coordinates share memory.
void check_no_self_overlap(const View&, const char* list, int index, int group);

// The round of each parameter; empty: all in one. Throws py::value_error for what has no sensible order.
std::vector<int> rounds(std::vector<Operands>&);

}  // namespace nk
