// clip.cpp - what a step that clips its gradients by their norm does before it runs; see pass.h.
#include "clip.h"

#include <algorithm>
#include <cmath>
#include <tuple>

#include "launch.h"

namespace nk {
namespace {

int64_t parts_of(const View& g) { return g.device == kCpu ? (g.numel + kChunk - 1) / kChunk : cuda::parts(g.numel); }

// The only number of float64 that a tensor has, wherever it is.
View number(const char* op, const char* name, py::handle tensor) {
  const auto v = view(tensor.ptr());
  if (!v || v->dtype != DType::f64 || v->numel != 1)
    throw py::value_error(std::string(op) + ": " + name + " expected one number of float64, got " +
                          (v ? shape_text(*v) + " " : "") + describe(tensor.ptr()));
  return *v;
}

}  // namespace

void Pass::sq_norms(const py::object& table, const py::object& new_scratch) {
  const auto to = view(table.ptr());
  if (!to || to->dtype != DType::f64 || !to->dense || to->numel != parameters_)
    throw py::value_error("Pass.sq_norms: expected a dense float64 table of " + std::to_string(parameters_) + ", got " +
                          (to ? shape_text(*to) + " " : "") + describe(table.ptr()));
  const bool here = to->device == kCpu;
  int64_t coordinates = 0, parts = 0;
  for (const Operands& t : operands_) {
    if (t.w.device != to->device || t.w.numel == 0) continue;
    coordinates += t.w.numel;
    parts += parts_of(t.g);
  }
  Call call("Pass.sq_norms");
  call.take("table", table);
  double* sums = nullptr;
  if (here) {
    partials_.assign(parts, 0.0);
    sums = partials_.data();
  } else {
    sums = call.scratch(new_scratch, parts);
  }
  double* const out = static_cast<double*>(to->data);
  chunks_.clear();
  strided_.clear();
  strided_.reserve(operands_.size());
  slot_parts_.clear();
  for (size_t i = 0; i < operands_.size(); i++) {
    const Operands& t = operands_[i];
    const Job& job = jobs_[i];
    if (t.w.device != to->device || t.w.numel == 0) continue;
    const bool dense = t.g.dense && (!t.has_h || (t.h.dense && same_strides(t.g, t.h)));
    const Strided* strided = nullptr;
    if (!dense) {
      strided_.push_back({t.g.ndim, t.g.shape, t.g.strides, t.g.strides, {}, t.has_h ? t.h.strides : nullptr, nullptr});
      strided = &strided_.back();
    }
    const int64_t parts = parts_of(t.g), size = here ? kChunk : t.g.numel;
    for (int64_t begin = 0; begin < t.g.numel; begin += size) {
      const int64_t offset = dense ? begin * t.g.item() : 0;
      Chunk c{};
      c.g = static_cast<const char*>(t.g.data) + offset;
      c.h = t.has_h ? static_cast<const char*>(t.h.data) + offset : nullptr;
      c.strided = strided, c.begin = begin, c.size = std::min(size, t.g.numel - begin), c.slot_size = size;
      c.sums = sums + begin / kChunk, c.columns = 1;
      c.hyper = &hypers_[job.hyper], c.rule = job.rule, c.dtype = t.g.dtype;
      chunks_.push_back(c);
    }
    slot_parts_.push_back({out + job.row, sums, 1, parts, 1});
    sums += parts;
  }
  call.run(
      coordinates > kReleaseGil,
      [&] {
        cpu::sq_norms(chunks_.data(), (int64_t)chunks_.size(), coordinates);
        // In the order of the chunks, whichever thread computed them.
        for (const cuda::SlotParts& p : slot_parts_)
          for (int64_t part = 0; part < p.parts; part++) *p.out += p.parts_of_first[part];
      },
      [&](const cuda::Queue& queue) -> const char* {
        const auto kind = [](const Chunk& c) {
          return std::make_tuple(c.strided != nullptr, c.hyper, traits_of(c.rule).is_gauged, c.dtype, c.h != nullptr);
        };
        std::stable_sort(chunks_.begin(), chunks_.end(),
                         [&](const Chunk& a, const Chunk& b) { return kind(a) < kind(b); });
        if (const char* error = cuda_kernels->sq_norms(chunks_.data(), (int64_t)chunks_.size(), queue)) return error;
        return cuda_kernels->add_parts(slot_parts_.data(), (int64_t)slot_parts_.size(), 1, nullptr, queue);
      });
}

void Pass::clip(const py::list& coefs) {
  for (py::handle coef : coefs) {
    clip_coefs_.push_back(number("sgd_", "clip_coef", coef));
    owned_.push_back(py::reinterpret_borrow<py::object>(coef));
  }
  for (int device : devices())
    if (!clip_coef_on(device))
      throw py::value_error("sgd_: clip_coef expected a number on each device of the parameters, got none on " +
                            std::to_string(device));
}

const double* Pass::clip_coef_on(int device) const {
  for (const View& coef : clip_coefs_)
    if (coef.device == device) return static_cast<const double*>(coef.data);
  return nullptr;
}

void Pass::clip_on(int device) {
  for (Hyper& hyper : hypers_) hyper.on_device.clip_coef = clip_coef_on(device);
}

void clip_coef(const py::object& sq_norms, double max_norm, const py::object& norm, const py::object& coef,
               const py::object& found_inf) {
  Call call("clip_coef");
  const View all = call.take("sq_norms", sq_norms);
  if (all.dtype != DType::f64 || !all.dense)
    throw py::value_error("clip_coef: sq_norms expected dense float64, got " + describe(sq_norms.ptr()));
  double* const to_norm = static_cast<double*>(number("clip_coef", "norm", norm).data);
  double* const to_coef = static_cast<double*>(number("clip_coef", "coef", coef).data);
  call.take("norm", norm), call.take("coef", coef);
  const float* found = nullptr;
  if (!found_inf.is_none()) {
    const View f = call.take("found_inf", found_inf);
    if (f.dtype != DType::f32 || f.numel != 1 || f.device == kCpu)
      throw py::value_error("clip_coef: found_inf expected one float32 number on a device, got " + shape_text(f) + " " +
                            describe(found_inf.ptr()));
    found = static_cast<const float*>(f.data);
  }
  call.run(
      false,
      [&] {
        double sum = 0;
        for (int64_t i = 0; i < all.numel; i++) sum += static_cast<const double*>(all.data)[i];
        *to_norm = std::sqrt(sum);
        *to_coef = clip_coef(*to_norm, max_norm);
      },
      [&](const cuda::Queue& queue) {
        return cuda_kernels->clip_coef(static_cast<const double*>(all.data), all.numel, max_norm, to_norm, to_coef,
                                       found, queue);
      });
}

}  // namespace nk
