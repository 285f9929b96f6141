// state.h - where the emulated device is: written by launch.cpp, read by check.cpp and runtime.cpp.
#pragma once
#include <vector>

#include "simt.h"

namespace simt {

constexpr size_t kSharedRoom = 1 << 20;       // for all arrays of all kernels
constexpr size_t kStaticShared = 48 << 10;    // what one kernel may have
constexpr size_t kDynamicShared = 227 << 10;  // the most that any device gives
constexpr unsigned kMaxThreads = 1024;

// Runs a launch in place of the fibers. `kernel`: where its code is in this library. 0: it went well.
using Elsewhere = int (*)(uint64_t kernel, uint32_t grid, uint32_t block, const void* parameters, uint64_t size);

struct State {
  uint64_t seed = 1;                      // 0: blocks ascending, the thread that became ready last runs first
  cudaError_t error = cudaSuccess;        // what cudaGetLastError will say
  cudaError_t refuse_with = cudaSuccess;  // of the launch after `refuse_after` others
  int refuse_after = 0;
  int devices = 1, device = 0;
  Elsewhere run_elsewhere = nullptr;

  // In words of the memory model: threads of a block are ordered by barriers (`interval`), lanes of a warp by
  // __syncwarp (`warp_epoch`), blocks of a launch not at all, launches always.
  uint64_t launch = 0, interval = 0, block_start = 0;  // the interval in which the block began
  uint32_t block = 0, thread = 0, warp_epoch[32] = {};
  bool in_kernel = false;

  char *shared = nullptr, *stacks = nullptr;
  size_t stacks_size = 0, shared_used = 0;
  std::vector<char> dynamic;
  std::vector<const SharedArray*> arrays;
  const char* arguments = nullptr;
  size_t arguments_size = 0;
};
extern State state;

// Memory that kernels may touch. Stretches that overlap become one.
void allow(const void* p, size_t size, const char* name);
void blank(const void* p, size_t size);  // allowed memory that is not written yet
void forget_all();
int allowed(uint64_t (*stretches)[2], int room);  // address and size of each; returns how many there are

}  // namespace simt
