// simt.h - CUDA's language for g++: one fiber per CUDA thread, blocks and threads in an order drawn at random.
//
// csrc/cuda/device.h includes this file where the compiler is not nvcc; no CUDA toolkit is needed. Between two
// synchronisation points a thread runs alone, and which one runs next comes from a seed: kernels that are right give
// the same bits for every seed. In the check build (g++ -fsanitize=thread with the hooks of check.cpp in place of
// libtsan) every access to memory is examined as well.
//
// Not here: cooperative groups, asynchronous copies, tensor cores, approximate intrinsics, a weak memory model.
#pragma once
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <tuple>
#include <type_traits>

#include "runtime.h"

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__ &  // behind the type: `const Table __grid_constant__ table` is shared, not copied per thread
#define __shared__ _Pragma("GCC error \"shared memory: use NK_SHARED(type, name, [extents])\"")

inline uint3 threadIdx, blockIdx;  // written at every switch of fibers
inline dim3 blockDim, gridDim;
constexpr int warpSize = 32;

namespace simt {

// Ends the launch: the thread that launched gets a std::runtime_error.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

struct Site {
  const char* file;
  int line;
  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
};

// A kernel with its arguments: the body that every thread runs, and where everything lies.
struct Parameter {
  const void* value;
  size_t size, align;
};
struct Call {
  const void* kernel;
  void (*run)(const void* bound);
  const void* bound;
  size_t size;
  const Parameter* parameters;
  int count;
};
void launch_call(dim3 grid, dim3 block, size_t dynamic_shared, const Call& call);

// As on the device, arguments become the kernel's parameters when it is launched.
template <class... P, class... A>
void launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t dynamic_shared, cudaStream_t, const A&... arguments) {
  static_assert((sizeof(std::decay_t<P>) + ... + 0) <= 32764, "nvcc takes no more bytes of parameters");
  struct Bound {
    void (*kernel)(P...);
    std::tuple<std::decay_t<P>...> parameters;
  } const bound{kernel, {arguments...}};
  std::apply(
      [&](const auto&... p) {
        const Parameter parameters[] = {{&p, sizeof p, alignof(std::decay_t<decltype(p)>)}..., {nullptr, 0, 1}};
        const auto run = [](const void* b) {
          const Bound& bound = *static_cast<const Bound*>(b);
          std::apply(bound.kernel, bound.parameters);
        };
        const void* address = reinterpret_cast<const void*>(kernel);
        launch_call(grid, block, dynamic_shared, {address, run, &bound, sizeof bound, parameters, (int)sizeof...(P)});
      },
      bound.parameters);
}

// One per NK_SHARED, or per instantiation of the template it stands in.
struct SharedArray {
  size_t size, align;
  const char* name;
  size_t offset = 0;
  uint64_t launch = 0;
  constexpr SharedArray(size_t size, size_t align, const char* name) : size(size), align(align), name(name) {}
  void* memory();
};
void* dynamic_shared();

void barrier(Site);
enum class Vote { any, all, count };
int barrier_vote(bool, Vote, Site);

// Deposits the value of this lane, waits for every lane of `mask`, returns 32 slots of 16 bytes.
const unsigned char* exchange(unsigned mask, const void* value, size_t size, const char* name, Site);
unsigned lane();

#if defined(__SANITIZE_THREAD__)
#define SIMT_UNSEEN __attribute__((no_sanitize("thread")))
void atomic_access(const void* p, size_t size, const void* pc);
template <class T> void touch(T* p) { atomic_access(p, sizeof(T), __builtin_return_address(0)); }
#else
#define SIMT_UNSEEN
template <class T> void touch(T*) {}
#endif

// What lane `source` holds; the lane's own value where the source is not in its range, as on the device.
template <class T>
SIMT_UNSEEN T shuffle(unsigned mask, T value, int source, int width, bool in_range, const char* name, Site site) {
  static_assert(std::is_arithmetic<T>::value, "shuffles take numbers");
  if (width <= 0 || width > 32 || (width & (width - 1)))
    fail("%s:%d: %s of width %d", site.file, site.line, name, width);
  const unsigned char* slots = exchange(mask, &value, sizeof value, name, site);
  if (!in_range) return value;
  if (!(mask >> source & 1))
    fail("%s:%d: %s: lane %u reads lane %d, which is not in mask %08x", site.file, site.line, name, lane(), source,
         mask);
  memcpy(&value, slots + 16 * source, sizeof value);
  return value;
}

template <class T> struct Same {
  using type = T;
};

}  // namespace simt

