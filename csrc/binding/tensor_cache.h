// tensor_cache.h - where a tensor was in memory when it was last read, and whether it is still there.
#pragma once
#include <utility>

#include "tensors.h"

namespace nk {

class CachedView {
 public:
  CachedView() = default;
  CachedView(const CachedView&) = delete;
  CachedView(CachedView&& other) noexcept
      : object_(other.object_),
        view_(other.view_),
        dtype_(other.dtype_),
        device_(other.device_),
        layout_(other.layout_),
        weak_(std::exchange(other.weak_, nullptr)),
        was_kept_(other.was_kept_),
        gave_up_(other.gave_up_) {
    for (int k = 0; k < 2 * kKeptDims; k++) dims_[k] = other.dims_[k];
  }
  CachedView& operator=(const CachedView&) = delete;
  ~CachedView() { Py_XDECREF(weak_); }

  // The tensor's view as of now, valid until the next call; null if no kernel takes it. `changed` becomes true if
  // anything is not what it was the last time, `moved` if its memory is not. `is_kept`: the caller holds the object
  // until the next time, so that the same address will be the same object.
  //
  // To read the negative bit costs as much as all the rest, so it is read once per object and address. (It changes
  // unseen only if `.data` is assigned a negative view of the very memory the tensor has.) Gradients are not held: at
  // the address of one there may be another object by now. A weak reference decides; it is made for a gradient that
  // is met a second time, and never again at a position where one died, as there every step has new gradients.
  const View* refresh(PyObject* object, bool is_kept, bool& changed, bool& moved);

 private:
  static constexpr int kKeptDims = 5;

  bool is_as_before(const DLTensor&) const;
  void keep_dims(const DLTensor&);
  bool is_same(PyObject* object, bool is_kept) const;
  void watch();

  PyObject* object_ = nullptr;
  std::optional<View> view_;
  DLDataType dtype_{};
  DLDevice device_{};
  int64_t dims_[2 * kKeptDims] = {};  // shape and strides, whose memory torch may write
  uint64_t layout_ = 0;
  PyObject* weak_ = nullptr;
  bool was_kept_ = false, gave_up_ = false;
};

}  // namespace nk
