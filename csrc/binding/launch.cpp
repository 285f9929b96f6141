// launch.cpp - see launch.h.
#include "launch.h"

namespace nk {

cuda::Queue queue_of(int device) {
  cuda::Queue queue{device, nullptr};
  if (torch.exchange->current_work_stream(kDLCUDA, device, &queue.stream) != 0) throw py::error_already_set();
  return queue;
}

void check_launch(const std::string& op, int device, const char* error) {
  if (error)
    throw std::runtime_error(op + ": a kernel could not be launched on cuda:" + std::to_string(device) +
                             ", for compute capabilities " + architectures_text() + ": " + error);
}

View Call::take(const char* name, py::handle tensor) {
  const auto v = view(tensor.ptr());
  if (!v)
    throw py::type_error(std::string(op_) + ": " + name + " is " + describe(tensor.ptr()) +
                         "; expected a torch.Tensor of " + dtypes_text() + " on cpu" +
                         (architectures().empty() ? "" : " or cuda"));
  on(v->device, name, tensor);
  return *v;
}

Ids Call::take_ids(const char* name, py::handle tensor) {
  const auto ids = view_ids(tensor.ptr());
  if (!ids)
    throw py::type_error(std::string(op_) + ": " + name + " is " + describe(tensor.ptr()) +
                         "; expected a contiguous torch.Tensor of int64");
  on(ids->device, name, tensor);
  return *ids;
}

void Call::on(int device, const char* name, py::handle tensor) {
  if (!first_) {
    first_ = name, device_ = device;
  } else if (device != device_) {
    const std::string there = device_ == kCpu ? "the CPU" : "cuda:" + std::to_string(device_);
    throw py::type_error(std::string(op_) + ": " + name + " is " + describe(tensor.ptr()) + " but " + first_ +
                         " is on " + there + "; expected one device");
  }
}

double* Call::scratch(const py::object& new_scratch, int64_t size) {
  if (size == 0) return nullptr;
  scratch_ = new_scratch(size);
  const View v = take("scratch", scratch_);
  if (v.dtype != DType::f64 || v.numel < size || !v.dense)
    throw py::value_error(std::string(op_) + ": scratch expected " + std::to_string(size) +
                          " numbers of float64, got " + describe(scratch_.ptr()));
  return static_cast<double*>(v.data);
}

}  // namespace nk
