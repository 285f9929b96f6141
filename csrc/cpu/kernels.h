// kernels.h - the loops that have a file of their own, for the table in loops.cpp.
#pragma once
#include "isa.h"

namespace nk::cpu::NK_ISA {

void outer(const Outer&, const Block&);
void conv(const Conv&, const ConvBlock&);
template <class T> void moments(const SampleTile&);
template <class T> double sum(const void* x, int64_t size, bool squares);
template <class R> bool recentre(void* raw, const void* total, int64_t size, double share, double least);
template <class T> void norm_columns(const NormPart&);
template <class T> void norm_rows(const NormPart&);
template <class T> void embedding_row(const EmbeddingRow&);

}  // namespace nk::cpu::NK_ISA
