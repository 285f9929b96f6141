// planted.cu - small kernels, each right or broken in one way, and what the check build must say of it.
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/device.h"

extern "C" {
void simt_allow(const void*, size_t, const char*);
void simt_blank(const void*, size_t);
void simt_forget_all();
void simt_seed(uint64_t);
}

namespace {

constexpr int kBlock = 64;

// ---- Barriers ------------------------------------------------------------------------------------------------------

template <bool kBarrier> __global__ void reversed(int* out) {
  NK_SHARED(int, s, [kBlock]);
  s[threadIdx.x] = threadIdx.x;
  if (kBarrier) __syncthreads();
  out[threadIdx.x] = s[kBlock - 1 - threadIdx.x];
}
template <bool kBarrier> __global__ void reused(int* out) {
  NK_SHARED(int, s, [kBlock]);
  for (int turn = 0; turn < 3; turn++) {
    s[threadIdx.x] = turn + threadIdx.x;
    __syncthreads();
    out[threadIdx.x] = s[kBlock - 1 - threadIdx.x];
    if (kBarrier) __syncthreads();
  }
}
__global__ void two_barriers() {
  if (threadIdx.x < 32)
    __syncthreads();
  else
    __syncthreads();
}
__global__ void returns_before_barrier() {
  if (threadIdx.x == 5) return;
  __syncthreads();
}
__global__ void returns_before_shuffle(int* out) {
  if (threadIdx.x % 32 >= 30) return;
  out[threadIdx.x] = __shfl_xor_sync(~0u, 1, 1);
}
template <bool kFence> __global__ void neighbours(int* out) {  // lanes of a warp need __syncwarp
  NK_SHARED(int, s, [32]);
  s[threadIdx.x] = 0;
  __syncwarp();
  s[threadIdx.x] = threadIdx.x;
  if (kFence)
    __syncwarp();
  else
    __shfl_xor_sync(~0u, 1, 1);
  out[threadIdx.x] = s[threadIdx.x ^ 1];
}

// ---- Shuffles ------------------------------------------------------------------------------------------------------

__global__ void shuffle_in_a_branch(int* out) {
  if (threadIdx.x < 8) out[threadIdx.x] = __shfl_xor_sync(~0u, 1, 1);
}
__global__ void lane_outside_its_mask() { __shfl_xor_sync(0xffffu, 1, 1); }
__global__ void reads_outside_the_mask() {
  if (threadIdx.x < 16) __shfl_xor_sync(0xffffu, 1, 16);
}
__global__ void warp_of_sixteen() { __shfl_xor_sync(~0u, 1, 1); }
__global__ void two_intrinsics() {
  if (threadIdx.x & 1)
    __shfl_xor_sync(~0u, 1, 1);
  else
    __shfl_down_sync(~0u, 1, 1);
}
__global__ void odd_width() { __shfl_xor_sync(~0u, 1, 1, 12); }
__global__ void intrinsics(int* out) {
  const int t = threadIdx.x, lane = t % 32;
  const auto put = [&](int k, int value) { out[k * kBlock + t] = value; };
  put(0, __shfl_xor_sync(~0u, lane, 5));
  put(1, __shfl_down_sync(~0u, lane, 3));
  put(2, __shfl_up_sync(~0u, lane, 3));
  put(3, __shfl_sync(~0u, lane, 9));
  put(4, __shfl_down_sync(~0u, lane, 3, 8));
  put(5, __shfl_up_sync(~0u, lane, 3, 8));
  put(6, __shfl_sync(~0u, lane, 9, 8));
  put(7, __shfl_xor_sync(~0u, lane, 9, 8));
  put(8, (int)__ballot_sync(~0u, lane % 3 == 0));
  put(9, __any_sync(~0u, lane == 31));
  put(10, __all_sync(~0u, lane < 31));
  put(11, __syncthreads_count(t % 2));
  put(12, __syncthreads_or(t == 63));
  put(13, __syncthreads_and(t != 63));
  put(14, __syncthreads_and(1));
  put(15, lane < 16 ? __shfl_xor_sync(0xffffu, lane, 1) : __shfl_xor_sync(0xffff0000u, lane, 2));
  put(16, (int)__shfl_sync(~0u, lane + 0.5, 7));
}
std::vector<int> of_intrinsics(int t) {  // by the programming guide
  const int lane = t % 32, in_eight = lane % 8, eight = lane - in_eight;
  unsigned thirds = 0;
  for (int i = 0; i < 32; i += 3) thirds |= 1u << i;
  return {lane ^ 5,
          lane + 3 < 32 ? lane + 3 : lane,
          lane >= 3 ? lane - 3 : lane,
          9,
          in_eight + 3 < 8 ? lane + 3 : lane,
          in_eight >= 3 ? lane - 3 : lane,
          eight + 1,
          (lane ^ 9) / 8 <= lane / 8 ? (lane ^ 9) : lane,
          (int)thirds,
          1,
          0,
          32,
          1,
          0,
          1,
          lane < 16 ? lane ^ 1 : lane ^ 2,
          7};
}

// ---- Memory --------------------------------------------------------------------------------------------------------

template <int kExtra> __global__ void reverses(const float* from, float* to, int n) {
  for (int i = threadIdx.x; i < n; i += kBlock) to[n - 1 - i] = from[i + kExtra];
}
__global__ void writes_before(int* out) { out[(int)threadIdx.x - 1] = 0; }
__global__ void far_away(int* out) { out[1 << 22] = 1; }
__global__ void past_shared(float* out) {
  NK_SHARED(float, s, [8]);
  if (threadIdx.x <= 8) s[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = s[0];
}
template <bool kWritten> __global__ void fresh_shared(float* out) {
  NK_SHARED(float, s, [kBlock]);
  if (kWritten || threadIdx.x < 32) s[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = s[threadIdx.x];
}
__global__ void fresh_global(const float* blank, float* out) { out[threadIdx.x] = blank[threadIdx.x]; }
__global__ void as_float4(const float* from, float* out) {
  const float4 x = reinterpret_cast<const float4*>(from)[threadIdx.x];
  out[threadIdx.x] = x.x + x.y + x.z + x.w;
}
template <class Element> __global__ void shared_as_float4(float* out) {  // an array has its own type's alignment
  NK_SHARED(Element, s, [kBlock * sizeof(float) / sizeof(Element)]);
  reinterpret_cast<float*>(s)[threadIdx.x] = 1;
  __syncthreads();
  if (threadIdx.x >= kBlock / 4) return;
  const float4 x = reinterpret_cast<const float4*>(s)[threadIdx.x];
  out[threadIdx.x] = x.x + x.y + x.z + x.w;
}
__global__ void too_much_shared(float* out) {
  NK_SHARED(float, s, [12 * 1024 + 1]);
  s[threadIdx.x] = 0;
  out[threadIdx.x] = s[threadIdx.x];
}

// ---- Order ---------------------------------------------------------------------------------------------------------

__global__ void all_write_one(int* out) { out[0] = 7; }
__global__ void blocks_meet(int* out) {  // the last of each block is the first of the next
  out[blockIdx.x * (kBlock - 1) + threadIdx.x] = 7;
}
__global__ void reads_another_block(int* out) {
  if (threadIdx.x == 0) out[blockIdx.x] = 1;
  if (threadIdx.x == 1 && blockIdx.x == 0) out[2] = out[1];
}
template <bool kAtomic> __global__ void adds(int* out) {
  if (kAtomic)
    atomicAdd(out, 1);
  else
    out[0] += 1;
}
template <bool kAtomic> __global__ void adds_in_shared(int* out) {
  NK_SHARED(int, sum, [1]);
  if (threadIdx.x == 0) sum[0] = 0;
  __syncthreads();
  if (kAtomic)
    atomicAdd(&sum[0], 1);
  else
    sum[0] += 1;
  __syncthreads();
  if (threadIdx.x == 0) out[0] = sum[0];
}
__global__ void half_atomic(int* out) {
  if (threadIdx.x == 40)
    out[0] = 1;
  else
    atomicAdd(out, 1);
}
__global__ void sums_in_any_order(const float* from, float* out) {
  atomicAdd(out, from[blockIdx.x * kBlock + threadIdx.x]);
}

// ---- The list ------------------------------------------------------------------------------------------------------

// With a fence around each. Not a static: those of the library are constants in the checker's eyes.
struct Arrays {
  char before[512];
  alignas(16) int ints[kBlock * 17];
  char between[512];
  alignas(16) float floats[kBlock * 4];
  char further[512];
  alignas(16) float results[kBlock * 4];
  char after[512];
};
Arrays& memory = *new Arrays();

struct Planted {
  const char *name, *says;  // says nothing: the kernel is right
  std::function<void()> launch;
};

int* const ints = memory.ints;
float *const floats = memory.floats, *const results = memory.results;

template <class... P, class... A> std::function<void()> one_block(void (*kernel)(P...), A... arguments) {
  return [=] { NK_LAUNCH(kernel, 1, kBlock, 0, nullptr, arguments...); };
}
template <class... P, class... A>
std::function<void()> blocks(void (*kernel)(P...), unsigned grid, unsigned threads, A... arguments) {
  return [=] { NK_LAUNCH(kernel, grid, threads, 0, nullptr, arguments...); };
}

void expect(bool holds, const std::string& what) {
  if (!holds) throw std::runtime_error("wrong result: " + what);
}

const std::vector<Planted> all = {
    {"barrier", "", one_block(reversed<true>, ints)},
    {"missing barrier", "unwritten memory: read of 4 bytes at s", one_block(reversed<false>, ints)},
    {"barrier before reuse", "", one_block(reused<true>, ints)},
    {"missing barrier before reuse", "race with another warp", one_block(reused<false>, ints)},
    {"divergent barrier", "divergent __syncthreads", one_block(two_barriers)},
    {"early return before a barrier", "return", one_block(returns_before_barrier)},
    {"early return before a shuffle", "deadlock: no thread can run; thread 0 waits in __shfl_xor_sync",
     one_block(returns_before_shuffle, ints)},
    {"fence of a warp", "", blocks(neighbours<true>, 1, 32, ints)},
    {"a shuffle is no fence", "race with another lane of the warp", blocks(neighbours<false>, 1, 32, ints)},

    {"shuffle in a branch", "deadlock", one_block(shuffle_in_a_branch, ints)},
    {"lane outside its mask", "is not in mask 0000ffff", blocks(lane_outside_its_mask, 1, 32)},
    {"reads outside the mask", "which is not in mask 0000ffff", blocks(reads_outside_the_mask, 1, 32)},
    {"mask of lanes that do not exist", "lanes that do not exist in a block of 48", blocks(warp_of_sixteen, 1, 48)},
    {"two intrinsics meet", "a divergent warp", blocks(two_intrinsics, 1, 32)},
    {"width of no power of two", "of width 12", blocks(odd_width, 1, 32)},
    {"every intrinsic", "",
     [] {
       NK_LAUNCH(intrinsics, 1, kBlock, 0, nullptr, ints);
       for (int t = 0; t < kBlock; t++) {
         const std::vector<int> want = of_intrinsics(t);
         for (size_t k = 0; k < want.size(); k++)
           expect(ints[k * kBlock + t] == want[k], std::to_string(k) + " of thread " + std::to_string(t));
       }
     }},

    {"reversal", "", one_block(reverses<0>, (const float*)floats, results, 4 * kBlock)},
    {"off by one", "access past the end: read of 4 bytes at floats+1024",
     one_block(reverses<1>, (const float*)floats, results, 4 * kBlock)},
    {"before the start", "access before the start: write of 4 bytes at ints-4", one_block(writes_before, ints)},
    {"far away", "access outside every buffer", one_block(far_away, ints)},
    {"past the end of a shared array", "access outside every shared array: write of 4 bytes at s+32",
     one_block(past_shared, results)},
    {"written shared memory", "", one_block(fresh_shared<true>, results)},
    {"unwritten shared memory", "unwritten memory", one_block(fresh_shared<false>, results)},
    {"unwritten global memory", "unwritten memory",
     [] {
       simt_blank(floats, sizeof memory.floats);
       NK_LAUNCH(fresh_global, 1, kBlock, 0, nullptr, (const float*)floats, results);
     }},
    {"aligned float4", "", one_block(as_float4, (const float*)floats, results)},
    {"misaligned float4", "misaligned access: read of 16 bytes",
     blocks(as_float4, 1, 32, (const float*)floats + 1, results)},
    {"float4 of a shared array of float4", "", one_block(shared_as_float4<float4>, results)},
    {"float4 of a shared array of float", "misaligned access", one_block(shared_as_float4<float>, results)},
    {"too much shared memory", "49156 bytes of static shared memory", one_block(too_much_shared, results)},

    {"all write one", "write-write race with another", one_block(all_write_one, ints)},
    {"one writes", "", blocks(all_write_one, 1, 1, ints)},
    {"two blocks write one", "write-write race with another block", blocks(blocks_meet, 3, kBlock, ints)},
    {"reads what another block writes", "race with another block", blocks(reads_another_block, 2, kBlock, ints)},
    {"atomic sum", "",
     [] {
       ints[0] = 0;
       NK_LAUNCH(adds<true>, 3, kBlock, 0, nullptr, ints);
       expect(ints[0] == 3 * kBlock, "sum " + std::to_string(ints[0]));
     }},
    {"lost update", "race with another", one_block(adds<false>, ints)},
    {"atomic sum in shared memory", "", one_block(adds_in_shared<true>, ints)},
    {"lost update in shared memory", "race with another", one_block(adds_in_shared<false>, ints)},
    {"atomic and plain", "race with another", one_block(half_atomic, ints)},
};

}  // namespace

extern "C" {

__attribute__((visibility("default"))) int planted_count() { return (int)all.size(); }
__attribute__((visibility("default"))) const char* planted_name(int i) { return all[i].name; }
__attribute__((visibility("default"))) const char* planted_says(int i) { return all[i].says; }

// What the emulator says of a kernel; nothing if it finds nothing.
__attribute__((visibility("default"))) const char* planted_run(int i, uint64_t seed) {
  static std::string story;
  simt_forget_all();
  simt_allow(ints, sizeof memory.ints, "ints");
  simt_allow(floats, sizeof memory.floats, "floats");
  simt_allow(results, sizeof memory.results, "results");
  simt_seed(seed);
  try {
    all[i].launch();
    story.clear();
  } catch (const std::exception& e) {
    story = e.what();
  }
  return story.c_str();
}

// The sum of 256 floats by float atomics, whose order is that of the schedule: no checker objects, the bits differ.
__attribute__((visibility("default"))) float planted_sum_in_any_order(uint64_t seed) {
  simt_forget_all();
  simt_allow(floats, sizeof memory.floats, "floats");
  simt_allow(results, sizeof memory.results, "results");
  simt_seed(seed);
  for (int i = 0; i < 4 * kBlock; i++) floats[i] = 1.0f / (i + 1);
  results[0] = 0;
  NK_LAUNCH(sums_in_any_order, 4, kBlock, 0, nullptr, (const float*)floats, results);
  return results[0];
}
}
