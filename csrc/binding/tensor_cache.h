// tensor_cache.h - where a tensor was in memory when it was last read, and whether it is still there.
#pragma once
#include "description.h"
#include "tensors.h"

namespace nk {

class CachedView {
 public:
  // The tensor's view as of now, valid until the next call; null if no kernel takes it. `changed` becomes true if
  // anything is not what it was the last time, `moved` if its memory is not. `is_kept`: the caller holds the object
  // until the next time, so that the same address will be the same object.
  //
  // Without torch's shim, to read the negative bit costs as much as all the rest: then it is read once per object and
  // address of what is held. (It changes unseen only if `.data` is assigned a negative view of the very memory the
  // tensor has.) Gradients are not held: at the address of one there may be another object by now. A weak reference
  // could tell, but torch.utils.swap_tensors refuses tensors that have one.
  const View* refresh(PyObject* object, bool is_kept, bool& changed, bool& moved);

 private:
  static constexpr int kKeptDims = 5;

  bool is_as_before(PyObject*, bool was_held) const;
  void keep(PyObject*, const DLTensor&);

  PyObject* object_ = nullptr;
  std::optional<View> view_;
  Description last_;                  // without data: none that can be compared
  int64_t dims_[2 * kKeptDims] = {};  // shape and strides, whose memory torch may write
  uint64_t layout_ = 0;
  bool was_kept_ = false;
};

}  // namespace nk
