// description.cpp - see description.h.
#include "description.h"

namespace nk {
namespace {

uint64_t joined(uint32_t high, uint32_t low) { return (uint64_t)high << 32 | low; }

}  // namespace

Description Description::of(const DLTensor& t) {
  const uint64_t dtype = joined((uint32_t)t.dtype.code << 16 | t.dtype.bits, t.dtype.lanes);
  const uint64_t device = joined((uint32_t)t.device.device_type, (uint32_t)t.device.device_id);
  return {static_cast<const char*>(t.data) + t.byte_offset, t.shape, t.strides, t.ndim, dtype, device};
}

void Shim::connect(const std::map<std::string, uintptr_t>& functions, int64_t offset) {
  *this = Shim();
  bool complete = true;
  const auto take = [&](auto& function, const char* name) {
    const auto at = functions.find(name);
    complete = complete && at != functions.end();
    if (at != functions.end()) function = reinterpret_cast<std::decay_t<decltype(function)>>(at->second);
  };
  int32_t (*strided)() = nullptr;
  take(strided, "layout_strided");
  take(get_dim_, "get_dim");
  take(get_sizes_, "get_sizes");
  take(get_strides_, "get_strides");
  take(get_data_ptr_, "get_data_ptr");
  take(get_dtype_, "get_dtype");
  take(get_device_type_, "get_device_type");
  take(get_layout_, "get_layout");
  take(is_neg_, "is_neg");
  if (!complete) {
    *this = Shim();
    return;
  }
  offset_ = offset;
  strided_ = strided();
}

bool Shim::read(PyObject* tensor, Description& d) const {
  Handle t = handle(tensor);
  int32_t layout, dtype, device;
  int64_t *sizes, *strides;
  void* data;
  if (get_layout_(t, &layout) || layout != strided_ || get_sizes_(t, &sizes) || get_strides_(t, &strides) ||
      get_dim_(t, &d.ndim) || get_dtype_(t, &dtype) || get_device_type_(t, &device) || get_data_ptr_(t, &data))
    return false;
  // The index of the device is not read: the devices of a type have no address in common.
  d.data = data, d.shape = sizes, d.strides = strides, d.dtype = (uint32_t)dtype, d.device = (uint32_t)device;
  return true;
}

bool Shim::is_still(PyObject* tensor, const Description& last) const {
  Handle t = handle(tensor);
  int32_t code;
  int64_t* dims;
  int64_t ndim;
  void* data;
  // The memory last: torch logs an error for a tensor that has none, which is of another kind.
  if (get_layout_(t, &code) || code != strided_ || get_sizes_(t, &dims) || dims != last.shape) return false;
  if (get_strides_(t, &dims) || dims != last.strides || get_dim_(t, &ndim) || ndim != last.ndim) return false;
  if (get_dtype_(t, &code) || (uint32_t)code != last.dtype) return false;
  if (get_device_type_(t, &code) || (uint32_t)code != last.device) return false;
  return get_data_ptr_(t, &data) == 0 && data == last.data && !is_neg_(t);
}

}  // namespace nk
