// sgd_step.cpp - see sgd_step.h.
#include "sgd_step.h"

#include <algorithm>
#include <limits>
#include <utility>

#include <pybind11/stl.h>

namespace nk {
namespace {

// Work worth letting other Python threads run for.
constexpr int64_t kReleaseGil = 16384;

PyObject* item(const py::list& list, Py_ssize_t i) { return PyList_GET_ITEM(list.ptr(), i); }

[[noreturn]] void refuse_shape(int group, const char* list, int i, const View& got, const View& expected) {
  throw py::value_error(where(group) + ": " + list + "[" + std::to_string(i) + "] has shape " + shape_text(got) +
                        " but params[" + std::to_string(i) + "] has shape " + shape_text(expected));
}

void check_length(int group, const char* list, size_t got, size_t expected) {
  if (got != expected)
    throw py::value_error(where(group) + ": " + list + " has " + std::to_string(got) + " entries but params has " +
                          std::to_string(expected));
}

bool rows_are_contiguous(const View& w) {
  return w.ndim < 2 || w.shape[0] == 1 || w.numel == 0 || w.strides[0] == w.numel / w.shape[0];
}

int64_t pieces(int64_t coordinates) { return (coordinates + kChunk - 1) / kChunk; }

}  // namespace

int64_t slot_count(PyObject* param, Stats stats) {
  if (stats != Stats::row) return stats == Stats::none ? 0 : 1;
  if (const auto v = view(param)) return v->rows();
  try {
    const py::tuple shape = py::handle(param).attr("shape");
    return shape.size() >= 2 ? shape[0].cast<int64_t>() : 1;
  } catch (py::error_already_set&) {
    return 1;  // a lazy module's parameter has no shape before the first forward
  }
}

void SgdStep::begin() {
  operands_.clear();
  jobs_.clear();
  hypers_.clear();
  owned_.clear();
  written_ = py::list();
  slot_offsets_.clear();
  slots_ = 0;
  reading_ = 0;
}

std::optional<View> SgdStep::read(PyObject* object) {
  if (reading_ == places_.size()) places_.push_back({nullptr, nullptr, 0});
  Place& place = places_[reading_++];
  const auto v = view(object, place.object == object ? place.data : nullptr);
  const Place now = v ? Place{object, v->data, v->dense ? v->numel : -1} : Place{nullptr, nullptr, 0};
  moved_ = moved_ || place.object != object || place.data != now.data || place.extent != now.extent || now.extent < 0;
  place = now;
  return v;
}

std::vector<int> SgdStep::add(const py::list& params, const py::list& grads, const py::object& momentum_buffers,
                              const py::object& first, const SgdHyper& hyper, bool nesterov, Stats stats, int group,
                              const py::object& slots) {
  const int n = (int)params.size();
  const bool has_v = hyper.momentum != 0;
  check_length(group, "grads", grads.size(), n);
  py::list buffers;
  if (has_v) {
    if (momentum_buffers.is_none())
      throw py::value_error(where(group) + ": momentum is not 0, expected momentum_buffers, got None");
    buffers = momentum_buffers.cast<py::list>();
    check_length(group, "momentum_buffers", buffers.size(), n);
  }
  std::vector<bool> is_first(n, false);
  if (!first.is_none())
    for (py::handle i : first) is_first.at(i.cast<int>()) = true;

  hypers_.push_back(hyper);
  owned_.push_back(grads);
  std::vector<int> refused;
  for (int i = 0; i < n; i++) {
    Job job{(int)hypers_.size() - 1, SgdRule::plain, slots_, 0, stats == Stats::row};
    const bool stepped = item(grads, i) != Py_None;
    std::optional<View> w;
    if (stepped) w = read(item(params, i));
    if (stats != Stats::none) {
      job.slot_count = w ? (stats == Stats::row ? w->rows() : 1) : slot_count(item(params, i), stats);
      if (slots.is_none()) {
        slot_offsets_.push_back(slots_);
        slots_ += job.slot_count;
      } else {
        job.slot = py::list(slots)[i].cast<int64_t>();
      }
    }
    if (!stepped) continue;
    if (!w) {
      refused.push_back(i);
      continue;
    }
    const auto g = read(item(grads, i));
    if (!g || g->dtype != w->dtype) {
      refused.push_back(i);
      continue;
    }
    if (!same_shape(*g, *w)) refuse_shape(group, "grads", i, *g, *w);
    check_no_self_overlap(*w, "params", i, group);

    Operands t{*w, *g, *w, has_v, i, group, false};
    if (has_v) {
      const auto v = read(item(buffers, i));
      if (!v || v->dtype != w->dtype) {
        refused.push_back(i);
        continue;
      }
      if (!same_shape(*v, *w)) refuse_shape(group, "momentum_buffers", i, *v, *w);
      check_no_self_overlap(*v, "momentum_buffers", i, group);
      t.v = *v;
      job.rule = nesterov ? (is_first[i] ? SgdRule::nesterov_first : SgdRule::nesterov)
                          : (is_first[i] ? SgdRule::momentum_first : SgdRule::momentum);
      PyList_Append(written_.ptr(), item(buffers, i));
    }
    PyList_Append(written_.ptr(), item(params, i));
    operands_.push_back(t);
    jobs_.push_back(job);
  }
  return refused;
}

py::tuple SgdStep::slot_offsets() {
  if (slot_offsets_ != told_offsets_) {
    told_offsets_ = slot_offsets_;
    offsets_ = py::tuple(py::cast(slot_offsets_));
  }
  return offsets_;
}

void SgdStep::check() {
  moved_ = moved_ || reading_ != places_.size();
  if (moved_) {
    places_.resize(reading_);
    rounds_ = rounds(operands_);
    copies_first_.clear();
    for (size_t i = 0; i < operands_.size(); i++)
      if (operands_[i].copies_first) copies_first_.push_back((int)i);
    moved_ = false;
  }
  for (int i : copies_first_) operands_[i].copies_first = true;
}

// Cuts one parameter into chunks, each with the place where its sums go.
void SgdStep::cut(const Operands& t, const Job& job, double* table) {
  constexpr int kSums = StepSums::count;
  const View& w = t.w;
  const bool by_row = table && job.slot_count > 0 && job.by_row;
  const bool dense = w.dense && t.g.dense && same_strides(w, t.g) &&
                     (!t.has_v || (t.v.dense && same_strides(w, t.v))) && (!by_row || rows_are_contiguous(w)) &&
                     !t.copies_first;
  const Strided* strided = nullptr;
  if (!dense) {
    strided_.push_back({w.ndim, w.shape, w.strides, t.g.strides, t.has_v ? t.v.strides : nullptr});
    strided = &strided_.back();
  }
  const auto chunk = [&](int64_t begin, int64_t size, int64_t slot_size, double* sums) {
    const int64_t offset = dense ? begin * w.item() : 0;
    chunks_.push_back({static_cast<char*>(w.data) + offset, static_cast<const char*>(t.g.data) + offset,
                       t.has_v ? static_cast<char*>(t.v.data) + offset : nullptr, strided, begin, size, slot_size, sums,
                       &hypers_[job.hyper], job.rule, w.dtype});
  };
  const auto cut_slot = [&](int64_t begin, int64_t size, double* out) {
    const int64_t parts = pieces(size);
    double* sums = out;
    if (out && parts > 1) {
      pending_.push_back({out, (int64_t)partials_.size(), parts});
      partials_.resize(partials_.size() + parts * kSums);
      sums = partials_.data() + pending_.back().first;
    }
    for (int64_t p = 0; p < parts; p++) {
      const int64_t at = p * kChunk, run = std::min(kChunk, size - at);
      chunk(begin + at, run, run, sums ? sums + p * kSums : nullptr);
    }
  };

  double* out = table && job.slot_count ? table + job.slot * kSums : nullptr;
  if (out) std::fill(out, out + job.slot_count * kSums, 0.0);  // what an empty tensor sums to
  if (w.numel == 0) return;
  const int64_t row = by_row ? w.numel / job.slot_count : w.numel;
  if (row >= kChunk || !by_row) {
    for (int64_t r = 0; r * row < w.numel; r++) cut_slot(r * row, row, out ? out + r * kSums : nullptr);
  } else {
    const int64_t rows = kChunk / row;
    for (int64_t r = 0; r < job.slot_count; r += rows)
      chunk(r * row, std::min(rows, job.slot_count - r) * row, row, out + r * kSums);
  }
}

py::list SgdStep::run(const py::object& table) {
  constexpr int kSums = StepSums::count;
  double* sums = nullptr;
  if (slots_ > 0 && !table.is_none()) {
    const auto t = view(table.ptr());
    if (!t || t->dtype != DType::f64 || t->numel != slots_ * kSums || !t->dense)
      throw py::value_error("SgdStep.run: expected a dense float64 table of " + std::to_string(slots_) + " x " +
                            std::to_string(kSums) + ", got " + (t ? shape_text(*t) : describe(table.ptr())));
    sums = static_cast<double*>(t->data);
    std::fill(sums, sums + slots_ * kSums, std::numeric_limits<double>::quiet_NaN());
  }

  int64_t coordinates = 0, parts = 0;
  int rounds = 1;
  for (size_t i = 0; i < operands_.size(); i++) {
    coordinates += operands_[i].w.numel;
    if (sums && jobs_[i].slot_count > 0) parts += pieces(operands_[i].w.numel) + jobs_[i].slot_count;
    if (!rounds_.empty()) rounds = std::max(rounds, rounds_[i] + 1);
  }
  strided_.clear();
  strided_.reserve(operands_.size());
  partials_.clear();
  partials_.reserve(parts * kSums);  // chunks point into it
  pending_.clear();
  for (int round = 0; round < rounds; round++) {
    chunks_.clear();
    for (size_t i = 0; i < operands_.size(); i++)
      if (rounds_.empty() || rounds_[i] == round) cut(operands_[i], jobs_[i], sums);
    std::optional<py::gil_scoped_release> released;
    if (coordinates > kReleaseGil) released.emplace();
    cpu::sgd(chunks_.data(), (int64_t)chunks_.size());
  }
  // In chunk order, whoever computed them: the sums do not depend on the number of threads.
  for (const Pending& p : pending_)
    for (int64_t part = 0; part < p.count; part++)
      for (int j = 0; j < kSums; j++) p.out[j] += partials_[p.first + part * kSums + j];
  owned_.clear();
  operands_.clear();
  return std::exchange(written_, py::list());
}

}  // namespace nk
