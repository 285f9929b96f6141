// tensors.h - Python tensors as plain views, and the sentences for those that do not fit.
#pragma once
#include <pybind11/pybind11.h>

#include <optional>
#include <string>
#include <vector>

#include "../core/backend.h"
#include "description.h"
#include "dlpack.h"

namespace nk {
namespace py = pybind11;

// Coordinates worth letting other Python threads run for.
constexpr int64_t kReleaseGil = 16384;

// What torch gives at import: see ops/_binary.py.
struct Torch {
  const DLPackExchangeAPI* exchange = nullptr;
  PyTypeObject *tensor = nullptr, *parameter = nullptr;
  PyObject* is_neg = nullptr;  // torch.Tensor.is_neg
  PyObject* grad = nullptr;    // torch.Tensor.grad, the descriptor
  Shim shim;
};
extern Torch torch;

constexpr int kCpu = -1;  // a device; the others are the indices of CUDA devices

// A tensor that a kernel can run on. Borrowed: valid while the Python object lives and is not resized.
struct View {
  void* data;
  const int64_t *shape, *strides;
  int64_t numel;
  int ndim, device;
  DType dtype;
  bool dense;  // its coordinates fill one stretch of memory, each once

  int item() const { return item_size(dtype); }
  int64_t rows() const { return ndim >= 2 ? shape[0] : 1; }
};

// The view, or nothing if no kernel can take the object: a subclass, another layout, device or dtype, a tensor whose
// negative bit is set (the exchange API would return the wrong sign). Never leaves a Python error behind. Without
// torch's shim, to read the negative bit costs as much as the rest: `last` is where the object's memory was when it was
// last read.
std::optional<View> view(PyObject* object, const void* last = nullptr);

// Whether it is a tensor or parameter and no subclass. Then the two halves of `view`: read the DLPack description of a
// plain tensor (false for other objects), and make its view.
bool is_plain(PyObject* object);
bool read_tensor(PyObject* object, DLTensor&);
bool has_negative_bit(PyObject* tensor);
std::optional<View> view(const DLTensor&, PyObject* object, const void* last);

// Whole numbers of 64 bits, in row-major order without a gap, on a device that has kernels.
struct Ids {
  const int64_t* data;
  int64_t numel;
  int device;
};
std::optional<Ids> view_ids(PyObject* object);

// The first of `slots` equal parts of a tensor, whole rows, that is zero; -1: none is. It reads up to the first number
// of each that is not.
int64_t zero_slot(const View&, int64_t slots);

bool same_shape(const View&, const View&);
bool same_strides(const View&, const View&);  // where the shape makes strides matter

std::vector<int> architectures();  // see backend.h; none in a binary without CUDA
std::string architectures_text();  // "7.5, 8.0"

std::string dtypes_text();  // "float64, float32, bfloat16 or float16"

std::string shape_text(const View&);
std::string describe(PyObject* object);  // "torch.int64 on cpu", "str": for error sentences

}  // namespace nk
