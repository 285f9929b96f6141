// tensor_cache.cpp - see tensor_cache.h.
#include "tensor_cache.h"

namespace nk {
namespace {

// Shape and strides as one number, FNV-1a; a dense tensor is a stretch of memory, and its length says all.
uint64_t layout_of(const View& v) {
  if (v.dense) return (uint64_t)v.numel;
  uint64_t hash = 14695981039346656037u;
  for (int d = 0; d < v.ndim; d++)
    for (int64_t x : {v.shape[d], v.strides[d]}) hash = (hash ^ (uint64_t)x) * 1099511628211u;
  return hash;
}

}  // namespace

// Of an object at the address of the last one.
bool CachedView::is_as_before(PyObject* object, bool was_held) const {
  if (!last_.data || !is_plain(object)) return false;
  if (torch.shim.is_there()) {
    if (!torch.shim.is_still(object, last_)) return false;
  } else {
    DLTensor t;
    if (!read_tensor(object, t) || !(Description::of(t) == last_)) return false;
    if (!was_held && has_negative_bit(object)) return false;
  }
  for (int64_t d = 0; d < last_.ndim; d++)
    if (last_.shape[d] != dims_[d] || last_.strides[d] != dims_[kKeptDims + d]) return false;
  return true;
}

void CachedView::keep(PyObject* object, const DLTensor& t) {
  last_ = Description::of(t);
  if (t.ndim > kKeptDims || (torch.shim.is_there() && !torch.shim.read(object, last_))) last_ = {};
  for (int d = 0; d < t.ndim && d < kKeptDims; d++) dims_[d] = t.shape[d], dims_[kKeptDims + d] = t.strides[d];
}

const View* CachedView::refresh(PyObject* object, bool is_kept, bool& changed, bool& moved) {
  const bool was_here = object == object_, was_held = was_here && is_kept && was_kept_;
  if (was_here && is_as_before(object, was_held)) return &*view_;
  changed = true;
  const void* const data = view_ ? view_->data : nullptr;
  DLTensor t;
  view_ = read_tensor(object, t) ? view(t, object, was_held ? data : nullptr) : std::nullopt;
  last_ = {};
  if (view_) keep(object, t);
  const uint64_t layout = view_ ? layout_of(*view_) : 0;
  moved = moved || !was_here || data != (view_ ? view_->data : nullptr) || layout != layout_;
  object_ = object, layout_ = layout, was_kept_ = is_kept;
  return view_ ? &*view_ : nullptr;
}

}  // namespace nk
