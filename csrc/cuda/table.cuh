// table.cuh - many tensors in a launch: the table of them is the launch's parameter.
#pragma once
#include "device.h"

namespace nk::cuda {

constexpr int kTensors = 256;                 // in a table
constexpr uint32_t kMostBlocks = 0x7fffffff;  // in a grid
constexpr const char* kTooLarge = "a tensor has more coordinates than a grid of blocks can take";

// Which entry of a table a block belongs to.
template <class Entries> __device__ __forceinline__ int entry_of(const Entries& table, uint32_t block) {
  int low = 0, high = table.count;  // first_block[low] <= block < first_block[high]
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (table.first_block[middle] <= block)
      low = middle;
    else
      high = middle;
  }
  return low;
}

}  // namespace nk::cuda
