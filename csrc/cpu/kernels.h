// kernels.h - the loops that have a file of their own, for the table in loops.cpp.
#pragma once
#include "isa.h"

namespace nk::cpu::NK_ISA {

template <class T> void moments(const SampleTile&);

}  // namespace nk::cpu::NK_ISA
