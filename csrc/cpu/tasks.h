// tasks.h - numbered tasks on torch's threads, and the loops of the ISA level in use.
#pragma once
#include "isa.h"

namespace nk::cpu {

const Isa& loops();

// Any order, any thread. `work`: of all tasks together, in coordinates; little of it stays on this thread.
void each(int64_t tasks, int64_t work, void (*one)(int64_t task, const void* self), const void* self);

template <class Task> void each(int64_t tasks, int64_t work, const Task& task) {
  each(tasks, work, [](int64_t i, const void* self) { (*static_cast<const Task*>(self))(i); }, &task);
}

}  // namespace nk::cpu
