// pass.h - one pass over lists of tensors, an optimizer step over any number of param groups for one: read and check
// everything, then run it all.
//
// Two phases, so that an error in the last group leaves the first one unwritten. The object belongs to Python; between
// steps it keeps nothing but its allocations and what it found out about the tensors' memory.
#pragma once
#include <optional>
#include <vector>

#include "aliasing.h"
#include "backend.h"
#include "formulas.h"
#include "multipliers.h"
#include "place.h"
#include "tensors.h"

namespace nk {

enum class Stats : int { none, tensor, row };

// How many slots a parameter has: the one place that knows.
int64_t slot_count(PyObject* param, Stats);

class Pass {
 public:
  // Also lets go of what a step that failed had read.
  void begin();

  struct Group {  // of one optimizer, or a bare call of an op
    Hyper hyper;
    Rule rule;  // of a parameter whose buffer has a history
    Stats stats;
    int index;                                            // see `names`
    std::optional<int> device_of_numbers = std::nullopt;  // where those of `hyper.on_device` lie
    const LrMultipliers* lr_multipliers = nullptr;        // of its parameters; held by the caller until `run`
    // Of the first parameter in the table of `sq_norms`; none: the next one there.
    std::optional<int64_t> row = std::nullopt;
    bool is_step = false;                             // whose tensors may be stored differently
    std::optional<DType> state_dtype = std::nullopt;  // that buffers are to have
    uint32_t first_parameter = 0;                     // its index in the optimizer
  };

  // Reads one group. Entries of `grads` that are None are skipped. `first`: positions whose buffer holds no history
  // yet. `held`: None, or the first gradients of pairs, each None where there is no pair. `masters`: None, or the
  // float32 copies of parameters, each None where there is none. Returns the positions that no kernel of ours can take,
  // untouched: what becomes of them is the caller's decision.
  std::vector<int> add(const py::list& params, const py::list& grads, const py::object& momentum_buffers,
                       const py::object& first, const Group&, const py::object& slots, const py::object& held,
                       const py::object& masters = py::none());

  // The same, with the gradients and buffers that the parameters and the optimizer's state have: no list is made for
  // Python. False, and nothing is added, if a buffer is missing or of another dtype than `state_dtype`, a tensor is one
  // that no kernel of ours can take, or, with `all_or_none`, only some of them have gradients.
  bool add_whole(const py::list& params, const py::object& state, const py::str& key, const Group&, bool all_or_none);

  // Throws if the tensors' memory overlaps in a way that has no meaning. After it, `run` cannot fail. Returns the
  // tensors that `run` writes: `last` itself if those are the same, so that most steps make no new tuple. The caller
  // holds it until the next step's.
  py::tuple check(const py::object& last);

  // Holds what `hyper.on_device` of a group points to until `run` has launched.
  void hold(const py::object& tensors) { owned_.push_back(tensors); }

  // Between `check` and `run`: |g|^2 of every parameter on the device of `table`, (parameters(),) float64 zeros, before
  // clipping. `new_scratch(size)`: float64 memory there.
  void sq_norms(const py::object& table, const py::object& new_scratch);
  int64_t parameters() const { return parameters_; }  // of all groups, with those that have no gradient
  std::vector<py::object> places() const;             // a tensor on each device that a kernel of ours runs on

  // What `run` multiplies gradients with, one number of float64 on each of those devices, which it reads then.
  void clip(const py::list& coefs);

  // Writes the parameters, the buffers and, if there are slots, the table of sums: (slots, columns()) float64 on the
  // device of what is measured, `like()`. There `scratch` is the same with scratch_rows() rows; on the CPU it is None.
  void run(const py::object& table, const py::object& scratch);

  int64_t slots() const { return slots_; }
  // A tensor on the device of what is measured; None: the CPU.
  py::object like() const { return measured_ == kCpu ? py::object(py::none()) : like_; }
  int64_t scratch_rows() const;
  std::vector<int> devices() const;  // of all tensors
  int columns() const { return StepSums::count + (has_pairs_ ? PairSums::count : 0); }
  // Where each parameter's slots begin, in the order of `add`: the same tuple as long as nothing changes.
  py::tuple slot_offsets();

 private:
  struct Job {  // what Operands does not know
    int hyper;
    Rule rule;
    int64_t slot, slot_count;  // slot_count 0: no statistics
    bool by_row;
    int64_t row;  // of the table of `sq_norms`
    Multiplier of_lr;
    PyObject* param;  // borrowed
    bool rounds_at_random = false;
    uint32_t parameter = 0;
  };
  // What is measured is measured on one device: the first's.
  bool measures_on(int device, PyObject* param);
  bool runs_dense(const Operands&, const Job&, bool by_row) const;
  Strided strided_of(const Operands&) const;
  Chunk whole_tensor(const Operands&, const Job&) const;  // not measured, dense
  bool by_row(const Job& job) const { return job.slot_count > 0 && job.by_row; }
  int own_columns(const Operands& t) const { return StepSums::count + (t.has_h ? PairSums::count : 0); }
  bool is_in(int round, size_t i) const { return rounds_.empty() || rounds_[i] == round; }
  int last_round() const;
  const double* clip_coef_on(int device) const;  // null: nothing is clipped
  void clip_on(int device);
  void run_on_cpu(double* sums);
  void run_on(int device, double* table, double* scratch);

  struct Pending {  // a slot whose sums come in several parts
    double* out;
    int64_t first, count;
    int columns;  // that are summed
  };
  // One parameter of a group that has a gradient; false: no kernel of ours can take it, and nothing was added.
  bool take(const std::optional<View>& w, PyObject* param, PyObject* grad, PyObject* buffer, PyObject* held,
            PyObject* master, bool first, const Group&, int i, int64_t slot, int64_t slot_count);
  // Where the slots of the next parameter begin, if they come one after another; the next ones begin behind them.
  int64_t next_slots(int64_t count, Stats);
  void cut(const Operands&, const Job&, double* table);

  std::vector<Operands> operands_;
  std::vector<Job> jobs_;
  std::vector<Hyper> hypers_;
  std::vector<py::object> owned_;   // gradients, or lists of what came as lists
  std::vector<PyObject*> written_;  // borrowed; the tuple that `check` returns owns them while `run` runs
  // What a tensor's place in memory was at the last step, in the order of reading. Between most steps nothing moves,
  // and the questions that only memory answers need not be asked again.
  std::optional<View> read(PyObject* object, bool is_kept);
  std::vector<Place> places_;
  size_t reading_ = 0;
  bool moved_ = true, complete_ = false, has_pairs_ = false, has_cuda_ = false;
  int measured_ = kCpu;
  py::object like_;  // none yet: nothing is measured so far

  int64_t slots_ = 0, parameters_ = 0, first_row_ = 0;
  std::vector<View> clip_coefs_;  // none: nothing is clipped
  std::vector<int64_t> slot_offsets_, told_offsets_;
  py::tuple offsets_;
  std::vector<int> rounds_, copies_first_;

  std::vector<Chunk> chunks_;
  std::vector<Strided> strided_;
  std::vector<double> partials_;
  std::vector<Pending> pending_;
  std::vector<cuda::SlotParts> slot_parts_;
};

}  // namespace nk
