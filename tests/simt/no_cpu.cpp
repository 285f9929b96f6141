// no_cpu.cpp - the emulated binary has no loops for the CPU: every tensor is in the memory of its device.
#include <stdexcept>

#include "core/backend.h"

namespace nk::cpu {
namespace {
[[noreturn]] void refuse() { throw std::logic_error("simt: a tensor of the CPU came through"); }
}  // namespace

void set_parallel_for(ParallelFor) {}
const char* isa() { return "simt"; }
int supported(const char** names, int room) {
  if (room > 0) names[0] = isa();
  return 1;
}
bool select_isa(const char* name) { return name[0] == 's'; }

void run(const Chunk*, int64_t count, int64_t) {
  if (count > 0) refuse();
}
void run_on_sphere(const KeptTensor*, int64_t count, int64_t) {
  if (count > 0) refuse();
}
void sq_norms(const Chunk*, int64_t count, int64_t) {
  if (count > 0) refuse();
}
void outer_moments(const Outer&) { refuse(); }
void conv_moments(const Conv&) { refuse(); }
void moments(const Moments&) { refuse(); }
void row_sums(const RowSums&) { refuse(); }
bool recentre(const SecondMoments&) { refuse(); }
void norm_sums(const NormBatch&) { refuse(); }
void embedding_moments(const EmbeddingBatch&) { refuse(); }

}  // namespace nk::cpu
