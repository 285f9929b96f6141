// current.h - what every launch needs of the runtime.
#pragma once
#include "device.h"

namespace nk::cuda {

// Makes a device the current one for as long as it lives.
class Current {
 public:
  explicit Current(int device) {
    error_ = cudaGetDevice(&before_);
    if (error_ == cudaSuccess && before_ != device) error_ = cudaSetDevice(device);
    moved_ = error_ == cudaSuccess && before_ != device;
  }
  ~Current() {
    if (moved_) cudaSetDevice(before_);
  }
  const char* error() const { return error_ == cudaSuccess ? nullptr : cudaGetErrorString(error_); }

 private:
  int before_ = 0;
  bool moved_ = false;
  cudaError_t error_;
};

// What is wrong with the last launch, or null.
inline const char* launched() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace nk::cuda
