// bind.cpp - Python <-> C++. Nothing is computed here: arguments become plain structs, errors become sentences.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "gather.h"
#include "pass.h"

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

Rule step_rule(double momentum, bool nesterov) {
  return momentum == 0 ? Rule::plain : nesterov ? Rule::nesterov : Rule::momentum;
}

Hyper with_l(double l) { return {0, 0, 0, 0, 1, false, 1, l, 0}; }

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
  m.def("shared_pair", shared_pair, "group"_a, "index"_a);
  m.def("kernel_takes", [](const py::object& o) { return view(o.ptr()).has_value(); }, "tensor"_a);
  m.def(
      "slot_count", [](const py::object& o, int stats) { return slot_count(o.ptr(), Stats(stats)); }, "param"_a,
      "stats"_a);
  m.def("gather", Gather::lists, "params"_a, "state"_a, "key"_a);
  m.attr("CHUNK") = kChunk;

  py::class_<Pass>(m, "Pass")
      .def(py::init<>())
      .def("begin", &Pass::begin)
      .def(
          "add",
          [](Pass& self, const py::list& params, const py::list& grads, const py::object& momentum_buffers,
             const py::object& first, double lr, double momentum, double dampening, double weight_decay, bool nesterov,
             bool maximize, double inverse_scale, int stats, int group, const py::object& slots, const py::object& held,
             double second_inverse_scale, double l) {
            const Hyper hyper{lr, momentum, dampening, weight_decay, inverse_scale, maximize, second_inverse_scale,
                              l,  0};
            return self.add(params, grads, momentum_buffers, first,
                            {hyper, step_rule(momentum, nesterov), Stats(stats), group}, slots, held);
          },
          "params"_a, "grads"_a, "momentum_buffers"_a, "first"_a, "lr"_a, "momentum"_a, "dampening"_a, "weight_decay"_a,
          "nesterov"_a, "maximize"_a, "inverse_scale"_a, "stats"_a, "group"_a, "slots"_a, "held"_a = py::none(),
          "second_inverse_scale"_a = 1.0, "l"_a = 1.0)
      .def(
          "add_whole",
          [](Pass& self, const py::list& params, const py::object& state, const py::str& key, double lr,
             double momentum, double dampening, double weight_decay, bool nesterov, bool maximize, double inverse_scale,
             int stats, int group) {
            const Hyper hyper{lr, momentum, dampening, weight_decay, inverse_scale, maximize, 1, 1, 0};
            return self.add_whole(params, state, key, {hyper, step_rule(momentum, nesterov), Stats(stats), group});
          },
          "params"_a, "state"_a, "key"_a, "lr"_a, "momentum"_a, "dampening"_a, "weight_decay"_a, "nesterov"_a,
          "maximize"_a, "inverse_scale"_a, "stats"_a, "group"_a)
      .def(
          "add_svag_combine",
          [](Pass& self, const py::list& a, const py::list& b, double l) {
            return self.add(a, b, py::none(), py::none(), {with_l(l), Rule::svag_combine, Stats::none, -2}, py::none(),
                            py::none());
          },
          "grads_a"_a, "grads_b"_a, "l"_a)
      .def(
          "add_difference",
          [](Pass& self, const py::list& a, const py::list& b, int stats) {
            return self.add(a, b, py::none(), py::none(), {with_l(1), Rule::difference, Stats(stats), -3}, py::none(),
                            py::none());
          },
          "grads_a"_a, "grads_b"_a, "stats"_a)
      .def(
          "add_welford",
          [](Pass& self, const py::list& means, const py::list& samples, const py::list& squares, double share,
             int stats) {
            Hyper hyper = with_l(1);
            hyper.share = share;
            return self.add(means, samples, squares, py::none(), {hyper, Rule::welford, Stats(stats), -4}, py::none(),
                            py::none());
          },
          "means"_a, "samples"_a, "squares"_a, "share"_a, "stats"_a)
      .def("check", &Pass::check, "last"_a)
      .def("run", &Pass::run, "table"_a)
      .def_property_readonly("slots", &Pass::slots)
      .def_property_readonly("columns", &Pass::columns)
      .def_property_readonly("slot_offsets", &Pass::slot_offsets);
}
