// bind.cpp - Python <-> C++. Nothing is computed here: arguments become plain structs, errors become sentences.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "clip.h"
#include "gather.h"
#include "moments.h"
#include "outer.h"
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

// Numbers that lie on a device, None where there is none: lr, weight_decay, grad_scale, found_inf.
struct OnDevice {
  DeviceNumbers numbers;
  std::optional<int> device;
};
OnDevice on_device(const py::object& given, int group) {
  OnDevice all;
  if (given.is_none()) return all;
  const auto tensors = given.cast<py::tuple>();
  const auto take = [&](size_t i, const char* name, bool may_be_double) -> std::optional<View> {
    const py::object entry = tensors[i];
    if (entry.is_none()) return {};
    const auto v = view(entry.ptr());
    const bool fits = v && v->numel == 1 && (v->dtype == DType::f32 || (may_be_double && v->dtype == DType::f64));
    if (!fits || v->device == kCpu || (all.device && *all.device != v->device))
      throw py::value_error(where(group) + ": " + name + " on a device expected one float32" +
                            (may_be_double ? " or float64" : "") + " number beside the others, got " +
                            (v ? shape_text(*v) + " " : "") + describe(entry.ptr()));
    all.device = v->device;
    return v;
  };
  DeviceNumbers& n = all.numbers;
  if (const auto v = take(0, "lr", true)) n.lr = v->data, n.lr_is_double = v->dtype == DType::f64;
  if (const auto v = take(1, "weight_decay", true))
    n.weight_decay = v->data, n.weight_decay_is_double = v->dtype == DType::f64;
  if (const auto v = take(2, "grad_scale", false)) n.grad_scale = static_cast<const float*>(v->data);
  if (const auto v = take(3, "found_inf", false)) n.found_inf = static_cast<const float*>(v->data);
  return all;
}

// How what a step writes is stored: the dtype of buffers, a position in the list of them; (seed, steps so far) of
// rounding at random; the first parameter's index in the optimizer.
using Precision = std::optional<std::tuple<std::optional<int>, std::optional<std::pair<uint64_t, uint32_t>>, uint32_t>>;

// A group of a step: by its own numbers, or by those of its gauge.
Pass::Group step_group(Pass& pass, Hyper hyper, bool nesterov, Stats stats, int index, const GaugeStep* gauge,
                       const py::object& on_device, const LrMultipliers* lr_multipliers, const Precision& precision,
                       std::optional<int64_t> row = std::nullopt) {
  const OnDevice given = nk::on_device(on_device, index);
  if (given.device) pass.hold(on_device);
  hyper.on_device = given.numbers;
  Rule rule = step_rule(hyper.momentum, nesterov);
  if (gauge) {
    hyper.gauge = *gauge;
    rule = gauge->has_buffer ? Rule::gauged_momentum : Rule::gauged;
  }
  Pass::Group group{hyper, rule, stats, index, given.device, lr_multipliers, row, true};
  if (precision) {
    const auto& [state_dtype, rounding, first] = *precision;
    if (state_dtype) group.state_dtype = DType(*state_dtype);
    if (rounding) group.hyper.rounding = {true, rounding->first, rounding->second};
    group.first_parameter = first;
  }
  return group;
}

Hyper with_l(double l) { return {0, 0, 0, 0, 1, false, 1, l, 0}; }

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
  m.def(
      "device_index",
      [](const py::object& o) {
        const auto v = view(o.ptr());
        return v ? std::optional<int>(v->device) : std::nullopt;
      },
      "tensor"_a);
  m.def("cuda_architectures", architectures);
  m.def("gather", Gather::lists, "params"_a, "state"_a, "key"_a);
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

  py::class_<Pass>(m, "Pass")
      .def(py::init<>())
      .def("begin", &Pass::begin)
      .def(
          "add",
          [](Pass& self, const py::list& params, const py::list& grads, const py::object& momentum_buffers,
             const py::object& first, double lr, double momentum, double dampening, double weight_decay, bool nesterov,
             bool maximize, double inverse_scale, int stats, int group, const py::object& slots, const py::object& held,
             double second_inverse_scale, double l, const GaugeStep* gauge, const py::object& on_device,
             const LrMultipliers* lr_multipliers, std::optional<int64_t> row, const Precision& precision,
             const py::object& masters) {
            const Hyper hyper{lr, momentum, dampening, weight_decay, inverse_scale, maximize, second_inverse_scale,
                              l,  0};
            return self.add(params, grads, momentum_buffers, first,
                            step_group(self, hyper, nesterov, Stats(stats), group, gauge, on_device, lr_multipliers,
                                       precision, row),
                            slots, held, masters);
          },
          "params"_a, "grads"_a, "momentum_buffers"_a, "first"_a, "lr"_a, "momentum"_a, "dampening"_a, "weight_decay"_a,
          "nesterov"_a, "maximize"_a, "inverse_scale"_a, "stats"_a, "group"_a, "slots"_a, "held"_a = py::none(),
          "second_inverse_scale"_a = 1.0, "l"_a = 1.0, "gauge"_a = py::none(), "on_device"_a = py::none(),
          "lr_multipliers"_a = py::none(), "row"_a = py::none(), "precision"_a = py::none(), "masters"_a = py::none())
      .def(
          "add_whole",
          [](Pass& self, const py::list& params, const py::object& state, const py::str& key, double lr,
             double momentum, double dampening, double weight_decay, bool nesterov, bool maximize, double inverse_scale,
             int stats, int group, const GaugeStep* gauge, const py::object& on_device,
             const LrMultipliers* lr_multipliers, const Precision& precision) {
            const Hyper hyper{lr, momentum, dampening, weight_decay, inverse_scale, maximize, 1, 1, 0};
            return self.add_whole(
                params, state, key,
                step_group(self, hyper, nesterov, Stats(stats), group, gauge, on_device, lr_multipliers, precision),
                gauge != nullptr);
          },
          "params"_a, "state"_a, "key"_a, "lr"_a, "momentum"_a, "dampening"_a, "weight_decay"_a, "nesterov"_a,
          "maximize"_a, "inverse_scale"_a, "stats"_a, "group"_a, "gauge"_a = py::none(), "on_device"_a = py::none(),
          "lr_multipliers"_a = py::none(), "precision"_a = py::none())
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
      .def(
          "add_gradients",
          [](Pass& self, const py::list& grads, const py::object& held, double inverse_scale,
             double second_inverse_scale, double l) {
            Hyper hyper = with_l(l);
            hyper.inverse_scale = inverse_scale;
            hyper.second_inverse_scale = second_inverse_scale;
            return self.add(grads, grads, py::none(), py::none(), {hyper, Rule::difference, Stats::none, -5},
                            py::none(), held);
          },
          "grads"_a, "held"_a, "inverse_scale"_a, "second_inverse_scale"_a, "l"_a)
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
