// tensors.h - Python tensors as plain views, and the sentences for those that do not fit.
#pragma once
#include <pybind11/pybind11.h>

#include <optional>
#include <string>
#include <vector>

#include "backend.h"
#include "dlpack.h"

namespace nk {
namespace py = pybind11;

// Coordinates worth letting other Python threads run for.
constexpr int64_t kReleaseGil = 16384;

// What torch gave us at import: see ops/loaded.py.
struct Torch {
  const DLPackExchangeAPI* exchange = nullptr;
  PyTypeObject *tensor = nullptr, *parameter = nullptr;
  PyObject* is_neg = nullptr;  // torch.Tensor.is_neg
  PyObject* grad = nullptr;    // torch.Tensor.grad, the descriptor
};
extern Torch torch;

constexpr int kCpu = -1;  // a device; the others are the indices of CUDA devices

// A tensor that a kernel can run on. Borrowed: valid while the Python object lives and is not resized.
struct View {
  void* data;
  int ndim;
  const int64_t *shape, *strides;
  int64_t numel;
  DType dtype;
  int device;
  bool dense;  // its coordinates fill one stretch of memory, each once

  int item() const { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }
  int64_t rows() const { return ndim >= 2 ? shape[0] : 1; }
};

// The view, or nothing if no kernel of ours may touch the object: a subclass, another layout, device or dtype, a tensor
// whose negative bit is set (the exchange API would hand us the wrong sign). Never leaves a Python error behind.
// Asking for the negative bit costs as much as the rest: `last` is where the object's memory was when it was last
// asked.
std::optional<View> view(PyObject* object, const void* last = nullptr);

// Whole numbers of 64 bits, in row-major order without a gap, on a device that has kernels.
struct Ids {
  const int64_t* data;
  int64_t numel;
  int device;
};
std::optional<Ids> view_ids(PyObject* object);

bool same_shape(const View&, const View&);
bool same_strides(const View&, const View&);  // where the shape makes strides matter

std::vector<int> architectures();  // see backend.h
std::string architectures_text();  // "7.5, 8.0"

std::string shape_text(const View&);
std::string describe(PyObject* object);  // "torch.int64 on cpu", "str": what came, for error sentences

}  // namespace nk
