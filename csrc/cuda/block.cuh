// block.cuh - what the threads of a block do together: 16-byte packs and sums in a fixed order.
#pragma once
#include "device.h"

namespace nk::cuda {

constexpr int kThreads = 256;  // per block
constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;
constexpr unsigned kFullWarp = 0xffffffffu;

// A stored number, for arithmetic.
__device__ inline float real(float x) { return x; }
__device__ inline double real(double x) { return x; }
__device__ inline float real(f16 x) { return widen_f16(x); }
template <class T> __device__ __forceinline__ float real(T x) { return widen(x); }

// One rounding; x becomes what was stored.
__device__ inline float stored(float& x, float) { return x; }
__device__ inline double stored(double& x, double) { return x; }
__device__ inline f16 stored(float& x, f16) {
  const f16 y = to_f16(x);
  x = widen_f16(y);
  return y;
}
template <class T> __device__ __forceinline__ T stored(float& x, T) {
  const T y = narrow(x, T{});
  x = widen(y);
  return y;
}

// `dispatch` on the device.
template <class F, class T, class... Rest>
__device__ __forceinline__ auto dispatch_here(List<T, Rest...>, DType dtype, const F& f) {
  if constexpr (sizeof...(Rest) == 0)
    return f(T{});
  else if (dtype == dtype_of<T>)
    return f(T{});
  else
    return dispatch_here(List<Rest...>{}, dtype, f);
}

// Sixteen bytes: as many numbers as go through one load or store. As they lie in memory, so that several packs on their
// way take few registers.
template <class T> struct Pack {
  static constexpr int size = 16 / sizeof(T);
  uint4 raw;

  __device__ __forceinline__ void load(const T* p) { raw = *reinterpret_cast<const uint4*>(p); }
  __device__ __forceinline__ void unpack(Real<T>* x) const {
    T values[size];
    __builtin_memcpy(values, &raw, sizeof raw);
#pragma unroll
    for (int k = 0; k < size; k++) x[k] = real(values[k]);
  }
  // x becomes what was stored.
  static __device__ __forceinline__ void store(T* p, Real<T>* x) {
    T values[size];
#pragma unroll
    for (int k = 0; k < size; k++) values[k] = stored(x[k], T{});
    uint4 raw;
    __builtin_memcpy(&raw, values, sizeof raw);
    __stwb(reinterpret_cast<uint4*>(p), raw);  // nvcc splits what is assigned
  }
};

__device__ inline bool is_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// Sums of kCount numbers over the lanes of a warp: at every step each lane sends half of its numbers and keeps the
// other half, so that few are exchanged. Sum j ends in s[0] of lane `lane_of<N>(j)`.
template <int kCount, int kAway = kWarp / 2, int N> __device__ __forceinline__ void fold(double (&s)[N]) {
  if constexpr (kAway > 0) {
    constexpr int kHalf = (kCount + 1) / 2;
    const bool upper = threadIdx.x & kAway;
#pragma unroll
    for (int k = 0; k < kHalf; k++) {
      if constexpr (kCount == 1) {
        s[k] += __shfl_xor_sync(kFullWarp, s[k], kAway);
      } else {
        const double other = k + kHalf < kCount ? s[k + kHalf < kCount ? k + kHalf : k] : 0.0;
        const double got = __shfl_xor_sync(kFullWarp, upper ? s[k] : other, kAway);
        s[k] = (upper ? other : s[k]) + got;
      }
    }
    fold<kHalf, kAway / 2>(s);
  }
}
template <int N> NK_HD constexpr int lane_of(int j) {
  int lane = 0, count = N;
  for (int away = kWarp / 2; count > 1; away /= 2) {
    count = (count + 1) / 2;
    if (j >= count) lane += away, j -= count;
  }
  return lane;
}

// Sums over the lanes of a warp; every lane gets them.
template <int N> __device__ __forceinline__ void warp_sum(double (&s)[N]) {
  fold<N>(s);
  const double mine = s[0];
#pragma unroll
  for (int j = 0; j < N; j++) s[j] = __shfl_sync(kFullWarp, mine, lane_of<N>(j));
}

// Sums over the threads of a block, `from` shared memory; the lanes of warp 0 get them. To be called by all threads,
// once per use of `from`.
template <int N> __device__ __forceinline__ void block_sum(double (&s)[N], double (&from)[N][kWarps]) {
  static_assert(N <= kWarp, "a lane per sum");
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  fold<N>(s);
#pragma unroll
  for (int j = 0; j < N; j++)
    if (lane == lane_of<N>(j)) from[j][warp] = s[0];
  __syncthreads();
  if (warp != 0) return;
  double mine = 0;
  if (lane < N)
    for (int k = 0; k < kWarps; k++) mine += from[lane][k];
#pragma unroll
  for (int j = 0; j < N; j++) s[j] = __shfl_sync(kFullWarp, mine, j);
}

}  // namespace nk::cuda
