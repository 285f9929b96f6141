// dlpack.h - the part of DLPack 1.x that we read, declared from its public specification.
//
// torch >= 2.10 publishes a `DLPackExchangeAPI` in the capsule `torch.Tensor.__dlpack_c_exchange_api__`. Through it a
// tensor's pointer, shape, strides, dtype and device reach us without an allocation and without a torch header.
// Includes nothing but <stdint.h>.
#pragma once
#include <stdint.h>

extern "C" {

struct DLPackVersion {
  uint32_t major, minor;
};

enum DLDeviceType : int32_t { kDLCPU = 1, kDLCUDA = 2, kDLCUDAHost = 3 };

struct DLDevice {
  DLDeviceType device_type;
  int32_t device_id;
};

enum DLDataTypeCode : uint8_t { kDLInt = 0, kDLUInt = 1, kDLFloat = 2, kDLBfloat = 4, kDLComplex = 5, kDLBool = 6 };

struct DLDataType {
  uint8_t code, bits;
  uint16_t lanes;
};

struct DLTensor {
  void* data;
  DLDevice device;
  int32_t ndim;
  DLDataType dtype;
  int64_t* shape;
  int64_t* strides;  // in elements
  uint64_t byte_offset;
};

struct DLManagedTensorVersioned;

struct DLPackExchangeAPIHeader {
  DLPackVersion version;
  DLPackExchangeAPIHeader* prev_api;
};

// Functions return 0, or -1 with a Python exception set.
struct DLPackExchangeAPI {
  DLPackExchangeAPIHeader header;
  int (*managed_tensor_allocator)(DLTensor*, DLManagedTensorVersioned**, void*,
                                  void (*)(void*, const char*, const char*));
  int (*managed_tensor_from_py_object_no_sync)(void*, DLManagedTensorVersioned**);
  int (*managed_tensor_to_py_object_no_sync)(DLManagedTensorVersioned*, void**);
  int (*dltensor_from_py_object_no_sync)(void* py_object, DLTensor* out);  // borrowed: valid while the object lives
  int (*current_work_stream)(DLDeviceType, int32_t, void**);
};

}  // extern "C"
