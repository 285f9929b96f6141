// cpu.cpp - who runs the loops: picks the ISA table once, spreads chunks over torch's thread pool.
#include <atomic>
#include <cstring>

#include "isa.h"

namespace nk::cpu {
namespace {

// Below this many coordinates waking the pool costs more than it brings. An estimate; not swept yet.
constexpr int64_t kSerial = 65536;

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
bool has_v4() {
  return has_v3() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
const Level levels[] = {{"v4", &v4::table, has_v4()}, {"v3", &v3::table, has_v3()}, {"v2", &v2::table, true}};
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

void sgd(const Chunk* chunks, int64_t count) {
  struct Work {
    const Chunk* chunks;
    int64_t count;
    const Isa* isa;
    std::atomic<int64_t> next{0};

    // The pool hands every thread a range; it only says "you are one of us". Chunks differ in length, so each thread
    // takes the next one from a shared counter (static ranges lose up to a third on lists like ResNet-50's).
    static void run(int64_t, int64_t, void* self) {
      Work& work = *static_cast<Work*>(self);
      for (int64_t i; (i = work.next.fetch_add(1, std::memory_order_relaxed)) < work.count;) {
        const Chunk& c = work.chunks[i];
        work.isa->sgd[(int)c.rule][(int)c.dtype](c);
      }
    }
  } work{chunks, count, chosen->table};

  int64_t coordinates = 0;
  for (int64_t i = 0; i < count; i++) coordinates += chunks[i].size;
  if (coordinates <= kSerial || count == 1 || !parallel_for)
    Work::run(0, count, &work);
  else if (parallel_for(0, count, 1, Work::run, &work) != 0)
    Work::run(0, count, &work);  // whatever the pool did not take
}

}  // namespace nk::cpu
