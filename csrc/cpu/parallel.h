// parallel.h - the table in use, and the work that is spread over torch's thread pool.
#pragma once
#include "isa.h"

namespace nk::cpu {

const Isa& table();

// Below this many coordinates one thread is faster: waking the pool costs 1 to 5 us (measured, hot caches, 2 threads:
// ties at 25k to 40k coordinates, in 8 tensors or in 160).
constexpr int64_t kSerialCoordinates = 32768;

// Calls task(i, self) once for every i in [0, count), in any order, on any thread of the pool, or on this one.
void parallel_for_each(int64_t count, bool on_pool, void (*task)(int64_t, const void*), const void* self);

template <class Task> void parallel_for_each(int64_t count, bool on_pool, const Task& task) {
  parallel_for_each(count, on_pool, [](int64_t i, const void* self) { (*static_cast<const Task*>(self))(i); }, &task);
}

}  // namespace nk::cpu
