// run.cu - the launches: tables of tensors, one after another, on the caller's stream. Includes no standard library.
#include "current.h"
#include "kernels.h"
#include "mixed.h"
#include "update.cuh"

namespace nk::cuda {
namespace {

// ---- Small kernels ----------------------------------------------------------------------------------------------

struct PartsTable {
  int count, columns;
  uint32_t first_block[kTensors + 1];
  SlotParts slots[kTensors];
};

constexpr int kMostSums = kSums<Measure::pair>;

// A block per slot: each thread takes every so many parts, in their order, then the block adds up.
__global__ void __launch_bounds__(kThreads)
    sum_parts(const PartsTable __grid_constant__ table, const float* found_inf) {
  NK_SHARED(double, shared, [kMostSums][kWarps]);
  if (skips(found_inf)) return;
  const int i = entry_of(table, blockIdx.x);
  const SlotParts& slots = table.slots[i];
  const int64_t slot = blockIdx.x - table.first_block[i];
  const double* from = slots.parts_of_first + slot * slots.parts * table.columns;
  double s[kMostSums] = {};
  for (int64_t part = threadIdx.x; part < slots.parts; part += kThreads)
#pragma unroll
    for (int j = 0; j < kMostSums; j++)
      if (j < slots.own) s[j] += from[part * table.columns + j];
  block_sum(s, shared);
  if (threadIdx.x == 0)
#pragma unroll
    for (int j = 0; j < kMostSums; j++)
      if (j < slots.own) slots.out[slot * table.columns + j] = s[j];
}

__global__ void __launch_bounds__(kThreads) write_nan(double* table, int64_t size, const float* found_inf) {
  if (skips(found_inf)) return;
  for (int64_t i = (int64_t)blockIdx.x * kThreads + threadIdx.x; i < size; i += (int64_t)gridDim.x * kThreads)
    table[i] = __builtin_nan("");
}

constexpr int kCounts = 1024;
struct CountTable {
  int count;
  Count counts[kCounts];
};

__global__ void __launch_bounds__(kThreads) add_step(const CountTable __grid_constant__ table, const float* found_inf) {
  if (skips(found_inf)) return;
  for (int i = threadIdx.x; i < table.count; i += kThreads) {
    const Count& c = table.counts[i];
    if (c.is_double)
      *static_cast<double*>(c.at) += 1;
    else
      *static_cast<float*>(c.at) += 1;
  }
}

// ---- Launches -------------------------------------------------------------------------------------------------------

bool same_kernel(const Chunk& a, const Chunk& b) {
  return a.hyper == b.hyper && a.rule == b.rule && a.dtype == b.dtype && measure_of(a) == measure_of(b) && !a.strided &&
         !b.strided && !is_mixed(a) && !is_mixed(b) && a.columns == b.columns;
}

// Those that are a launch each.
const char* run_alone(const Chunk& c, cudaStream_t stream) {
  MixedTensor t;
  t.all = strided_tensor_of(c);
  const int64_t blocks = nk::cuda::blocks(t.all.tensor);
  if (blocks > kMostBlocks) return kTooLarge;
  if (is_mixed(c)) {
    t.master_weights = c.master, t.dtype = c.dtype;
    for (int b = 0; b < kMostBuffers; b++) t.v_dtype[b] = c.v_dtype[b];
    t.rounds_at_random = c.rounds_at_random, t.parameter = c.parameter;
    launch_mixed(measure_of(c), (uint32_t)blocks, stream, t, *c.hyper);
  } else {
    dispatch(c.dtype, [&](auto type) {
      Updates<decltype(type)>::strided(measure_of(c), (uint32_t)blocks, stream, t.all, *c.hyper);
    });
  }
  return launched();
}

}  // namespace

const char* run(const Chunk* chunks, int64_t count, const Queue& queue) {
  const Current current(queue.device);
  if (current.error()) return current.error();
  const auto stream = static_cast<cudaStream_t>(queue.stream);
  Table table;
  for (int64_t i = 0; i < count;) {
    const Chunk& first = chunks[i];
    if (first.strided || is_mixed(first)) {
      if (const char* error = run_alone(first, stream)) return error;
      i++;
      continue;
    }
    table.count = 0, table.columns = first.columns, table.first_block[0] = 0;
    int64_t blocks = 0;
    for (; i < count && table.count < kTensors && (&chunks[i] == &first || same_kernel(first, chunks[i])); i++) {
      const Tensor t = tensor_of(chunks[i]);
      const int64_t more = nk::cuda::blocks(t);
      if (more > kMostBlocks) return kTooLarge;
      if (blocks + more > kMostBlocks) break;
      table.tensors[table.count++] = t;
      table.first_block[table.count] = (uint32_t)(blocks += more);
    }
    dispatch(first.dtype, [&](auto type) {
      Updates<decltype(type)>::dense(first.rule, measure_of(first), (uint32_t)blocks, stream, table, *first.hyper);
    });
    if (const char* error = launched()) return error;
  }
  return nullptr;
}

const char* count_steps(const Count* counts, int64_t count, const float* found_inf, const Queue& queue) {
  const Current current(queue.device);
  if (current.error()) return current.error();
  CountTable table;
  for (int64_t i = 0; i < count;) {
    for (table.count = 0; i < count && table.count < kCounts; i++) table.counts[table.count++] = counts[i];
    NK_LAUNCH(add_step, dim3(1), dim3(kThreads), 0, static_cast<cudaStream_t>(queue.stream), table, found_inf);
    if (const char* error = launched()) return error;
  }
  return nullptr;
}

const char* add_parts(const SlotParts* slots, int64_t count, int columns, const float* found_inf, const Queue& queue) {
  const Current current(queue.device);
  if (current.error()) return current.error();
  PartsTable table;
  for (int64_t i = 0; i < count;) {
    table.count = 0, table.columns = columns, table.first_block[0] = 0;
    int64_t blocks = 0;
    for (; i < count && table.count < kTensors && blocks + slots[i].slots <= kMostBlocks; i++) {
      table.slots[table.count++] = slots[i];
      table.first_block[table.count] = (uint32_t)(blocks += slots[i].slots);
    }
    if (table.count == 0) return kTooLarge;
    NK_LAUNCH(sum_parts, dim3((uint32_t)blocks), dim3(kThreads), 0, static_cast<cudaStream_t>(queue.stream), table,
              found_inf);
    if (const char* error = launched()) return error;
  }
  return nullptr;
}

const char* fill_nan(double* table, int64_t size, const float* found_inf, const Queue& queue) {
  const Current current(queue.device);
  if (current.error()) return current.error();
  if (size == 0) return nullptr;
  const int64_t blocks = (size + kThreads - 1) / kThreads, most = 1024;
  NK_LAUNCH(write_nan, dim3((uint32_t)(blocks < most ? blocks : most)), dim3(kThreads), 0,
            static_cast<cudaStream_t>(queue.stream), table, size, found_inf);
  return launched();
}

int architectures(int* capabilities, int room) {
  int n = 0;
  for (int architecture : kArchitectures)
    if (n < room) capabilities[n++] = architecture / 10;
  return n;
}

}  // namespace nk::cuda
