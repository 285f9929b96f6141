// device.h - the one file that knows whether nvcc compiles the kernels for a device or g++ for the emulator of the
// tests.
#pragma once
#include "../core/formulas.h"

#if defined(__CUDACC__)
#include <cuda_runtime.h>

#define NK_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  kernel<<<grid, block, shared_bytes, stream>>>(__VA_ARGS__)
#define NK_SHARED(T, name, ...) __shared__ T name __VA_ARGS__

namespace nk::cuda {
constexpr int kArchitectures[] = {__CUDA_ARCH_LIST__};

// The hardware's conversions: scalar.h's take 8 and 14 integer operations, more than memory leaves time for.
__device__ __forceinline__ float widen_f16(f16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}
__device__ __forceinline__ f16 to_f16(float x) {
  f16 y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}
}  // namespace nk::cuda

#else
#include "simt.h"

namespace nk::cuda {
constexpr int kArchitectures[] = {0};  // no device has it

NK_HD float widen_f16(f16 x) { return widen(x); }
NK_HD f16 to_f16(float x) { return narrow_f16(x); }
}  // namespace nk::cuda
#endif
