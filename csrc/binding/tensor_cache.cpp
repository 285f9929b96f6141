// tensor_cache.cpp - see tensor_cache.h.
#include "tensor_cache.h"

#include <cstring>

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

bool CachedView::is_as_before(const DLTensor& t) const {
  if (!view_ || !view_->data || view_->data != static_cast<char*>(t.data) + t.byte_offset) return false;
  if (t.ndim != view_->ndim || t.ndim > kKeptDims || t.shape != view_->shape || t.strides != view_->strides)
    return false;
  if (std::memcmp(&t.dtype, &dtype_, sizeof dtype_) != 0 || std::memcmp(&t.device, &device_, sizeof device_) != 0)
    return false;
  for (int d = 0; d < t.ndim; d++)
    if (t.shape[d] != dims_[d] || t.strides[d] != dims_[kKeptDims + d]) return false;
  return true;
}

void CachedView::keep_dims(const DLTensor& t) {
  dtype_ = t.dtype, device_ = t.device;
  for (int d = 0; d < t.ndim && d < kKeptDims; d++) dims_[d] = t.shape[d], dims_[kKeptDims + d] = t.strides[d];
}

const View* CachedView::refresh(PyObject* object, bool is_kept, bool& changed, bool& moved) {
  const bool was_here = object == object_, was_held = was_here && is_kept && was_kept_;
  DLTensor t;
  const bool is_tensor = read_tensor(object, t);
  if (was_here && is_tensor && is_as_before(t) && (was_held || !has_negative_bit(object))) return &*view_;
  changed = true;
  const void* const data = view_ ? view_->data : nullptr;
  view_ = is_tensor ? view(t, object, was_held ? data : nullptr) : std::nullopt;
  if (view_) keep_dims(t);
  const uint64_t layout = view_ ? layout_of(*view_) : 0;
  moved = moved || !was_here || data != (view_ ? view_->data : nullptr) || layout != layout_;
  object_ = object, layout_ = layout, was_kept_ = is_kept;
  return view_ ? &*view_ : nullptr;
}

}  // namespace nk
