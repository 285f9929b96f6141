// pass.cpp - see pass.h.
#include "pass.h"

#include <algorithm>
#include <limits>
#include <tuple>
#include <utility>

#include <pybind11/stl.h>

#include "launch.h"

namespace nk {
namespace {

PyObject* item(const py::list& list, Py_ssize_t i) { return PyList_GET_ITEM(list.ptr(), i); }

const Op& find_op(const std::string& name) {
  for (const Op& op : kOps)
    if (name == op.name) return op;
  throw py::value_error("Pass: expected the name of an op over lists of tensors, got " + name);
}

[[noreturn]] void refuse_shape(const Op& op, int group, const char* list, int i, const View& got,
                               const View& expected) {
  const std::string at = "[" + std::to_string(i) + "]";
  throw py::value_error(where(op, group) + ": " + list + at + " has shape " + shape_text(got) + " but " + op.w + at +
                        " has shape " + shape_text(expected));
}

void check_length(const Op& op, int group, const char* list, size_t got, size_t expected) {
  if (got != expected)
    throw py::value_error(where(op, group) + ": " + list + " has " + std::to_string(got) + " entries but " + op.w +
                          " has " + std::to_string(expected));
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

// `slot_count` of a parameter whose view may be at hand.
int64_t slots_of(PyObject* param, const View* w, Stats stats) {
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
  if (!complete_) cached_.clear(), operands_.clear();  // the caller may hold none of the tensors of a failed step
  complete_ = false;
  taken_ = 0;
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

void Pass::begin_parameter() {
  constexpr size_t kMost = 6 + kMostBuffers;
  if (cached_.capacity() < reading_ + kMost) cached_.reserve(2 * (reading_ + kMost));
  changed_ = false;
}

const View* Pass::read(PyObject* object, bool is_kept) {
  if (reading_ == cached_.size()) cached_.emplace_back();
  return cached_[reading_++].refresh(object, is_kept, changed_, moved_);
}

Pass::Group Pass::read_group(const std::string& name, const GroupCall& call) {
  const Op& op = find_op(name);
  std::optional<int> device;
  if (!call.hyper.has_numbers_on_device()) {
    hypers_.push_back(call.hyper.plain());
  } else {
    hypers_.push_back(call.hyper.numbers(device, where(op, call.group)));
    owned_.push_back(call.hyper.on_device());  // until `run` has launched
  }
  return {op, op.rule(hypers_.back()), call.stats, call.group, device, call.lr_multipliers, call.first_parameter};
}

bool Pass::fit(const Views& views, const Traits& traits, const Given& given) {
  const View& w = *views.w;
  const auto fits = [&](const View* other) { return other && other->dtype == w.dtype && other->device == w.device; };
  if (!fits(views.g)) return false;
  for (int k = 0; k < traits.buffers; k++) {
    const View* v = views.v[k];
    const bool is_mixed = traits.is_step && v && v->device == w.device && may_differ(w.dtype, v->dtype);
    if (!fits(v) && !is_mixed) return false;
  }
  if (given.held && !fits(views.h)) return false;
  if (traits.counts_steps) {
    const View* t = views.count;
    const bool is_real = t && (t->dtype == DType::f32 || t->dtype == DType::f64);
    if (!is_real || t->numel != 1 || (t->device != kCpu && t->device != w.device)) return false;
  }
  const View* m = views.master;
  const bool is_low = item_size(w.dtype) < real_size(w.dtype);
  return !given.master || (m && is_low && m->dtype == DType::f32 && m->device == w.device);
}

Operands Pass::operands_of(const Views& views, const Group& group, const Traits& traits, const Given& given, int i) {
  const Op& op = group.op;
  const View& w = *views.w;
  const auto check_shape = [&](const View& v, const char* list) {
    if (!same_shape(v, w)) refuse_shape(op, group.index, list, i, v, w);
  };
  const auto check_written = [&](const View& v, const char* list) {
    check_no_self_overlap(v, op, list, i, group.index);
  };
  Operands t{};
  t.op = &op, t.group = group.index, t.index = i;
  t.buffers = traits.buffers, t.has_h = given.held;
  t.w = w, t.g = *views.g;
  t.param = given.param, t.first_read = given.first_read;
  t.is_alike = w.dense;
  const auto compare = [&](const View& v) { t.is_alike = t.is_alike && v.dense && same_strides(w, v); };
  check_shape(t.g, op.g);
  compare(t.g);
  if (traits.writes_w) check_written(w, op.w);
  for (int k = 0; k < t.buffers; k++) {
    t.v[k] = *views.v[k];
    check_shape(t.v[k], op.buffers[k]);
    check_written(t.v[k], op.buffers[k]);
    compare(t.v[k]);
  }
  if (t.has_h) {
    t.h = *views.h;
    check_shape(t.h, op.held);
    compare(t.h);
  }
  if (given.master) {
    t.master = *views.master;
    check_shape(*t.master, op.masters);
    check_written(*t.master, op.masters);
    compare(*t.master);
  }
  return t;
}

bool Pass::take(const View* w, const Given& given, const Group& group, int i, int64_t slot, int64_t slot_count) {
  if (!w) return false;
  const Traits& traits = traits_of(group.rule);
  Views views{w, read(given.grad, false), {}, nullptr, nullptr, nullptr, nullptr};
  for (int k = 0; k < traits.buffers; k++) views.v[k] = read(given.buffers[k], true);
  if (given.held) views.h = read(given.held, false);
  if (given.master) views.master = read(given.master, true);
  if (traits.counts_steps) views.count = read(given.count, true);
  const bool has_radius = traits.keeps_norm && given.radius && given.radius != Py_None;
  if (has_radius) views.radius = read(given.radius, true);

  if (taken_ == operands_.size()) operands_.emplace_back();
  Operands& t = operands_[taken_];
  const bool is_as_before = !changed_ && t.param == given.param && t.first_read == given.first_read &&
                            t.op == &group.op && t.group == group.index && t.index == i &&
                            t.buffers == traits.buffers && t.has_h == (given.held != nullptr) &&
                            t.master.has_value() == (given.master != nullptr);
  if (!is_as_before) {
    t.param = nullptr;  // the views are read anew; the operands are those of another time until they are made anew
    if (!fit(views, traits, given)) return false;
  }
  if (group.device_of_numbers && *group.device_of_numbers != w->device) return false;
  if (slot_count > 0 && !measures_on(w->device, given.param)) return false;
  if (!is_as_before) t = operands_of(views, group, traits, given, i);
  Job job{};
  if (traits.keeps_norm && !take_norms(*w, views, given, group, i, job)) {
    t.param = nullptr;
    return false;
  }
  taken_++;

  job.hyper = (int)hypers_.size() - 1, job.rule = given.first ? kRules.first[(int)group.rule] : group.rule;
  job.slot = slot, job.slot_count = slot_count, job.by_row = group.stats == Stats::row, job.row = first_row_ + i;
  if (group.lr_multipliers) job.numbers.of_lr = group.lr_multipliers->at(i, w->device);
  if (traits.counts_steps) {
    const bool is_double = views.count->dtype == DType::f64;
    job.numbers.count = {{1, 1}, views.count->device == kCpu ? nullptr : views.count->data, is_double};
    job.count = views.count->device == kCpu ? views.count->data : nullptr;
    const DeviceNumbers& numbers = hypers_.back().on_device;
    if (job.count && (numbers.found_inf || numbers.beta1 || numbers.beta2))
      throw py::value_error(where(*t.op, t.group) + ": " + t.op->counts + "[" + std::to_string(i) +
                            "] lies on the CPU, but found_inf or betas on a device; expected it there too");
    written_.push_back(given.count);
  }
  job.param = given.param;
  job.rounds_at_random = hypers_.back().rounding.is_random && w->dtype == DType::bf16;
  job.parameter = group.first_parameter + (uint32_t)i;
  jobs_.push_back(job);
  has_pairs_ = has_pairs_ || t.has_h;
  has_cuda_ = has_cuda_ || w->device != kCpu;
  if (given.master) written_.push_back(given.master);
  for (int k = 0; k < t.buffers; k++) written_.push_back(given.buffers[k]);
  if (traits.writes_w) written_.push_back(given.param);
  return true;
}

bool Pass::take_norms(const View& w, const Views& views, const Given& given, const Group& group, int i,
                      Job& job) const {
  if (w.device != kCpu) return false;
  job.norms = hypers_.back().by_row ? w.rows() : 1;
  if (given.radius && given.radius != Py_None) {
    const View* r = views.radius;
    if (!r || r->dtype != DType::f64 || r->device != kCpu || !r->dense || r->numel != job.norms)
      throw py::value_error(where(group.op, group.index) + ": the radius of " + group.op.w + "[" + std::to_string(i) +
                            "] expected " + std::to_string(job.norms) + " dense float64 on the CPU, got " +
                            (r ? shape_text(*r) + " " : "") + describe(given.radius) +
                            (group.index < 0 ? "" : "; to keep the norms of now, delete 'radius' from its state"));
    job.radii = static_cast<const double*>(r->data);
    return true;
  }
  const int64_t zero = w.numel == 0 ? -1 : zero_slot(w, job.norms);
  if (zero < 0) return true;
  throw py::value_error(where(group.op, group.index) + ": " + group.op.w + "[" + std::to_string(i) + "] " +
                        (job.norms > 1 ? "has a row of zeros, " + std::to_string(zero) : "is zero") +
                        ", which has no norm to keep; expected weights that are not all zero, or norm=None");
}

std::vector<int> Pass::add(const std::string& op_name, const Lists& lists, const GroupCall& call) {
  const int n = (int)lists.params.size();
  const Group group = read_group(op_name, call);
  const Op& op = group.op;
  const int buffer_count = traits_of(group.rule).buffers;
  const auto keep = [&](const py::object& given, const char* name) {
    py::list list = given.cast<py::list>();
    check_length(op, call.group, name, list.size(), n);
    owned_.push_back(list);
    return list;
  };
  check_length(op, call.group, op.g, lists.grads.size(), n);
  for (const py::list& list : {lists.params, lists.grads}) owned_.push_back(list);
  py::list buffers[kMostBuffers], held, masters, counts, radii;
  if (buffer_count > 0) {
    if (lists.buffers.is_none())
      throw py::value_error(where(op, call.group) + ": " + op.why_state + "expected " + op.buffers[0] + ", got None");
    const py::list given = lists.buffers.cast<py::list>();
    if ((int)given.size() != buffer_count)
      throw py::value_error(where(op, call.group) + ": expected " + std::to_string(buffer_count) +
                            " lists of state buffers, got " + std::to_string(given.size()));
    for (int k = 0; k < buffer_count; k++) buffers[k] = keep(given[k], op.buffers[k]);
  }
  if (!lists.held.is_none()) held = keep(lists.held, op.held);
  if (!lists.masters.is_none()) masters = keep(lists.masters, op.masters);
  if (traits_of(group.rule).counts_steps) {
    if (lists.counts.is_none()) throw py::value_error(where(op, call.group) + ": expected " + op.counts + ", got None");
    counts = keep(lists.counts, op.counts);
  }
  if (!lists.radii.is_none()) radii = keep(lists.radii, "radii");
  std::vector<bool> is_first(n, false);
  if (!lists.first.is_none())
    for (py::handle i : lists.first) is_first.at(i.cast<int>()) = true;

  first_row_ = call.row ? *call.row : std::exchange(parameters_, parameters_ + n);
  std::vector<int> refused;
  for (int i = 0; i < n; i++) {
    begin_parameter();
    Given given{
        item(lists.params, i), item(lists.grads, i), {}, nullptr, nullptr, nullptr, nullptr, is_first[i], reading_};
    const bool skipped = given.grad == Py_None;
    const View* w = skipped ? nullptr : read(given.param, true);
    const int64_t count = slots_of(given.param, w, group.stats);
    const int64_t slot =
        lists.slots.is_none() ? next_slots(count, group.stats) : py::list(lists.slots)[i].cast<int64_t>();
    if (skipped) continue;
    for (int k = 0; k < buffer_count; k++) given.buffers[k] = item(buffers[k], i);
    if (!lists.held.is_none() && item(held, i) != Py_None) given.held = item(held, i);
    if (!lists.masters.is_none() && item(masters, i) != Py_None) given.master = item(masters, i);
    if (traits_of(group.rule).counts_steps) given.count = item(counts, i);
    if (!lists.radii.is_none()) given.radius = item(radii, i);
    if (!take(w, given, group, i, slot, count)) refused.push_back(i);
  }
  return refused;
}

bool Pass::add_whole(const std::string& op, const py::list& params, const py::object& state, const py::tuple& keys,
                     const GroupCall& call, const py::object& held) {
  const int n = (int)params.size();
  int without = 0;
  const size_t taken = taken_, jobs = jobs_.size(), owned = owned_.size(), written = written_.size(),
               reading = reading_;
  const size_t offsets = slot_offsets_.size();
  const int64_t slots = slots_;
  Gather gather(params, state, keys);
  const Group group = read_group(op, call);
  const bool all_or_none = hypers_.back().is_gauged, had_pairs = has_pairs_;
  py::list held_list;
  if (!held.is_none()) {
    held_list = held.cast<py::list>();
    check_length(group.op, call.group, group.op.held, held_list.size(), n);
    owned_.push_back(held_list);
  }
  const std::optional<DType> state_dtype = call.hyper.state_dtype();
  first_row_ = parameters_;
  for (int i = 0; i < n; i++) {
    begin_parameter();
    Gather::Entry entry = gather.next();
    Given given{item(params, i), entry.grad.ptr(), {}, nullptr, nullptr, nullptr, nullptr, false, reading_};
    const Traits& traits = traits_of(group.rule);
    const int buffers = traits.buffers;
    for (int k = 0; k < buffers; k++) given.buffers[k] = entry.values[k];
    if (traits.counts_steps) given.count = entry.values[buffers];
    if (traits.keeps_norm) given.radius = entry.values[buffers + traits.counts_steps];
    const bool skipped = entry.grad.is_none();
    const View* w = skipped ? nullptr : read(given.param, true);
    const int64_t count = slots_of(given.param, w, group.stats);
    const int64_t slot = next_slots(count, group.stats);
    without += skipped;
    PyObject* const first_of_pair = held.is_none() ? nullptr : item(held_list, i);
    if (first_of_pair && first_of_pair != Py_None) given.held = first_of_pair;
    const bool lacks_one = first_of_pair && skipped != (first_of_pair == Py_None);
    const bool mixed = lacks_one || (all_or_none && without > 0 && without <= i);
    if (skipped && !mixed) continue;
    bool fits = !mixed && !entry.missing && take(w, given, group, i, slot, count);
    if (fits && state_dtype)
      for (int k = 0; k < operands_[taken_ - 1].buffers; k++)
        fits = fits && operands_[taken_ - 1].v[k].dtype == *state_dtype;
    if (!fits) {
      if (taken_ < operands_.size()) operands_[taken_].param = nullptr;  // some of its views may be read anew
      taken_ = taken;
      has_pairs_ = had_pairs;
      jobs_.resize(jobs);
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
  if (slot_offsets_ != last_offsets_) {
    last_offsets_ = slot_offsets_;
    offsets_ = py::tuple(py::cast(slot_offsets_));
  }
  return offsets_;
}

py::tuple Pass::check(const py::object& last) {
  operands_.resize(taken_);
  moved_ = moved_ || reading_ != cached_.size();
  if (moved_) {
    cached_.resize(reading_);
    for (Operands& t : operands_) t.copies_first = false;
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
  return t.is_alike && (!by_row || rows_are_contiguous(w));
}

Strided Pass::strided_of(const Operands& t) const {
  Strided s{t.w.ndim,
            t.w.shape,
            t.w.strides,
            t.g.strides,
            {},
            t.has_h ? t.h.strides : nullptr,
            t.master ? t.master->strides : nullptr};
  for (int k = 0; k < t.buffers; k++) s.v[k] = t.v[k].strides;
  return s;
}

int Pass::last_round() const { return rounds_.empty() ? 0 : *std::max_element(rounds_.begin(), rounds_.end()); }

Chunk Pass::whole_tensor(const Operands& t, const Job& job) const {
  Chunk c{};
  c.w = t.w.data, c.g = t.g.data, c.h = t.has_h ? t.h.data : nullptr;
  for (int k = 0; k < t.buffers; k++) c.v[k] = t.v[k].data, c.v_dtype[k] = t.v[k].dtype;
  c.size = t.w.numel, c.columns = columns(), c.hyper = &hypers_[job.hyper], c.rule = job.rule;
  c.dtype = t.w.dtype;
  c.master = t.master ? static_cast<float*>(t.master->data) : nullptr;
  c.rounds_at_random = job.rounds_at_random, c.parameter = job.parameter, c.numbers = job.numbers;
  return c;
}
Chunk& Pass::add_whole_tensor(std::vector<Chunk>& to, const Operands& t, const Job& job) const {
  return to.emplace_back(whole_tensor(t, job));
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
    Chunk& c = add_whole_tensor(chunks_, t, job);
    c.strided = strided;
    c = part_of(c, begin, size);
    c.slot_size = slot_size, c.sums = sums;
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

// One whole parameter of a rule that keeps norms.
KeptTensor Pass::kept_tensor(const Operands& t, const Job& job, double* table) {
  const bool by_row = table && this->by_row(job);
  KeptTensor kept{whole_tensor(t, job), job.norms, job.radii};
  Chunk& c = kept.whole;
  if (!runs_dense(t, job, by_row || job.norms > 1) || t.copies_first) {
    strided_.push_back(strided_of(t));
    c.strided = &strided_.back();
  }
  if (!table || !job.slot_count) return kept;
  c.sums = table + job.slot * c.columns;
  c.slot_size = by_row ? c.size / job.slot_count : c.size;
  for (int64_t r = 0; r < job.slot_count; r++)
    std::fill(c.sums + r * c.columns, c.sums + r * c.columns + own_columns(t), 0.0);
  return kept;
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
  count_steps_on_host();
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
  like_ = py::object();
  complete_ = true;
}

void Pass::count_steps_on_host() {
  // Most parameters have taken the same number of steps.
  int hyper = -1;
  double steps = 0;
  Bias bias{};
  for (Job& job : jobs_) {
    if (!job.count) continue;
    const auto next = [](auto* count) { return (double)(*count = *count + 1); };
    const double now =
        job.numbers.count.is_double ? next(static_cast<double*>(job.count)) : next(static_cast<float*>(job.count));
    if (job.hyper != hyper || now != steps) hyper = job.hyper, steps = now, bias = Bias::after(now, hypers_[hyper]);
    job.numbers.count.bias = bias;
  }
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
    kept_.clear();
    for (size_t i = 0; i < operands_.size(); i++) {
      const Operands& t = operands_[i];
      if (!is_in(round, i) || t.w.device != kCpu) continue;
      if (!traits_of(jobs_[i].rule).keeps_norm || t.w.numel == 0)
        cut(t, jobs_[i], sums);
      else
        kept_.push_back(kept_tensor(t, jobs_[i], sums));
    }
    // The end of the gradients is what `sq_norms` has left in the caches.
    if (!clip_coefs_.empty()) std::reverse(chunks_.begin(), chunks_.end());
    std::optional<py::gil_scoped_release> released;
    if (coordinates > kReleaseGil) released.emplace();
    cpu::run(chunks_.data(), (int64_t)chunks_.size(), coordinates);
    if (!kept_.empty()) cpu::run_on_sphere(kept_.data(), (int64_t)kept_.size(), coordinates);
  }
  // In the order of the chunks, whichever thread computed them: the sums do not depend on the number of threads.
  for (const Pending& p : pending_)
    for (int64_t part = 0; part < p.count; part++)
      for (int j = 0; j < p.columns; j++) p.out[j] += partials_[p.first + part * columns + j];
}

void Pass::run_on(int device, double* table, double* scratch) {
  const int columns = this->columns();
  const cuda::Queue queue = queue_of(device);
  const auto check = [&](const char* error) {
    check_launch(where(*operands_[0].op, operands_[0].group), device, error);
  };
  const float* found_inf = hypers_.empty() ? nullptr : hypers_.front().on_device.found_inf;
  strided_.clear();
  strided_.reserve(operands_.size());
  slot_parts_.clear();
  int64_t written = 0;  // entries of the table
  std::vector<std::vector<Chunk>> rounds(last_round() + 1);
  std::vector<cuda::Count> counts;
  for (size_t i = 0; i < operands_.size(); i++) {
    const Operands& t = operands_[i];
    const Job& job = jobs_[i];
    if (t.w.device != device) continue;
    if (void* at = const_cast<void*>(job.numbers.count.at)) counts.push_back({at, job.numbers.count.is_double});
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
    Chunk& c = add_whole_tensor(rounds[rounds_.empty() ? 0 : rounds_[i]], t, job);
    c.strided = strided, c.slot_size = slot_size, c.sums = sums;
  }
  // Each kind of tensor is a launch of its own: those of a kind come together.
  const auto kind = [](const Chunk& c) {
    return std::make_tuple(c.strided != nullptr, c.hyper, c.rule, c.dtype, c.h != nullptr, c.sums != nullptr);
  };
  const auto comes_before = [&](const Chunk& a, const Chunk& b) { return kind(a) < kind(b); };
  py::gil_scoped_release released;
  if (table && written < slots_ * columns) check(cuda_kernels->fill_nan(table, slots_ * columns, found_inf, queue));
  check(cuda_kernels->count_steps(counts.data(), (int64_t)counts.size(), found_inf, queue));
  for (std::vector<Chunk>& chunks : rounds) {
    std::stable_sort(chunks.begin(), chunks.end(), comes_before);
    check(cuda_kernels->run(chunks.data(), (int64_t)chunks.size(), queue));
  }
  check(cuda_kernels->add_parts(slot_parts_.data(), (int64_t)slot_parts_.size(), columns, found_inf, queue));
}

}  // namespace nk
