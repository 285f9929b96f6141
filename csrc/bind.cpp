// bind.cpp - Python <-> C++. Nothing is computed here: arguments become plain structs, errors become sentences.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "sgd_step.h"

namespace nk {
namespace {

// [p.grad for p in params] and [state.get(p, {}).get(key) for p in params], at the speed of C: a state whose keys come
// in the order of the parameters, as it does after the first step, is read without hashing a tensor.
constexpr Py_ssize_t kWorthWalking = 8;

py::tuple gather(const py::list& params, const py::object& state, const py::str& key) {
  static PyObject* const grad_name = PyUnicode_InternFromString("grad");
  const Py_ssize_t n = (Py_ssize_t)params.size();
  py::list grads(n), values(n), missing;
  PyObject *walk_key = nullptr, *walk_value = nullptr;
  Py_ssize_t at = 0;
  const bool is_dict = PyDict_Check(state.ptr());
  const auto next = [&] { return is_dict && PyDict_Next(state.ptr(), &at, &walk_key, &walk_value); };
  bool walking = next();
  for (Py_ssize_t i = 0; i < n; i++) {
    PyObject* p = PyList_GET_ITEM(params.ptr(), i);
    const bool plain = Py_TYPE(p) == torch.tensor || Py_TYPE(p) == torch.parameter;
    PyObject* grad = plain ? Py_TYPE(torch.grad)->tp_descr_get(torch.grad, p, nullptr) : PyObject_GetAttr(p, grad_name);
    if (!grad) throw py::error_already_set();
    PyList_SET_ITEM(grads.ptr(), i, grad);

    PyObject* value = nullptr;
    if (!state.is_none()) {
      PyObject* entry = nullptr;
      if (i == 0 && n >= kWorthWalking)  // another group's parameters come first
        while (walking && walk_key != p) walking = next();
      if (walking && walk_key == p) {
        entry = walk_value;
        walking = next();
      } else if (is_dict) {
        entry = PyDict_GetItemWithError(state.ptr(), p);
        if (!entry && PyErr_Occurred()) throw py::error_already_set();
      }
      if (entry && PyDict_Check(entry)) value = PyDict_GetItemWithError(entry, key.ptr());
      if (!value && PyErr_Occurred()) throw py::error_already_set();
      if ((!value || value == Py_None) && grad != Py_None) missing.append(i);
    }
    if (!value) value = Py_None;
    Py_INCREF(value);
    PyList_SET_ITEM(values.ptr(), i, value);
  }
  return py::make_tuple(grads, values, missing);
}

void connect(const py::object& exchange_api, uintptr_t parallel_for, const py::type& tensor,
             const py::type& parameter) {
  auto* api = static_cast<const DLPackExchangeAPI*>(PyCapsule_GetPointer(exchange_api.ptr(), "dlpack_exchange_api"));
  if (!api) throw py::error_already_set();
  if (api->header.version.major != 1)
    throw std::runtime_error("this build of normkern reads DLPack 1.x, but torch speaks version " +
                             std::to_string(api->header.version.major));
  torch.exchange = api;
  torch.tensor = reinterpret_cast<PyTypeObject*>(tensor.ptr());
  torch.parameter = reinterpret_cast<PyTypeObject*>(parameter.ptr());
  torch.grad = py::object(tensor.attr("grad")).release().ptr();
  torch.is_neg = py::object(tensor.attr("is_neg")).release().ptr();  // held for the life of the process
  cpu::set_parallel_for(reinterpret_cast<cpu::ParallelFor>(parallel_for));
}

std::vector<std::string> supported_isas() {
  const char* names[8];
  const int n = cpu::supported(names, 8);
  return {names, names + n};
}

}  // namespace
}  // namespace nk

PYBIND11_MODULE(_C, m) {
  using namespace nk;
  using namespace py::literals;
  m.def("connect", connect, "exchange_api"_a, "parallel_for"_a, "tensor"_a, "parameter"_a);
  m.def("isa", cpu::isa);
  m.def("supported_isas", supported_isas);
  m.def("select_isa", [](const std::string& name) { return cpu::select_isa(name.c_str()); }, "name"_a);
  m.def("describe", [](const py::object& o) { return describe(o.ptr()); }, "tensor"_a);
  m.def("kernel_takes", [](const py::object& o) { return view(o.ptr()).has_value(); }, "tensor"_a);
  m.def(
      "slot_count", [](const py::object& o, int stats) { return slot_count(o.ptr(), Stats(stats)); }, "param"_a,
      "stats"_a);
  m.def("gather", gather, "params"_a, "state"_a, "key"_a);
  m.attr("CHUNK") = kChunk;

  py::class_<SgdStep>(m, "SgdStep")
      .def(py::init<>())
      .def("begin", &SgdStep::begin)
      .def(
          "add",
          [](SgdStep& self, const py::list& params, const py::list& grads, const py::object& momentum_buffers,
             const py::object& first, double lr, double momentum, double dampening, double weight_decay, bool nesterov,
             bool maximize, double inverse_scale, int stats, int group, const py::object& slots) {
            return self.add(params, grads, momentum_buffers, first,
                            {lr, momentum, dampening, weight_decay, inverse_scale, maximize}, nesterov, Stats(stats),
                            group, slots);
          },
          "params"_a, "grads"_a, "momentum_buffers"_a, "first"_a, "lr"_a, "momentum"_a, "dampening"_a, "weight_decay"_a,
          "nesterov"_a, "maximize"_a, "inverse_scale"_a, "stats"_a, "group"_a, "slots"_a)
      .def("check", &SgdStep::check)
      .def("run", &SgdStep::run, "table"_a)
      .def_property_readonly("slots", &SgdStep::slots)
      .def_property_readonly("slot_offsets", &SgdStep::slot_offsets);
}
