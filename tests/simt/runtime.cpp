// runtime.cpp - CUDA's runtime, and what the tests tell the emulator and ask of it.
#include "runtime.h"

#include <stdio.h>

#include <algorithm>
#include <map>
#include <string>
#include <utility>

#include "../../csrc/binding/dlpack.h"
#include "state.h"

using simt::state;

namespace {

struct Error {
  cudaError_t code;
  const char *name, *text;
};
constexpr Error errors[] = {
    {cudaSuccess, "cudaSuccess", "no error"},
    {cudaErrorInvalidConfiguration, "cudaErrorInvalidConfiguration", "invalid configuration argument"},
    {cudaErrorInsufficientDriver, "cudaErrorInsufficientDriver",
     "CUDA driver version is insufficient for CUDA runtime version"},
    {cudaErrorNoDevice, "cudaErrorNoDevice", "no CUDA-capable device is detected"},
    {cudaErrorInvalidDevice, "cudaErrorInvalidDevice", "invalid device ordinal"},
    {cudaErrorNoKernelImageForDevice, "cudaErrorNoKernelImageForDevice",
     "no kernel image is available for execution on the device"},
    {cudaErrorLaunchOutOfResources, "cudaErrorLaunchOutOfResources", "too many resources requested for launch"},
};
const Error& find(cudaError_t code) {
  for (const Error& e : errors)
    if (e.code == code) return e;
  static constexpr Error unknown{cudaSuccess, "cudaErrorUnknown", "unrecognized error code"};
  return unknown;
}

const DLPackExchangeAPI* torch_api = nullptr;
int tensor_device = 0;
std::map<const void*, int> placed;  // where tensors lie that are not on that device

size_t extent(const DLTensor& t) {  // bytes from the first to the last coordinate
  int64_t last = 0;
  for (int d = 0; d < t.ndim; d++) {
    if (t.shape[d] == 0) return 0;
    last += (t.shape[d] - 1) * t.strides[d];
  }
  return (size_t)(last + 1) * t.dtype.bits / 8;
}

int tensor_of(void* object, DLTensor* out) {
  const int failed = torch_api->dltensor_from_py_object_no_sync(object, out);
  if (failed || out->device.device_type != kDLCPU) return failed;
  const auto elsewhere = placed.find(out->data);
  out->device = {kDLCUDA, elsewhere == placed.end() ? tensor_device : elsewhere->second};
  std::string name = "a tensor of " + std::to_string(out->dtype.bits) + " bits and shape (";
  for (int d = 0; d < out->ndim; d++) name += std::to_string(out->shape[d]) + ",";
  if (out->data) simt::allow(static_cast<char*>(out->data) + out->byte_offset, extent(*out), (name + ")").c_str());
  return 0;
}

int stream_of(DLDeviceType, int32_t, void** out) {
  *out = nullptr;
  return 0;
}

}  // namespace

extern "C" {

cudaError_t cudaGetLastError() { return std::exchange(state.error, cudaSuccess); }
const char* cudaGetErrorName(cudaError_t code) { return find(code).name; }
const char* cudaGetErrorString(cudaError_t code) { return find(code).text; }
cudaError_t cudaGetDeviceCount(int* out) {
  *out = state.devices;
  return state.devices ? cudaSuccess : cudaErrorNoDevice;
}
cudaError_t cudaGetDevice(int* out) {
  *out = state.device;
  return state.devices ? cudaSuccess : cudaErrorNoDevice;
}
cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= state.devices) return cudaErrorInvalidDevice;
  state.device = device;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* out, cudaDeviceAttr attribute, int device) {
  if (device < 0 || device >= state.devices) return cudaErrorInvalidDevice;
  *out = attribute == cudaDevAttrComputeCapabilityMajor ? 9 : 0;
  return cudaSuccess;
}

#define SIMT_EXPORT __attribute__((visibility("default")))

SIMT_EXPORT void simt_seed(uint64_t seed) { state.seed = seed; }
SIMT_EXPORT uint64_t simt_launches() { return state.launch; }
SIMT_EXPORT void simt_refuse_launch(int error, int after) {
  state.refuse_with = cudaError_t(error);
  state.refuse_after = after;
}
SIMT_EXPORT int simt_current_device() { return state.device; }
SIMT_EXPORT void simt_run_elsewhere(simt::Elsewhere run) { state.run_elsewhere = run; }
SIMT_EXPORT int simt_allowed(uint64_t (*stretches)[2], int room) { return simt::allowed(stretches, room); }
SIMT_EXPORT void simt_fma32(const float* a, const float* b, const float* c, float* out, int64_t n) {
  for (int64_t i = 0; i < n; i++) out[i] = __builtin_fmaf(a[i], b[i], c[i]);
}
SIMT_EXPORT void simt_fma64(const double* a, const double* b, const double* c, double* out, int64_t n) {
  for (int64_t i = 0; i < n; i++) out[i] = __builtin_fma(a[i], b[i], c[i]);
}
SIMT_EXPORT void simt_devices(int count, int current, int of_tensors) {
  state.devices = count;
  state.device = current;
  tensor_device = of_tensors;
  placed.clear();
}
SIMT_EXPORT void simt_place(const void* p, int device) { placed[p] = device; }
SIMT_EXPORT void simt_allow(const void* p, size_t size, const char* name) { simt::allow(p, size, name); }
SIMT_EXPORT void simt_blank(const void* p, size_t size) { simt::blank(p, size); }
SIMT_EXPORT void simt_forget_all() { simt::forget_all(); }

// torch's exchange API, in whose eyes CPU tensors are on an emulated device.
SIMT_EXPORT const void* simt_exchange_api(const void* api) {
  static DLPackExchangeAPI ours;
  torch_api = static_cast<const DLPackExchangeAPI*>(api);
  ours = *torch_api;
  ours.header.prev_api = nullptr;
  ours.dltensor_from_py_object_no_sync = tensor_of;
  ours.current_work_stream = stream_of;
  return &ours;
}

}  // extern "C"
