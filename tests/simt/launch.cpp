// launch.cpp - fibers, blocks, barriers, warp intrinsics.
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

#include <algorithm>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>

#include "state.h"

#if !defined(__x86_64__)
#error "the switch of fibers is written for x86-64"
#endif

extern "C" __attribute__((visibility("hidden"))) char __ehdr_start;  // this library, from the linker

// Saves what a call must preserve on this stack, goes on with the other one.
extern "C" void simt_switch(void** from, void* to);
asm(R"(
.text
.globl simt_switch
.hidden simt_switch
.type simt_switch, @function
simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simt_switch, .-simt_switch
)");

namespace simt {

State state;

namespace {

constexpr size_t kStack = 64 << 10, kGuard = 4096;
constexpr int kMasksAtOnce = 4;

struct Fiber {
  void* stack_pointer = nullptr;
  char* stack = nullptr;
  uint3 index{};
  unsigned thread = 0, votes = 0;
  bool is_done = false;
  const char* waits_in = "";
  Site site{"", 0};
};

// The lanes of a warp that meet in one intrinsic. Two sets of slots: who is slow to read still finds the old ones.
struct Meeting {
  unsigned mask, arrived, unread;
  int set, waiting_count;
  const char* name;
  Site site;
  Fiber* waiting[32];
  alignas(16) unsigned char slots[2][32 * 16];
};
struct Warp {
  int count;
  Meeting meetings[kMasksAtOnce];
};

Fiber launcher, *running = &launcher;
std::vector<Fiber> fibers;
std::vector<Fiber*> ready, at_barrier;
Warp warps[kMaxThreads / 32];
unsigned threads = 0, alive = 0;
int vote_counts[3];  // of this vote, of the last, whose readers may be late, and of the next
size_t static_shared = 0;
Call call{};        // what the fibers run
std::string story;  // of what went wrong
uint64_t random_state = 1;

unsigned random_below(size_t n) {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return (unsigned)(((random_state >> 32) * n) >> 32);
}

void go_on_with(Fiber& to) {
  Fiber& from = *running;
  running = &to;
  threadIdx = to.index;
  state.thread = to.thread;
  state.in_kernel = &to != &launcher;
  simt_switch(&from.stack_pointer, to.stack_pointer);
}

Fiber* draw() {
  if (ready.empty()) return nullptr;
  if (state.seed) std::swap(ready[random_below(ready.size())], ready.back());
  Fiber* fiber = ready.back();
  ready.pop_back();
  return fiber;
}

[[noreturn]] void deadlock() {
  std::string text;
  unsigned done = 0, shown = 0;
  const Fiber* last = nullptr;
  for (unsigned i = 0; i < threads; i++) {
    const Fiber& f = fibers[i];
    done += f.is_done;
    if (f.is_done || (last && last->site.line == f.site.line && last->waits_in == f.waits_in) || shown == 6) continue;
    char line[512];
    snprintf(line, sizeof line, " thread %u waits in %s at %s:%d;", i, f.waits_in, f.site.file, f.site.line);
    text += line;
    shown++;
    last = &f;
  }
  fail("deadlock: no thread can run;%s %u of %u threads have returned", text.c_str(), done, threads);
}

void wait() {
  Fiber* next = draw();
  if (!next) deadlock();
  if (next != running) go_on_with(*next);
}

void release_barrier() {
  state.interval++;
  ready.insert(ready.end(), at_barrier.begin(), at_barrier.end());
  at_barrier.clear();
}

void fiber_main() {
  call.run(call.bound);
  running->is_done = true;
  alive--;
  if (!at_barrier.empty())
    fail("thread %u returned while %zu threads wait in __syncthreads at %s:%d", running->thread, at_barrier.size(),
         at_barrier[0]->site.file, at_barrier[0]->site.line);
  Fiber* next = draw();
  if (!next && alive) deadlock();
  go_on_with(next ? *next : launcher);
  __builtin_trap();
}

void prepare(Fiber& f) {
  f.is_done = false;
  f.votes = 0;
  f.waits_in = "";
  f.site = {"", 0};
  // Spread over the cache's sets; below the top: six registers, the address to return to, and a slot for alignment.
  void** top = reinterpret_cast<void**>(f.stack + kStack - (f.thread * 448 & 4095));
  memset(top - 8, 0, 64);
  top[-2] = reinterpret_cast<void*>(&fiber_main);
  f.stack_pointer = top - 8;
}

char* map(size_t size) {
  void* p = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) throw std::bad_alloc();
  return static_cast<char*>(p);
}

void prepare_once() {
  if (state.shared) return;
  state.stacks_size = kMaxThreads * (kStack + kGuard);
  state.stacks = map(state.stacks_size);
  state.shared = map(kSharedRoom);
  fibers.resize(kMaxThreads);
  for (unsigned i = 0; i < kMaxThreads; i++) {
    char* base = state.stacks + i * (kStack + kGuard);
    mprotect(base, kGuard, PROT_NONE);
    fibers[i].stack = base + kGuard;
    fibers[i].thread = i;
  }
}

// Fresh shared memory holds NaN and -1.
void poison(void* p, size_t size) { memset(p, 0xff, size); }

void run_block(unsigned block) {
  state.block = block;
  state.block_start = ++state.interval;
  blockIdx = {block % gridDim.x, block / gridDim.x % gridDim.y, block / gridDim.x / gridDim.y};
  alive = threads;
  ready.clear();
  at_barrier.clear();
  std::fill(vote_counts, vote_counts + 3, 0);
  for (const SharedArray* array : state.arrays) poison(state.shared + array->offset, array->size);
  poison(state.dynamic.data(), state.dynamic.size());
  for (unsigned i = threads; i-- > 0;) {
    fibers[i].index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
    prepare(fibers[i]);
    ready.push_back(&fibers[i]);
  }
  for (Warp& warp : warps) {
    warp.count = 0;
    for (Meeting& m : warp.meetings) m.arrived = m.unread = m.set = m.waiting_count = 0;
  }
  go_on_with(*draw());
}

}  // namespace

