// bind.cpp - Python <-> C++. Nothing is computed here: arguments become plain structs, errors become sentences.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "clip.h"
#include "gather.h"
#include "given_hyper.h"
#include "moments.h"
#include "pass.h"
#include "per_sample.h"

namespace nk {
namespace {

void connect(const py::object& exchange_api, uintptr_t parallel_for, const py::type& tensor, const py::type& parameter,
             const py::dict& shim, int64_t shim_offset) {
  auto* api = static_cast<const DLPackExchangeAPI*>(PyCapsule_GetPointer(exchange_api.ptr(), "dlpack_exchange_api"));
  if (!api) throw py::error_already_set();
  if (api->header.version.major != 1)
    throw std::runtime_error("this build of normkern reads DLPack 1.x, but torch has version " +
                             std::to_string(api->header.version.major));
  torch.exchange = api;
  torch.tensor = reinterpret_cast<PyTypeObject*>(tensor.ptr());
  torch.parameter = reinterpret_cast<PyTypeObject*>(parameter.ptr());
  torch.grad = py::object(tensor.attr("grad")).release().ptr();
  torch.is_neg = py::object(tensor.attr("is_neg")).release().ptr();  // held for the life of the process
  torch.shim.connect(shim.cast<std::map<std::string, uintptr_t>>(), shim_offset);
  cpu::set_parallel_for(reinterpret_cast<cpu::ParallelFor>(parallel_for));
}

using GaugeNumbers = std::tuple<double, double, int64_t>;

GaugeNumbers numbers(const Gauge& gauge) { return {gauge.scale, gauge.z, gauge.exponent}; }

std::optional<GaugeStep> take_gauge_step(const GaugeNumbers& gauge, double lr, double momentum, double dampening,
                                         double weight_decay, bool nesterov, int buffers, bool leave) {
  const Gauge from{std::get<0>(gauge), std::get<1>(gauge), std::get<2>(gauge)};
  if (!(from.scale > 0.5 && from.scale < 2))
    throw py::value_error("gauge_step: gauge expected a scale from sqrt(1/2) to sqrt(2), got " +
                          std::string(py::str(py::float_(from.scale))));
  const Schedule schedule{lr, momentum, dampening, weight_decay, nesterov};
  if (leave) return gauge_leave(from, schedule, Buffers(buffers));
  GaugeStep step;
  if (!gauge_step(from, schedule, Buffers(buffers), step)) return std::nullopt;
  return step;
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
  m.def("connect", connect, "exchange_api"_a, "parallel_for"_a, "tensor"_a, "parameter"_a, "shim"_a, "shim_offset"_a);
  m.def("isa", cpu::isa);
  m.def("supported_isas", supported_isas);
  m.def("select_isa", [](const std::string& name) { return cpu::select_isa(name.c_str()); }, "name"_a);
  m.def("describe", [](const py::object& o) { return describe(o.ptr()); }, "tensor"_a);
  m.def("shared_pair", [](int group, int index) { return shared_pair(kOps[0], group, index); }, "group"_a, "index"_a);
  m.def("kernel_takes", [](const py::object& o) { return view(o.ptr()).has_value(); }, "tensor"_a);
  m.def(
      "slot_count", [](const py::object& o, int stats) { return slot_count(o.ptr(), Stats(stats)); }, "param"_a,
      "stats"_a);
  m.def(
      "device_index",
      [](const py::object& o) {
        const auto v = view(o.ptr());
        return v ? std::optional<int>(v->device) : std::nullopt;
      },
      "tensor"_a);
  m.def("cuda_architectures", architectures);
  m.def("gather", Gather::lists, "params"_a, "state"_a, "keys"_a);
  m.attr("CHUNK") = kChunk;
  m.def("outer_shape", outer_shape, "a"_a, "g"_a);
  m.def(
      "outer_moments",
      [](const py::object& a, const py::object& g, const py::object& total, const py::object& centred,
         const py::object& sq_norms,
         const py::object& new_scratch) { outer_moments(a, g, {total, centred, sq_norms, new_scratch}); },
      "a"_a, "g"_a, "total"_a, "centred"_a, "sq_norms"_a, "new_scratch"_a = py::none());
  py::class_<ConvNumbers>(m, "ConvNumbers")
      .def(py::init<py::object, py::object, py::object, py::object, int64_t>(), "kernel_size"_a, "stride"_a,
           "padding"_a, "dilation"_a, "groups"_a);
  m.def("conv_shape", conv_shape, "x"_a, "g"_a, "numbers"_a);
  m.def(
      "conv_moments",
      [](const py::object& x, const py::object& g, const ConvNumbers& numbers, const py::object& total,
         const py::object& centred, const py::object& sq_norms,
         const py::object& new_scratch) { conv_moments(x, g, numbers, {total, centred, sq_norms, new_scratch}); },
      "x"_a, "g"_a, "numbers"_a, "total"_a, "centred"_a, "sq_norms"_a, "new_scratch"_a = py::none());

  m.def("moments", moments, "samples"_a, "means"_a, "centred"_a, "factor"_a, "row_sq"_a, "totals"_a, "new_scratch"_a);
  m.def("row_sums", row_sums, "x"_a, "squares"_a, "out"_a, "new_scratch"_a);
  m.def("recentre", recentre, "raw"_a, "total"_a, "share"_a, "least"_a);
  m.def("norm_sums", norm_sums, "g"_a, "x"_a, "mean"_a, "rstd"_a, "along_rows"_a, "of_weight"_a, "of_bias"_a);
  m.def("embedding_moments", embedding_moments, "ids"_a, "order"_a, "begin"_a, "g"_a, "padding"_a, "total"_a,
        "centred"_a, "row_sq"_a, "new_scratch"_a);

  m.def("most_decay", most_decay, "momentum"_a);
  py::class_<GaugeStep>(m, "GaugeStep")
      .def_readonly("keep", &GaugeStep::keep)
      .def_readonly("unkeep", &GaugeStep::unkeep)
      .def_readonly("momentum", &GaugeStep::momentum)
      .def_readonly("grad_to_buffer", &GaugeStep::grad_to_buffer)
      .def_readonly("weight_to_buffer", &GaugeStep::weight_to_buffer)
      .def_readonly("grad_to_weight", &GaugeStep::grad_to_weight)
      .def_readonly("buffer_to_weight", &GaugeStep::buffer_to_weight)
      .def_readonly("has_buffer", &GaugeStep::has_buffer)
      .def_readonly("shift", &GaugeStep::shift)
      .def_readonly("scale", &GaugeStep::scale)
      .def_readonly("moved", &GaugeStep::moved)
      .def_readonly("drift", &GaugeStep::drift)
      .def_property_readonly("before", [](const GaugeStep& step) { return numbers(step.before); })
      .def_property_readonly("next", [](const GaugeStep& step) { return numbers(step.next); });
  m.def("gauge_step", take_gauge_step, "gauge"_a, "lr"_a, "momentum"_a, "dampening"_a, "weight_decay"_a, "nesterov"_a,
        "buffers"_a, "leave"_a);

  m.def("clip_coef",
        py::overload_cast<const py::object&, double, const py::object&, const py::object&, const py::object&>(
            nk::clip_coef),
        "sq_norms"_a, "max_norm"_a, "norm"_a, "coef"_a, "found_inf"_a = py::none());
  py::class_<LrMultipliers>(m, "LrMultipliers")
      .def(py::init<py::object, int64_t, std::string>(), "given"_a, "count"_a, "where"_a)
      .def("only", &LrMultipliers::only, "index"_a)
      .def("value", &LrMultipliers::value, "index"_a);

  {
    py::options options;
    options.disable_function_signatures();
    // Its metaclass is plain `type`, which calls tp_vectorcall: a bare op makes one at every call.
    py::class_<GivenHyper> hyper(m, "Hyper", py::metaclass(reinterpret_cast<PyObject*>(&PyType_Type)));
    hyper.def(py::init<py::kwargs>(), GivenHyper::signature().c_str());
    reinterpret_cast<PyTypeObject*>(hyper.ptr())->tp_vectorcall = GivenHyper::call;
  }
  py::class_<Pass>(m, "Pass")
      .def(py::init<>())
      .def("begin", &Pass::begin)
      .def_readonly("hypers", &Pass::hypers)
      .def(
          "add",
          [](Pass& self, const std::string& op, const py::list& params, const py::list& grads,
             const py::object& buffers, const py::object& first, const GivenHyper& hyper, int stats, int group,
             const py::object& slots, const py::object& held, const py::object& masters,
             const LrMultipliers* lr_multipliers, std::optional<int64_t> row, uint32_t first_parameter,
             const py::object& counts, const py::object& radii) {
            return self.add(op, {params, grads, buffers, first, held, masters, slots, counts, radii},
                            {hyper, Stats(stats), group, lr_multipliers, row, first_parameter});
          },
          "op"_a, "params"_a, "grads"_a, "buffers"_a, "first"_a, "hyper"_a, "stats"_a = 0, "group"_a = kNoGroup,
          "slots"_a = py::none(), "held"_a = py::none(), "masters"_a = py::none(), "lr_multipliers"_a = py::none(),
          "row"_a = py::none(), "first_parameter"_a = 0, "counts"_a = py::none(), "radii"_a = py::none())
      .def(
          "add_whole",
          [](Pass& self, const std::string& op, const py::list& params, const py::object& state, const py::tuple& keys,
             const GivenHyper& hyper, int stats, int group, const LrMultipliers* lr_multipliers,
             uint32_t first_parameter, const py::object& held) {
            return self.add_whole(op, params, state, keys,
                                  {hyper, Stats(stats), group, lr_multipliers, std::nullopt, first_parameter}, held);
          },
          "op"_a, "params"_a, "state"_a, "keys"_a, "hyper"_a, "stats"_a = 0, "group"_a = kNoGroup,
          "lr_multipliers"_a = py::none(), "first_parameter"_a = 0, "held"_a = py::none())
      .def("check", &Pass::check, "last"_a)
      .def("sq_norms", &Pass::sq_norms, "table"_a, "new_scratch"_a)
      .def("clip", &Pass::clip, "coefs"_a)
      .def("run", &Pass::run, "table"_a, "scratch"_a = py::none())
      .def_property_readonly("like", &Pass::like)
      .def_property_readonly("scratch_rows", &Pass::scratch_rows)
      .def_property_readonly("devices", &Pass::devices)
      .def_property_readonly("places", &Pass::places)
      .def_property_readonly("parameters", &Pass::parameters)
      .def_property_readonly("slots", &Pass::slots)
      .def_property_readonly("columns", &Pass::columns)
      .def_property_readonly("slot_offsets", &Pass::slot_offsets);
}
