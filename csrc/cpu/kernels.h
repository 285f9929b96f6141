// kernels.h - the loops that have a file of their own, for the table in loops.cpp.
#pragma once
#include "isa.h"

namespace nk::cpu::NK_ISA {

extern const SumLoops sum_loops;
extern const MomentLoops moment_loops;
extern const NormLoops norm_loops;
extern const EmbeddingLoops embedding_loops;
void outer(const Outer&, const Block&);
void conv(const Conv&, const ConvBlock&);

}  // namespace nk::cpu::NK_ISA
