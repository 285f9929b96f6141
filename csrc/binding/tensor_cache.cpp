// tensor_cache.cpp - see tensor_cache.h.
#include "tensor_cache.h"

namespace nk {
namespace {

bool refers_to(PyObject* weak, PyObject* object) {
#if PY_VERSION_HEX >= 0x030d0000
  PyObject* referent = nullptr;
  PyWeakref_GetRef(weak, &referent);
  Py_XDECREF(referent);
  return referent == object;
#else
  return PyWeakref_GetObject(weak) == object;
#endif
}

// Shape and strides as one number, FNV-1a; a dense tensor is a stretch of memory, and its length says all.
uint64_t layout_of(const View& v) {
  if (v.dense) return (uint64_t)v.numel;
  uint64_t hash = 14695981039346656037u;
  for (int d = 0; d < v.ndim; d++)
    for (int64_t x : {v.shape[d], v.strides[d]}) hash = (hash ^ (uint64_t)x) * 1099511628211u;
  return hash;
}

}  // namespace

bool CachedView::is_same(PyObject* object, bool is_kept) const {
  return object == object_ && ((is_kept && was_kept_) || (weak_ && refers_to(weak_, object)));
}

void CachedView::watch() {
  if (weak_) {
    Py_CLEAR(weak_);
    gave_up_ = true;
  }
  if (gave_up_) return;
  weak_ = PyWeakref_NewRef(object_, nullptr);
  if (!weak_) PyErr_Clear();
}

std::optional<View> CachedView::refresh(PyObject* object, bool is_kept, bool& moved) {
  const bool same = is_same(object, is_kept);
  const auto v = view(object, same ? data_ : nullptr);
  const bool was_here = object == object_;
  const void* data = v ? v->data : nullptr;
  const uint64_t layout = v ? layout_of(*v) : 0;
  moved = moved || !was_here || data != data_ || layout != layout_;
  object_ = object, data_ = data, layout_ = layout, was_kept_ = is_kept;
  if (!same && !is_kept && was_here) watch();
  return v;
}

}  // namespace nk
