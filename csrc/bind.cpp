// bind.cpp - Python <-> C++. Nothing is computed here: arguments become plain structs, errors become sentences.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "gather.h"
#include "sgd_step.h"

namespace nk {
namespace {

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
  m.def("gather", Gather::lists, "params"_a, "state"_a, "key"_a);
  m.attr("CHUNK") = kChunk;

  py::class_<SgdStep>(m, "SgdStep")
      .def(py::init<>())
      .def("begin", &SgdStep::begin)
      .def(
          "add",
          [](SgdStep& self, const py::list& params, const py::list& grads, const py::object& momentum_buffers,
             const py::object& first, double lr, double momentum, double dampening, double weight_decay, bool nesterov,
             bool maximize, double inverse_scale, int stats, int group, const py::object& slots) {
            return self.add(
                params, grads, momentum_buffers, first,
                {{lr, momentum, dampening, weight_decay, inverse_scale, maximize}, nesterov, Stats(stats), group},
                slots);
          },
          "params"_a, "grads"_a, "momentum_buffers"_a, "first"_a, "lr"_a, "momentum"_a, "dampening"_a, "weight_decay"_a,
          "nesterov"_a, "maximize"_a, "inverse_scale"_a, "stats"_a, "group"_a, "slots"_a)
      .def(
          "add_whole",
          [](SgdStep& self, const py::list& params, const py::object& state, const py::str& key, double lr,
             double momentum, double dampening, double weight_decay, bool nesterov, bool maximize, double inverse_scale,
             int stats, int group) {
            return self.add_whole(
                params, state, key,
                {{lr, momentum, dampening, weight_decay, inverse_scale, maximize}, nesterov, Stats(stats), group});
          },
          "params"_a, "state"_a, "key"_a, "lr"_a, "momentum"_a, "dampening"_a, "weight_decay"_a, "nesterov"_a,
          "maximize"_a, "inverse_scale"_a, "stats"_a, "group"_a)
      .def("check", &SgdStep::check, "last"_a)
      .def("run", &SgdStep::run, "table"_a)
      .def_property_readonly("slots", &SgdStep::slots)
      .def_property_readonly("slot_offsets", &SgdStep::slot_offsets);
}
