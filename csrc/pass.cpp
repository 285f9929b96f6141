// pass.cpp - see pass.h.
#include "pass.h"

#include <algorithm>
#include <limits>
#include <tuple>
#include <utility>

#include <pybind11/stl.h>

#include "gather.h"
#include "launch.h"

namespace nk {
namespace {

PyObject* item(const py::list& list, Py_ssize_t i) { return PyList_GET_ITEM(list.ptr(), i); }

[[noreturn]] void refuse_shape(int group, const char* list, int i, const View& got, const View& expected) {
  throw py::value_error(where(group) + ": " + list + "[" + std::to_string(i) + "] has shape " + shape_text(got) +
                        " but " + names(group).w + "[" + std::to_string(i) + "] has shape " + shape_text(expected));
}

bool has_buffer(Rule rule) {
  return rule == Rule::momentum || rule == Rule::nesterov || rule == Rule::gauged_momentum || rule == Rule::welford;
}

Rule at_first(Rule rule) {
  return rule == Rule::nesterov          ? Rule::nesterov_first
         : rule == Rule::gauged_momentum ? Rule::gauged_momentum_first
                                         : Rule::momentum_first;
}
bool writes_w(Rule rule) { return rule != Rule::difference; }

void check_length(int group, const char* list, size_t got, size_t expected) {
  if (got != expected)
    throw py::value_error(where(group) + ": " + list + " has " + std::to_string(got) + " entries but " +
                          names(group).w + " has " + std::to_string(expected));
}

// Buffers that a step can keep in another type than its parameter's.
bool may_differ(DType w, DType v) { return w != DType::f64 && (v == DType::f32 || v == DType::bf16); }

bool is_row_major(const View& w) {
  int64_t stride = 1;
  for (int d = w.ndim - 1; d >= 0; stride *= w.shape[d--])
    if (w.shape[d] != 1 && w.strides[d] != stride) return false;
  return true;
}

bool rows_are_contiguous(const View& w) {
  return w.ndim < 2 || w.shape[0] == 1 || w.numel == 0 || w.strides[0] == w.numel / w.shape[0];
}

// What `slot_count` says, for a parameter whose view may be at hand.
int64_t slots_of(PyObject* param, const std::optional<View>& w, Stats stats) {
  return w && stats == Stats::row ? w->rows() : slot_count(param, stats);
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

void Pass::begin() {
  if (!complete_) places_.clear();  // nobody was told what to keep
  complete_ = false;
  operands_.clear();
  jobs_.clear();
  hypers_.clear();
  owned_.clear();
  written_.clear();
  slot_offsets_.clear();
  slots_ = parameters_ = 0;
  clip_coefs_.clear();
  reading_ = 0;
  has_pairs_ = has_cuda_ = false;
  measured_ = kCpu;
  like_ = py::object();
}

std::optional<View> Pass::read(PyObject* object, bool is_kept) {
  if (reading_ == places_.size()) places_.emplace_back();
  return places_[reading_++].look(object, is_kept, moved_);
}

bool Pass::take(const std::optional<View>& w, PyObject* param, PyObject* grad, PyObject* buffer, PyObject* held,
                PyObject* master, bool first, const Group& group, int i, int64_t slot, int64_t slot_count) {
  if (!w) return false;
  const Names& n = names(group.index);
  const auto fits = [&](const std::optional<View>& other) {
    return other && other->dtype == w->dtype && other->device == w->device;
  };
  const auto g = read(grad, false);
  if (!fits(g) || (group.device_of_numbers && *group.device_of_numbers != w->device)) return false;
  if (slot_count > 0 && !measures_on(w->device, param)) return false;
  if (!same_shape(*g, *w)) refuse_shape(group.index, n.g, i, *g, *w);
  if (writes_w(group.rule)) check_no_self_overlap(*w, n.w, i, group.index);

  const Multiplier of_lr = group.lr_multipliers ? group.lr_multipliers->at(i, w->device) : Multiplier{1, nullptr};
  Job job{(int)hypers_.size() - 1,   group.rule,     slot,  slot_count,
          group.stats == Stats::row, first_row_ + i, of_lr, param};
  Operands t{*w, *g, *w, *g, has_buffer(group.rule), held && held != Py_None, i, group.index, false};
  if (t.has_v) {
    const auto v = read(buffer, true);
    const bool is_mixed = group.is_step && v && v->device == w->device && may_differ(w->dtype, v->dtype);
    if (!fits(v) && !is_mixed) return false;
    if (!same_shape(*v, *w)) refuse_shape(group.index, n.v, i, *v, *w);
    check_no_self_overlap(*v, n.v, i, group.index);
    t.v = *v;
    if (first) job.rule = at_first(group.rule);
  }
  if (t.has_h) {
    const auto h = read(held, false);
    if (!fits(h)) return false;
    if (!same_shape(*h, *w)) refuse_shape(group.index, n.h, i, *h, *w);
    t.h = *h;
    has_pairs_ = true;
  }
  if (master && master != Py_None) {
    const auto m = read(master, true);
    const bool is_low = w->dtype == DType::bf16 || w->dtype == DType::f16;
    if (!m || !is_low || m->dtype != DType::f32 || m->device != w->device) return false;
    if (!same_shape(*m, *w)) refuse_shape(group.index, n.master, i, *m, *w);
    check_no_self_overlap(*m, n.master, i, group.index);
    t.master = *m;
    written_.push_back(master);
  }
  job.rounds_at_random = group.hyper.rounding.is_random && w->dtype == DType::bf16;
  job.parameter = group.first_parameter + (uint32_t)i;
  has_cuda_ = has_cuda_ || w->device != kCpu;
  if (t.has_v) written_.push_back(buffer);
  if (writes_w(group.rule)) written_.push_back(param);
  operands_.push_back(t);
  jobs_.push_back(job);
  return true;
}

std::vector<int> Pass::add(const py::list& params, const py::list& grads, const py::object& momentum_buffers,
                           const py::object& first, const Group& group, const py::object& slots, const py::object& held,
                           const py::object& masters) {
  const int n = (int)params.size();
  const bool has_v = has_buffer(group.rule);
  check_length(group.index, names(group.index).g, grads.size(), n);
  py::list buffers, firsts, copies;
  if (has_v) {
    if (momentum_buffers.is_none())
      throw py::value_error(where(group.index) + ": momentum is not 0, expected momentum_buffers, got None");
    buffers = momentum_buffers.cast<py::list>();
    check_length(group.index, names(group.index).v, buffers.size(), n);
  }
  if (!held.is_none()) {
    firsts = held.cast<py::list>();
    check_length(group.index, names(group.index).h, firsts.size(), n);
  }
  if (!masters.is_none()) {
    copies = masters.cast<py::list>();
    check_length(group.index, names(group.index).master, copies.size(), n);
  }
  std::vector<bool> is_first(n, false);
  if (!first.is_none())
    for (py::handle i : first) is_first.at(i.cast<int>()) = true;

  hypers_.push_back(group.hyper);
  first_row_ = group.row ? *group.row : std::exchange(parameters_, parameters_ + n);
  for (const py::object& list :
       {py::object(params), py::object(grads), py::object(buffers), py::object(firsts), py::object(copies)})
    owned_.push_back(list);
  std::vector<int> refused;
  for (int i = 0; i < n; i++) {
    PyObject *p = item(params, i), *g = item(grads, i);
    const auto w = g == Py_None ? std::nullopt : read(p, true);
    const int64_t count = slots_of(p, w, group.stats);
    const int64_t slot = slots.is_none() ? next_slots(count, group.stats) : py::list(slots)[i].cast<int64_t>();
    if (g == Py_None) continue;
    PyObject *buffer = has_v ? item(buffers, i) : nullptr, *h = firsts.empty() ? nullptr : item(firsts, i),
             *master = copies.empty() ? nullptr : item(copies, i);
    if (!take(w, p, g, buffer, h, master, is_first[i], group, i, slot, count)) refused.push_back(i);
  }
  return refused;
}

bool Pass::add_whole(const py::list& params, const py::object& state, const py::str& key, const Group& group,
                     bool all_or_none) {
  const int n = (int)params.size();
  int without = 0;
  const size_t operands = operands_.size(), owned = owned_.size(), written = written_.size(), reading = reading_;
  const size_t offsets = slot_offsets_.size();
  const int64_t slots = slots_;
  Gather gather(params, state, key);
  hypers_.push_back(group.hyper);
  first_row_ = parameters_;
  for (int i = 0; i < n; i++) {
    Gather::Entry entry = gather.next();
    PyObject* p = item(params, i);
    const auto w = entry.grad.is_none() ? std::nullopt : read(p, true);
    const int64_t count = slots_of(p, w, group.stats);
    const int64_t slot = next_slots(count, group.stats);
    const bool skipped = entry.grad.is_none();
    without += skipped;
    const bool mixed = all_or_none && without > 0 && without <= i;
    if (skipped && !mixed) continue;
    if (mixed || entry.missing ||
        !take(w, p, entry.grad.ptr(), entry.value, nullptr, nullptr, false, group, i, slot, count) ||
        (group.state_dtype && operands_.back().has_v && operands_.back().v.dtype != *group.state_dtype)) {
      operands_.resize(operands);
      jobs_.resize(operands);
      owned_.resize(owned);
      written_.resize(written);
      slot_offsets_.resize(offsets);
      hypers_.pop_back();
      slots_ = slots;
      reading_ = reading;
      return false;
    }
    owned_.push_back(std::move(entry.grad));
  }
  parameters_ += n;
  return true;
}

int64_t Pass::next_slots(int64_t count, Stats stats) {
  if (stats == Stats::none) return 0;
  slot_offsets_.push_back(slots_);
  return std::exchange(slots_, slots_ + count);
}

py::tuple Pass::slot_offsets() {
  if (slot_offsets_ != told_offsets_) {
    told_offsets_ = slot_offsets_;
    offsets_ = py::tuple(py::cast(slot_offsets_));
  }
  return offsets_;
}

py::tuple Pass::check(const py::object& last) {
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

  const Py_ssize_t n = (Py_ssize_t)written_.size();
  bool same = PyTuple_Check(last.ptr()) && PyTuple_GET_SIZE(last.ptr()) == n;
  for (Py_ssize_t i = 0; same && i < n; i++) same = PyTuple_GET_ITEM(last.ptr(), i) == written_[i];
  if (same) return last;
  py::tuple written(n);
  for (Py_ssize_t i = 0; i < n; i++) {
    Py_INCREF(written_[i]);
    PyTuple_SET_ITEM(written.ptr(), i, written_[i]);
  }
  return written;
}

bool Pass::measures_on(int device, PyObject* param) {
  if (!like_) {
    measured_ = device;
    like_ = py::reinterpret_borrow<py::object>(param);
  }
  return device == measured_;
}

bool Pass::runs_dense(const Operands& t, const Job& job, bool by_row) const {
  const View& w = t.w;
  if (job.rounds_at_random && !is_row_major(w)) return false;
  if (t.master && !(t.master->dense && same_strides(w, *t.master))) return false;
  return w.dense && t.g.dense && same_strides(w, t.g) && (!t.has_v || (t.v.dense && same_strides(w, t.v))) &&
         (!t.has_h || (t.h.dense && same_strides(w, t.h))) && (!by_row || rows_are_contiguous(w));
}

Strided Pass::strided_of(const Operands& t) const {
  return {t.w.ndim,
          t.w.shape,
          t.w.strides,
          t.g.strides,
          t.has_v ? t.v.strides : nullptr,
          t.has_h ? t.h.strides : nullptr,
          t.master ? t.master->strides : nullptr};
}

int Pass::last_round() const { return rounds_.empty() ? 0 : *std::max_element(rounds_.begin(), rounds_.end()); }

Chunk Pass::whole_tensor(const Operands& t, const Job& job) const {
  Chunk c{};
  c.w = t.w.data, c.g = t.g.data, c.v = t.has_v ? t.v.data : nullptr, c.h = t.has_h ? t.h.data : nullptr;
  c.size = t.w.numel, c.columns = columns(), c.hyper = &hypers_[job.hyper], c.rule = job.rule;
  c.dtype = t.w.dtype, c.v_dtype = t.has_v ? t.v.dtype : t.w.dtype;
  c.master = t.master ? static_cast<float*>(t.master->data) : nullptr;
  c.rounds_at_random = job.rounds_at_random, c.parameter = job.parameter, c.of_lr = job.of_lr;
  return c;
}

// Cuts one parameter into chunks, each with the place where its sums go.
void Pass::cut(const Operands& t, const Job& job, double* table) {
  const int columns = this->columns(), own = own_columns(t);
  const View& w = t.w;
  const bool by_row = table && this->by_row(job), dense = runs_dense(t, job, by_row) && !t.copies_first;
  const Strided* strided = nullptr;
  if (!dense) {
    strided_.push_back(strided_of(t));
    strided = &strided_.back();
  }
  const auto chunk = [&](int64_t begin, int64_t size, int64_t slot_size, double* sums) {
    const int64_t skipped = dense ? begin : 0;
    Chunk c = whole_tensor(t, job);
    c.w = static_cast<char*>(c.w) + skipped * w.item();
    c.g = static_cast<const char*>(c.g) + skipped * w.item();
    if (c.v) c.v = static_cast<char*>(c.v) + skipped * t.v.item();
    if (c.h) c.h = static_cast<const char*>(c.h) + skipped * w.item();
    if (c.master) c.master += skipped;
    c.strided = strided, c.begin = begin, c.size = size, c.slot_size = slot_size, c.sums = sums;
    chunks_.push_back(c);
  };
  const auto cut_slot = [&](int64_t begin, int64_t size, double* out) {
    const int64_t parts = pieces(size);
    double* sums = out;
    if (out && parts > 1) {
      pending_.push_back({out, (int64_t)partials_.size(), parts, own});
      partials_.resize(partials_.size() + parts * columns);
      sums = partials_.data() + pending_.back().first;
    }
    for (int64_t p = 0; p < parts; p++) {
      const int64_t at = p * kChunk, run = std::min(kChunk, size - at);
      chunk(begin + at, run, run, sums ? sums + p * columns : nullptr);
    }
  };

  double* out = table && job.slot_count ? table + job.slot * columns : nullptr;
  for (int64_t r = 0; out && r < job.slot_count; r++)
    std::fill(out + r * columns, out + r * columns + own, 0.0);  // what an empty tensor sums to
  if (w.numel == 0) return;
  const int64_t row = by_row ? w.numel / job.slot_count : w.numel;
  if (row >= kChunk || !by_row) {
    for (int64_t r = 0; r * row < w.numel; r++) cut_slot(r * row, row, out ? out + r * columns : nullptr);
  } else {
    const int64_t rows = kChunk / row;
    for (int64_t r = 0; r < job.slot_count; r += rows)
      chunk(r * row, std::min(rows, job.slot_count - r) * row, row, out + r * columns);
  }
}

int64_t Pass::scratch_rows() const {
  int64_t rows = 0;
  for (size_t i = 0; i < operands_.size(); i++) {
    const int64_t numel = operands_[i].w.numel, slots = jobs_[i].slot_count;
    if (operands_[i].w.device == kCpu || numel == 0 || slots == 0) continue;
    const int64_t parts = cuda::parts(by_row(jobs_[i]) ? numel / slots : numel);
    if (parts > 1) rows += (by_row(jobs_[i]) ? slots : 1) * parts;
  }
  return rows;
}

std::vector<int> Pass::devices() const {
  std::vector<int> all;
  for (const Operands& t : operands_)
    if (std::find(all.begin(), all.end(), t.w.device) == all.end()) all.push_back(t.w.device);
  return all;
}

std::vector<py::object> Pass::places() const {
  std::vector<py::object> all;
  for (int device : devices())
    for (size_t i = 0; i < operands_.size(); i++)
      if (operands_[i].w.device == device) {
        all.push_back(py::reinterpret_borrow<py::object>(jobs_[i].param));
        break;
      }
  return all;
}

void Pass::run(const py::object& table, const py::object& scratch) {
  const int columns = this->columns();
  if (has_pairs_ && (table.is_none() || slots_ == 0))
    throw py::value_error("Pass.run: pairs of gradients are always measured, expected slots and a table, got none");
  const auto rows_of = [&](const py::object& rows, int64_t count, const char* name) -> double* {
    const auto t = view(rows.ptr());
    if (!t || t->dtype != DType::f64 || t->numel != count * columns || !t->dense || t->device != measured_)
      throw py::value_error(std::string("Pass.run: expected a dense float64 ") + name + " of " + std::to_string(count) +
                            " x " + std::to_string(columns) + ", got " + (t ? shape_text(*t) + " " : "") +
                            describe(rows.ptr()));
    return static_cast<double*>(t->data);
  };
  double* sums = slots_ > 0 && !table.is_none() ? rows_of(table, slots_, "table") : nullptr;
  double* parts = sums && has_cuda_ && scratch_rows() > 0 ? rows_of(scratch, scratch_rows(), "scratch") : nullptr;
  if (!has_cuda_) {
    clip_on(kCpu);
    run_on_cpu(sums);
  } else {
    for (int device : devices())
      if (clip_on(device); device == kCpu)
        run_on_cpu(measured_ == kCpu ? sums : nullptr);
      else
        run_on(device, measured_ == device ? sums : nullptr, parts);
  }
  owned_.clear();
  operands_.clear();
  like_ = py::object();
  complete_ = true;
}

void Pass::run_on_cpu(double* sums) {
  const int columns = this->columns();
  if (sums) std::fill(sums, sums + slots_ * columns, std::numeric_limits<double>::quiet_NaN());
  int64_t coordinates = 0, parts = 0;
  for (size_t i = 0; i < operands_.size(); i++) {
    if (operands_[i].w.device != kCpu) continue;
    coordinates += operands_[i].w.numel;
    if (sums && jobs_[i].slot_count > 0) parts += pieces(operands_[i].w.numel) + jobs_[i].slot_count;
  }
  strided_.clear();
  strided_.reserve(operands_.size());
  partials_.clear();
  partials_.reserve(parts * columns);  // chunks point into it
  pending_.clear();
  for (int round = 0, last = last_round(); round <= last; round++) {
    chunks_.clear();
    for (size_t i = 0; i < operands_.size(); i++)
      if (is_in(round, i) && operands_[i].w.device == kCpu) cut(operands_[i], jobs_[i], sums);
    // The end of the gradients is what `sq_norms` has left in the caches.
    if (!clip_coefs_.empty()) std::reverse(chunks_.begin(), chunks_.end());
    std::optional<py::gil_scoped_release> released;
    if (coordinates > kReleaseGil) released.emplace();
    cpu::run(chunks_.data(), (int64_t)chunks_.size(), coordinates);
  }
  // In chunk order, whoever computed them: the sums do not depend on the number of threads.
  for (const Pending& p : pending_)
    for (int64_t part = 0; part < p.count; part++)
      for (int j = 0; j < p.columns; j++) p.out[j] += partials_[p.first + part * columns + j];
}

void Pass::run_on(int device, double* table, double* scratch) {
  const int columns = this->columns();
  const cuda::Queue queue = queue_of(device);
  const auto check = [&](const char* error) { check_launch(where(operands_[0].group), device, error); };
  const float* found_inf = hypers_.empty() ? nullptr : hypers_.front().on_device.found_inf;
  strided_.clear();
  strided_.reserve(operands_.size());
  slot_parts_.clear();
  int64_t written = 0;  // entries of the table
  std::vector<std::vector<Chunk>> rounds(last_round() + 1);
  for (size_t i = 0; i < operands_.size(); i++) {
    const Operands& t = operands_[i];
    const Job& job = jobs_[i];
    if (t.w.device != device) continue;
    double *out = table && job.slot_count ? table + job.slot * columns : nullptr, *sums = out;
    const bool rows = out && by_row(job);
    const int64_t slots = out ? job.slot_count : 1, slot_size = rows ? t.w.numel / slots : t.w.numel;
    if (out) {
      const int64_t parts = t.w.numel == 0 ? 0 : cuda::parts(slot_size);
      if (parts > 1) sums = std::exchange(scratch, scratch + slots * parts * columns);
      if (parts != 1) slot_parts_.push_back({out, sums, slots, parts, own_columns(t)});
      written += slots * own_columns(t);
    }
    if (t.w.numel == 0) continue;
    const Strided* strided = nullptr;
    if (!runs_dense(t, job, rows)) {
      strided_.push_back(strided_of(t));
      strided = &strided_.back();
    }
    Chunk c = whole_tensor(t, job);
    c.strided = strided, c.slot_size = slot_size, c.sums = sums;
    rounds[rounds_.empty() ? 0 : rounds_[i]].push_back(c);
  }
  // Each kind of tensor is a launch of its own: those of a kind come together.
  const auto kind = [](const Chunk& c) {
    return std::make_tuple(c.strided != nullptr, c.hyper, c.rule, c.dtype, c.h != nullptr, c.sums != nullptr);
  };
  const auto comes_before = [&](const Chunk& a, const Chunk& b) { return kind(a) < kind(b); };
  py::gil_scoped_release released;
  if (table && written < slots_ * columns) check(cuda::fill_nan(table, slots_ * columns, found_inf, queue));
  for (std::vector<Chunk>& chunks : rounds) {
    std::stable_sort(chunks.begin(), chunks.end(), comes_before);
    check(cuda::run(chunks.data(), (int64_t)chunks.size(), queue));
  }
  check(cuda::add_parts(slot_parts_.data(), (int64_t)slot_parts_.size(), columns, found_inf, queue));
}

}  // namespace nk
