// share.h - the table in use, and torch's pool for whoever has pieces of work.
#pragma once
#include "isa.h"

namespace nk::cpu {

const Isa& table();

// Below this many coordinates one thread is faster: waking the pool costs 1 to 5 us (measured, hot caches, 2 threads:
// ties at 25k to 40k coordinates, in 8 tensors or in 160).
constexpr int64_t kSerialCoordinates = 32768;

// Calls one(i, self) once for every i in [0, count), in any order, on any thread of the pool, or here.
void share(int64_t count, bool on_pool, void (*one)(int64_t, const void*), const void* self);

template <class One> void share(int64_t count, bool on_pool, const One& one) {
  share(count, on_pool, [](int64_t i, const void* self) { (*static_cast<const One*>(self))(i); }, &one);
}

}  // namespace nk::cpu
