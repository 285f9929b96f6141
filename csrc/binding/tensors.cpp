// tensors.cpp - see tensors.h.
#include "tensors.h"

#include <cstring>

namespace nk {

Torch torch;
const cuda::Kernels* cuda_kernels = nullptr;  // csrc/cuda/kernels.cpp sets it when the binary is loaded

namespace {

template <class... Types> std::optional<DType> find_dtype(List<Types...>, const DLDataType& t) {
  std::optional<DType> found;
  ((t.code == storage_of<Types>.dlpack_code && t.bits == 8 * sizeof(Types) ? void(found = dtype_of<Types>) : void()),
   ...);
  return found;
}

std::optional<DType> dtype_of_dlpack(const DLDataType& t) {
  if (t.lanes != 1) return {};
  return find_dtype(StorageTypes{}, t);
}

// Where kernels of this binary can run; pinned memory is the CPU's.
std::optional<int> device_of(const DLDevice& d) {
  static const bool has_cuda = !architectures().empty();
  if (d.device_type == kDLCPU || d.device_type == kDLCUDAHost) return kCpu;
  if (d.device_type == kDLCUDA && has_cuda) return d.device_id;
  return {};
}

bool is_dense(const DLTensor& t, int64_t numel) {
  if (numel <= 1) return true;
  int64_t expected = 1;
  int d = t.ndim - 1;
  for (; d >= 0 && (t.shape[d] == 1 || t.strides[d] == expected); d--) expected *= t.shape[d];
  if (d < 0) return true;
  // Not row-major; still dense if the dimensions, taken from the smallest stride up, fill memory without a gap.
  expected = 1;
  for (int found = 0; expected < numel; expected *= t.shape[found]) {
    for (found = 0; found < t.ndim; found++)
      if (t.shape[found] != 1 && t.strides[found] == expected) break;
    if (found == t.ndim) return false;
  }
  return true;
}

}  // namespace

bool is_plain(PyObject* object) { return Py_TYPE(object) == torch.tensor || Py_TYPE(object) == torch.parameter; }

bool read_tensor(PyObject* object, DLTensor& t) {
  if (!is_plain(object)) return false;
  if (torch.exchange->dltensor_from_py_object_no_sync(object, &t) == 0) return true;
  PyErr_Clear();
  return false;
}

std::optional<View> view(PyObject* object, const void* last) {
  DLTensor t;
  if (!read_tensor(object, t)) return {};
  return view(t, object, last);
}

bool has_negative_bit(PyObject* tensor) {
  if (torch.shim.is_there()) return torch.shim.is_negative(tensor);
  PyObject* negative = PyObject_Vectorcall(torch.is_neg, &tensor, 1, nullptr);
  if (!negative) PyErr_Clear();
  Py_XDECREF(negative);
  return negative != Py_False;
}

std::optional<View> view(const DLTensor& t, PyObject* object, const void* last) {
  const auto dtype = dtype_of_dlpack(t.dtype);
  const auto device = device_of(t.device);
  if (!dtype || !device) return {};
  void* data = static_cast<char*>(t.data) + t.byte_offset;
  if ((torch.shim.is_there() || !data || data != last) && has_negative_bit(object)) return {};
  int64_t numel = 1;
  for (int d = 0; d < t.ndim; d++) numel *= t.shape[d];
  if (numel > 0 && !t.data) return {};
  return View{data, t.shape, t.strides, numel, t.ndim, *device, *dtype, is_dense(t, numel)};
}

std::optional<Ids> view_ids(PyObject* object) {
  DLTensor t;
  if (Py_TYPE(object) != torch.tensor || torch.exchange->dltensor_from_py_object_no_sync(object, &t) != 0) {
    PyErr_Clear();
    return {};
  }
  const auto device = device_of(t.device);
  if (!device || t.dtype.code != kDLInt || t.dtype.bits != 64 || t.dtype.lanes != 1) return {};
  int64_t numel = 1;
  bool dense = true;
  for (int d = t.ndim - 1; d >= 0; numel *= t.shape[d--]) dense = dense && (t.shape[d] == 1 || t.strides[d] == numel);
  if (numel > 0 && (!dense || !t.data)) return {};
  return Ids{reinterpret_cast<const int64_t*>(static_cast<char*>(t.data) + t.byte_offset), numel, *device};
}

int64_t zero_slot(const View& v, int64_t slots) {
  const int64_t size = v.numel / slots;
  const auto is_zero = [&](int64_t i) {
    int64_t offset = i;
    if (!v.dense || v.ndim > 1) {
      offset = 0;
      for (int d = v.ndim - 1; d >= 0; i /= v.shape[d--]) offset += i % v.shape[d] * v.strides[d];
    }
    const char* at = static_cast<const char*>(v.data) + offset * v.item();
    return dispatch(v.dtype, [&](auto type) {
      decltype(type) x;
      std::memcpy(&x, at, sizeof x);
      if constexpr (is_same<decltype(x), double> || is_same<decltype(x), float>)
        return x == 0;
      else
        return widen(x) == 0;
    });
  };
  for (int64_t slot = 0; slot < slots; slot++) {
    int64_t i = slot * size;
    while (i < (slot + 1) * size && is_zero(i)) i++;
    if (i == (slot + 1) * size) return slot;
  }
  return -1;
}

bool same_shape(const View& a, const View& b) {
  if (a.ndim != b.ndim) return false;
  for (int d = 0; d < a.ndim; d++)
    if (a.shape[d] != b.shape[d]) return false;
  return true;
}

bool same_strides(const View& a, const View& b) {
  for (int d = 0; d < a.ndim; d++)
    if (a.shape[d] != 1 && a.strides[d] != b.strides[d]) return false;
  return true;
}

std::vector<int> architectures() {
  if (!cuda_kernels) return {};
  int all[32];
  const int n = cuda_kernels->architectures(all, 32);
  return {all, all + n};
}

std::string architectures_text() {
  std::string text;
  for (int a : architectures())
    text += (text.empty() ? "" : ", ") + std::to_string(a / 10) + "." + std::to_string(a % 10);
  return text;
}

namespace {
template <class... Types> std::string names_of(List<Types...>) {
  std::string text;
  int left = sizeof...(Types);
  ((text += storage_of<Types>.name, text += --left > 1 ? ", " : left == 1 ? " or " : ""), ...);
  return text;
}
}  // namespace

std::string dtypes_text() { return names_of(StorageTypes{}); }

std::string shape_text(const View& v) {
  std::string text = "(";
  for (int d = 0; d < v.ndim; d++) text += (d ? ", " : "") + std::to_string(v.shape[d]);
  return text + (v.ndim == 1 ? ",)" : ")");
}

std::string describe(PyObject* object) {
  py::handle o(object);
  if (!py::hasattr(o, "dtype") || !py::hasattr(o, "device") || !py::hasattr(o, "layout"))
    return Py_TYPE(object)->tp_name;
  std::string text;
  if (Py_TYPE(object) != torch.tensor && Py_TYPE(object) != torch.parameter)
    text = std::string(Py_TYPE(object)->tp_name) + " of ";
  text += std::string(py::str(o.attr("dtype"))) + " on " + std::string(py::str(o.attr("device")));
  const std::string layout = py::str(o.attr("layout"));
  if (layout != "torch.strided")
    text += ", " + layout;
  else if (o.attr("is_neg")().cast<bool>())
    text += ", with its negative bit set";
  return text;
}

}  // namespace nk
