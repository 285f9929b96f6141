// cpu.cpp - chooses the ISA table once, and spreads work over torch's thread pool.
#include <atomic>
#include <cstring>
#include <memory>

#include "isa.h"
#include "parallel.h"

#ifdef NORMKERN_TSAN
extern "C" void __tsan_acquire(void*);
extern "C" void __tsan_release(void*);
#endif

namespace nk::cpu {
namespace {

// The thread sanitizer cannot see how torch's pool begins and ends its work: libgomp is not built for it. These
// two calls state all that the pool promises. Tasks have no order among themselves, so their races are found.
void tsan_release([[maybe_unused]] void* to) {
#ifdef NORMKERN_TSAN
  __tsan_release(to);
#endif
}
void tsan_acquire([[maybe_unused]] void* from) {
#ifdef NORMKERN_TSAN
  __tsan_acquire(from);
#endif
}

struct Level {
  const char* name;
  const Isa* table;
  bool runs_here;
};

#if defined(__x86_64__)
bool has_v3() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
         __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
}
[[maybe_unused]] bool has_v4() {
  return has_v3() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
const Level levels[] = {
#ifndef NORMKERN_SANITIZED
    {"v4", &v4::table, has_v4()},
#endif
    {"v3", &v3::table, has_v3()},
    {"v2", &v2::table, true}};
#elif defined(__aarch64__)
const Level levels[] = {{"neon", &neon::table, true}};
#else
const Level levels[] = {{"portable", &portable::table, true}};
#endif

const Level* best() {
  for (const Level& level : levels)
    if (level.runs_here) return &level;
  return nullptr;
}

const Level* chosen = best();
ParallelFor parallel_for = nullptr;

}  // namespace

void set_parallel_for(ParallelFor f) { parallel_for = f; }

const char* isa() { return chosen->name; }

int supported(const char** names, int room) {
  int n = 0;
  for (const Level& level : levels)
    if (level.runs_here && n < room) names[n++] = level.name;
  return n;
}

bool select_isa(const char* name) {
  for (const Level& level : levels)
    if (level.runs_here && !std::strcmp(level.name, name)) {
      chosen = &level;
      return true;
    }
  return false;
}

const Isa& table() { return *chosen->table; }

void parallel_for_each(int64_t count, bool on_pool, void (*task)(int64_t, const void*), const void* self) {
  struct Work {
    int64_t count;
    void (*task)(int64_t, const void*);
    const void* self;
    std::unique_ptr<std::atomic<bool>[]> taken;
    char begun = 0, ended = 0;  // addresses, for tsan_acquire and tsan_release

    // Every thread begins with the range that the pool gives it, the same at every step, so that what fits into its
    // cache is found there again; then it helps the others, for pieces differ in length (ranges alone lose up to a
    // third on lists like ResNet-50's).
    static void range(int64_t begin, int64_t, void* context) {
      Work& work = *static_cast<Work*>(context);
      tsan_acquire(&work.begun);
      for (int64_t k = 0, i = begin; k < work.count; k++, i = i + 1 == work.count ? 0 : i + 1)
        if (!work.taken[i].load(std::memory_order_relaxed) && !work.taken[i].exchange(true, std::memory_order_relaxed))
          work.task(i, work.self);
      tsan_release(&work.ended);
    }
  } work{count, task, self, nullptr};

  if (on_pool && count > 1 && parallel_for) {
    work.taken = std::make_unique<std::atomic<bool>[]>(count);
    tsan_release(&work.begun);
    if (parallel_for(0, count, 1, Work::range, &work) != 0) Work::range(0, count, &work);  // what the pool did not take
    tsan_acquire(&work.ended);
  } else {
    for (int64_t i = 0; i < count; i++) task(i, self);
  }
}

void run(const Chunk* chunks, int64_t count, int64_t coordinates) {
  const Isa& isa = table();
  parallel_for_each(count, coordinates > kSerialCoordinates, [&](int64_t i) {
    const Chunk& c = chunks[i];
    if (is_mixed(c)) return isa.run_mixed[(int)c.rule](c);
    if (const auto loop = isa.run[(int)measure_of(c)][(int)c.rule][(int)c.dtype]) loop(c);
  });
}

void sq_norms(const Chunk* chunks, int64_t count, int64_t coordinates) {
  const Isa& isa = table();
  parallel_for_each(count, coordinates > kSerialCoordinates, [&](int64_t i) {
    const Chunk& c = chunks[i];
    isa.sq_norm[(int)c.dtype](c, traits_of(c.rule).is_gauged);
  });
}

}  // namespace nk::cpu
