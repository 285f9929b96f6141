// launch.h - one call of an op: its tensors are taken, all of one device, and its kernel runs there.
#pragma once
#include <string>
#include <utility>

#include "tensors.h"

namespace nk {

// Torch's current stream of a device.
cuda::Queue queue_of(int device);

// Throws what a kernel of `op` that could not be launched left; null: nothing went wrong.
void check_launch(const std::string& op, int device, const char* error);

class Call {
 public:
  explicit Call(const char* op) : op_(op) {}

  // Throws if no kernel takes the tensor, or it is not on the device of those before it.
  View take(const char* name, py::handle tensor);
  Ids take_ids(const char* name, py::handle tensor);
  // Where a result goes; null for None.
  void* data(const char* name, const py::object& tensor) {
    return tensor.is_none() ? nullptr : take(name, tensor).data;
  }

  bool is_on_cpu() const { return device_ == kCpu; }
  // Unwritten memory, from new_scratch(size): float64 beside the tensors. It lives as long as the call; torch does not
  // reuse it before the stream has come past the kernels.
  double* scratch(const py::object& new_scratch, int64_t size);

  // cpu(), or cuda(queue), which returns what is wrong. Lets other Python threads run if `is_long`.
  template <class Cpu, class Cuda> void run(bool is_long, const Cpu& cpu, const Cuda& cuda) {
    const bool here = is_on_cpu();
    const cuda::Queue queue = here ? cuda::Queue{} : queue_of(device_);
    std::optional<py::gil_scoped_release> released;
    if (is_long || !here) released.emplace();
    if (here)
      cpu();
    else
      check_launch(op_, device_, cuda(queue));
  }

 private:
  void on(int device, const char* name, py::handle tensor);

  const char* op_;
  const char* first_ = nullptr;  // the name of the first tensor
  int device_ = kCpu;
  py::object scratch_;
};

}  // namespace nk
