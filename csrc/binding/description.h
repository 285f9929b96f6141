// description.h - what tells whether a tensor is still what and where it was: cheap to read, compared with itself only.
#pragma once
#include <pybind11/pybind11.h>

#include <cstdint>
#include <map>
#include <string>

#include "dlpack.h"

namespace nk {

struct Description {
  const void* data = nullptr;
  const int64_t *shape = nullptr, *strides = nullptr;  // where torch keeps them
  int64_t ndim = 0;
  uint64_t dtype = 0, device = 0;

  static Description of(const DLTensor&);
  bool operator==(const Description& o) const {
    return data == o.data && shape == o.shape && strides == o.strides && ndim == o.ndim && dtype == o.dtype &&
           device == o.device;
  }
};

// torch's C shim: functions of libtorch_cpu that take the address of an at::Tensor, and at::native::is_neg. A Python
// tensor contains one; the exchange API and the Python methods, which do the same, take and release references and the
// GIL, at ten times the instructions. ops/_binary.py finds the addresses, and where in the object the tensor is.
class Shim {
 public:
  using Handle = void*;

  // Without some of the functions nothing is there, and the slower ways are taken.
  void connect(const std::map<std::string, uintptr_t>& functions, int64_t offset);
  bool is_there() const { return is_neg_ != nullptr; }

  // Of objects whose type is exactly torch.Tensor or torch.nn.Parameter.
  bool is_negative(PyObject* tensor) const { return is_neg_(handle(tensor)); }
  // Reads a tensor; false where it is not strided.
  bool read(PyObject* tensor, Description&) const;
  // Whether a tensor is strided, not negative, and what `read` found of the one that was at its address the last time.
  bool is_still(PyObject* tensor, const Description& last) const;

 private:
  Handle handle(PyObject* tensor) const { return reinterpret_cast<char*>(tensor) + offset_; }

  int64_t offset_ = 0;
  int32_t strided_ = 0;
  bool (*is_neg_)(Handle) = nullptr;
  int32_t (*get_dim_)(Handle, int64_t*) = nullptr;
  int32_t (*get_sizes_)(Handle, int64_t**) = nullptr;
  int32_t (*get_strides_)(Handle, int64_t**) = nullptr;
  int32_t (*get_data_ptr_)(Handle, void**) = nullptr;
  int32_t (*get_dtype_)(Handle, int32_t*) = nullptr;
  int32_t (*get_device_type_)(Handle, int32_t*) = nullptr;
  int32_t (*get_layout_)(Handle, int32_t*) = nullptr;
};

}  // namespace nk