void fail(const char* format, ...) {
  char text[2048], where[256] = "";
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  if (running != &launcher)
    snprintf(where, sizeof where, " [block (%u, %u, %u), thread (%u, %u, %u), seed %llu]", blockIdx.x, blockIdx.y,
             blockIdx.z, threadIdx.x, threadIdx.y, threadIdx.z, (unsigned long long)state.seed);
  story = std::string("simt: ") + text + where;
  if (running == &launcher) throw std::runtime_error(story);
  go_on_with(launcher);
  __builtin_trap();
}

unsigned lane() { return running->thread & 31; }

void* dynamic_shared() {
  if (state.dynamic.empty()) fail("the kernel wants dynamic shared memory, but the launch gave none");
  return state.dynamic.data();
}

void* SharedArray::memory() {
  if (!offset) {  // exactly the alignment that the type promises: a float4 read of an array of float must be caught
    offset = ((state.shared_used + 31) & ~size_t(15)) + (align < 16 ? align : 0);
    if (offset + size + 32 > kSharedRoom) fail("the emulator has no room for more shared arrays");
    state.shared_used = offset + size;
    state.arrays.push_back(this);
    poison(state.shared + offset, size);
  }
  if (launch != state.launch) {
    launch = state.launch;
    static_shared += size;
    if (static_shared > kStaticShared)
      fail("the kernel has %zu bytes of static shared memory, of %zu", static_shared, kStaticShared);
  }
  return state.shared + offset;
}

void barrier(Site site) {
  running->waits_in = "__syncthreads";
  running->site = site;
  if (alive != threads) fail("__syncthreads at %s:%d after %u threads returned", site.file, site.line, threads - alive);
  if (!at_barrier.empty()) {
    const Fiber& other = *at_barrier[0];
    if (other.site.line != site.line || strcmp(other.site.file, site.file))
      fail("divergent __syncthreads: this thread at %s:%d, thread %u at %s:%d", site.file, site.line, other.thread,
           other.site.file, other.site.line);
  }
  at_barrier.push_back(running);
  if (at_barrier.size() == alive) release_barrier();
  wait();
}

int barrier_vote(bool yes, Vote vote, Site site) {
  const unsigned k = running->votes++;
  vote_counts[k % 3] += yes;
  vote_counts[(k + 1) % 3] = 0;
  barrier(site);
  const int count = vote_counts[k % 3];
  return vote == Vote::any ? count > 0 : vote == Vote::all ? count == (int)threads : count;
}

namespace {

Meeting& meeting_of(Warp& warp, unsigned mask) {
  for (int i = 0; i < warp.count; i++)
    if (warp.meetings[i].mask == mask) return warp.meetings[i];
  Meeting* free = nullptr;
  for (int i = 0; i < warp.count && !free; i++)
    if (!warp.meetings[i].arrived && !warp.meetings[i].unread) free = &warp.meetings[i];
  if (!free) {
    if (warp.count == kMasksAtOnce) fail("a warp uses more than %d masks at once", kMasksAtOnce);
    free = &warp.meetings[warp.count++];
  }
  free->mask = mask;
  return *free;
}

}  // namespace