inline void __syncthreads(simt::Site site = simt::Site::here()) { simt::barrier(site); }
inline int __syncthreads_or(int x, simt::Site site = simt::Site::here()) {
  return simt::barrier_vote(x != 0, simt::Vote::any, site);
}
inline int __syncthreads_and(int x, simt::Site site = simt::Site::here()) {
  return simt::barrier_vote(x != 0, simt::Vote::all, site);
}
inline int __syncthreads_count(int x, simt::Site site = simt::Site::here()) {
  return simt::barrier_vote(x != 0, simt::Vote::count, site);
}

inline void __syncwarp(unsigned mask = ~0u, simt::Site site = simt::Site::here()) {
  const int nothing = 0;
  simt::exchange(mask, &nothing, sizeof nothing, "__syncwarp", site);
}
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, simt::Site site = simt::Site::here()) {
  const int lane = simt::lane(), first = lane & ~(width - 1);
  return simt::shuffle(mask, value, first | (source & (width - 1)), width, true, "__shfl_sync", site);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32, simt::Site site = simt::Site::here()) {
  const int lane = simt::lane(), source = lane - (int)by;
  const bool in_range = source >= 0 && source / width == lane / width;
  return simt::shuffle(mask, value, source & 31, width, in_range, "__shfl_up_sync", site);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32, simt::Site site = simt::Site::here()) {
  const int lane = simt::lane(), source = lane + (int)by;
  return simt::shuffle(mask, value, source & 31, width, source / width == lane / width, "__shfl_down_sync", site);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int by, int width = 32, simt::Site site = simt::Site::here()) {
  const int lane = simt::lane(), source = lane ^ by;
  const bool in_range = source < 32 && source / width <= lane / width;
  return simt::shuffle(mask, value, source & 31, width, in_range, "__shfl_xor_sync", site);
}
SIMT_UNSEEN inline unsigned __ballot_sync(unsigned mask, int x, simt::Site site = simt::Site::here()) {
  const unsigned char vote = x != 0, *slots = simt::exchange(mask, &vote, 1, "__ballot_sync", site);
  unsigned votes = 0;
  for (int lane = 0; lane < 32; lane++)
    if (mask >> lane & 1) votes |= (unsigned)slots[16 * lane] << lane;
  return votes;
}
inline int __any_sync(unsigned mask, int x, simt::Site site = simt::Site::here()) {
  return __ballot_sync(mask, x, site) != 0;
}
inline int __all_sync(unsigned mask, int x, simt::Site site = simt::Site::here()) {
  return __ballot_sync(mask, x, site) == mask;
}

// The check build learns of the access from touch(): plain loads and stores would look like races.
#define SIMT_ATOMIC(name, result)                                                   \
  template <class T> SIMT_UNSEEN T name(T* p, typename simt::Same<T>::type value) { \
    simt::touch(p);                                                                 \
    const T old = *p;                                                               \
    *p = (T)(result);                                                               \
    return old;                                                                     \
  }
SIMT_ATOMIC(atomicAdd, old + value)
SIMT_ATOMIC(atomicSub, old - value)
SIMT_ATOMIC(atomicMax, old > value ? old : value)
SIMT_ATOMIC(atomicMin, old < value ? old : value)
SIMT_ATOMIC(atomicExch, value)
SIMT_ATOMIC(atomicOr, old | value)
SIMT_ATOMIC(atomicAnd, old& value)
SIMT_ATOMIC(atomicInc, old >= value ? 0 : old + 1)
#undef SIMT_ATOMIC
template <class T>
SIMT_UNSEEN T atomicCAS(T* p, typename simt::Same<T>::type expected, typename simt::Same<T>::type value) {
  simt::touch(p);
  const T old = *p;
  if (old == expected) *p = value;
  return old;
}

inline void __threadfence() {}
inline void __threadfence_block() {}
template <class T> T __ldg(const T* p) { return *p; }
template <class T> T __ldcs(const T* p) { return *p; }
template <class T> T __ldcg(const T* p) { return *p; }
template <class T> void __stcs(T* p, typename simt::Same<T>::type value) { *p = value; }
template <class T> void __stcg(T* p, typename simt::Same<T>::type value) { *p = value; }
template <class T> void __stwb(T* p, typename simt::Same<T>::type value) { *p = value; }

#define NK_SHARED(T, name, ...)                                                          \
  typedef T name##_shared_type __VA_ARGS__;                                              \
  static simt::SharedArray name##_shared(sizeof(name##_shared_type), alignof(T), #name); \
  name##_shared_type& name = *static_cast<name##_shared_type*>(name##_shared.memory())
#define NK_LAUNCH(kernel, grid, block, dynamic_shared, stream, ...) \
  simt::launch(kernel, grid, block, dynamic_shared, stream, __VA_ARGS__)
