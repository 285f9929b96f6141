// edges.cpp - which edges of the binding were taken, in the counters that libFuzzer reads.
//
// GCC calls a function at every edge (-fsanitize-coverage=trace-pc); libFuzzer wants 8-bit counters, which only Clang
// makes. Two edges may share a counter: among 65,536 that is rare, and costs the fuzzer a little attention.
#include <stdint.h>

namespace {
constexpr int kEdges = 1 << 16;
uint8_t counters[kEdges];
uintptr_t places[kEdges][2];  // libFuzzer asks for a place in the program per counter; all flags 0
}  // namespace

extern "C" {

void __sanitizer_cov_trace_pc() {
  // Relative to this function, so that an edge has one counter in every run.
  const auto at =
      reinterpret_cast<uintptr_t>(__builtin_return_address(0)) - reinterpret_cast<uintptr_t>(&__sanitizer_cov_trace_pc);
  uint8_t& counter = counters[(uint64_t(at) * 0x9E3779B97F4A7C15u) >> 48];
  if (counter != 255) counter++;
}

__attribute__((visibility("default"))) void normkern_edges(void (*take_counters)(uint8_t*, uint8_t*),
                                                           void (*take_places)(const uintptr_t*, const uintptr_t*)) {
  for (int i = 0; i < kEdges; i++) places[i][0] = i + 1;
  take_counters(counters, counters + kEdges);
  take_places(places[0], places[0] + 2 * kEdges);
}
}