const unsigned char* exchange(unsigned mask, const void* value, size_t size, const char* name, Site site) {
  Fiber& self = *running;
  self.waits_in = name;
  self.site = site;
  const unsigned w = self.thread / 32, lane = self.thread % 32, in_warp = std::min(32u, threads - w * 32);
  const unsigned exist = in_warp == 32 ? ~0u : (1u << in_warp) - 1;
  if (!(mask >> lane & 1))
    fail("%s:%d: %s: the calling lane %u is not in mask %08x", site.file, site.line, name, lane, mask);
  if (mask & ~exist)
    fail("%s:%d: %s: mask %08x names lanes that do not exist in a block of %u threads", site.file, site.line, name,
         mask, threads);
  Meeting& m = meeting_of(warps[w], mask);
  if (!m.arrived) {
    m.name = name;
    m.site = site;
  } else if (m.site.line != site.line || strcmp(m.name, name)) {
    fail("a divergent warp: lane %u in %s at %s:%d, others in %s at %s:%d", lane, name, site.file, site.line, m.name,
         m.site.file, m.site.line);
  }
  unsigned char* slots = m.slots[m.set];
  memcpy(slots + 16 * lane, value, size);
  m.arrived |= 1u << lane;
  if (m.arrived != mask) {
    m.waiting[m.waiting_count++] = &self;
    wait();
    m.unread--;
    return slots;
  }
  m.set ^= 1;
  m.arrived = 0;
  if (!strcmp(name, "__syncwarp")) state.warp_epoch[w]++;  // shuffles order no memory
  m.unread += m.waiting_count;
  ready.insert(ready.end(), m.waiting, m.waiting + m.waiting_count);
  m.waiting_count = 0;
  return slots;
}

namespace {

void elsewhere(dim3 grid, dim3 block, const Call& kernel) {
  std::string packed;  // as a device gets them: one after another, each where its type may lie
  for (int i = 0; i < kernel.count; i++) {
    const Parameter& p = kernel.parameters[i];
    packed.resize((packed.size() + p.align - 1) / p.align * p.align);
    packed.append(static_cast<const char*>(p.value), p.size);
  }
  const uint64_t at = static_cast<const char*>(kernel.kernel) - &__ehdr_start;
  if (grid.y * grid.z * block.y * block.z != 1) fail("only grids in x alone run elsewhere");
  if (state.run_elsewhere(at, grid.x, block.x, packed.data(), packed.size())) fail("the launch failed elsewhere");
}

}  // namespace

void launch_call(dim3 grid, dim3 block, size_t dynamic, const Call& kernel) {
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  const uint64_t blocks = (uint64_t)grid.x * grid.y * grid.z, in_block = (uint64_t)block.x * block.y * block.z;
  if (!blocks || !in_block || in_block > kMaxThreads || block.z > 64 || grid.x > 0x7fffffffu || grid.y > 65535 ||
      grid.z > 65535 || dynamic > kDynamicShared)
    state.refuse_with = cudaErrorInvalidConfiguration, state.refuse_after = 0;
  if (state.refuse_with && state.refuse_after-- == 0) {
    state.error = std::exchange(state.refuse_with, cudaSuccess);
    return;
  }
  prepare_once();
  state.dynamic.assign(dynamic, 0);
  state.launch++;
  if (state.run_elsewhere) return elsewhere(grid, block, kernel);
  state.arguments = static_cast<const char*>(kernel.bound);
  state.arguments_size = kernel.size;
  gridDim = grid;
  blockDim = block;
  threads = (unsigned)in_block;
  call = kernel;
  static_shared = 0;
  random_state = (state.seed * 0x9E3779B97F4A7C15ull + state.launch * 0xD1B54A32D192ED03ull) | 1;

  std::vector<uint32_t> order(blocks);
  for (uint32_t i = 0; i < blocks; i++) {
    order[i] = i;
    if (state.seed) std::swap(order[i], order[random_below(i + 1)]);
  }
  story.clear();
  for (const uint32_t b : order) {
    run_block(b);
    if (!story.empty()) throw std::runtime_error(std::exchange(story, {}));
  }
}

}  // namespace simt
