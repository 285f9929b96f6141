// pass.h - one pass over lists of tensors, an optimizer step over any number of param groups for one: read and check
// everything, then run it all.
//
// Two phases, so that an error in the last group leaves the first one unwritten. The object belongs to Python; between
// steps it keeps only its allocations, the layout of the tensors' memory, and `hypers`.
#pragma once
#include <optional>
#include <vector>

#include "../core/backend.h"
#include "aliasing.h"
#include "gather.h"
#include "given_hyper.h"
#include "multipliers.h"
#include "tensor_cache.h"
#include "tensors.h"

namespace nk {

enum class Stats : int { none, tensor, row };

// How many slots a parameter has.
int64_t slot_count(PyObject* param, Stats);

class Pass {
 public:
  // Also drops what a step that failed had read.
  void begin();

  // For the caller, who may keep the Hyper of a group there for the next step.
  py::dict hypers;

  // What is given of one group of an optimizer, or of a bare call of an op, besides its tensors.
  struct GroupCall {
    const GivenHyper& hyper;
    Stats stats = Stats::none;
    int group = kNoGroup;
    const LrMultipliers* lr_multipliers = nullptr;  // of its parameters; held by the caller until `run`
    // Of the first parameter in the table of `sq_norms`; none: the next one there.
    std::optional<int64_t> row = std::nullopt;
    uint32_t first_parameter = 0;  // its index in the optimizer
  };

  // Lists of one group, each as long as params. Entries of `grads` that are None are skipped.
  struct Lists {
    const py::list &params, &grads;
    const py::object& buffers;  // None, or a list for each state buffer
    const py::object& first;    // None, or positions whose state holds nothing yet
    const py::object& held;     // None, or the first gradients of pairs, each None where there is no pair
    const py::object& masters;  // None, or the float32 copies of parameters, each None where there is none
    const py::object& slots;    // None, or where the slots of each parameter begin
    const py::object& counts;   // None, or tensors of one number: the steps that each parameter has taken
    const py::object& radii;    // None, or tensors of the norms to keep, each None to keep those that are there
  };

  // Reads one group for the op of this name. Returns the positions that no kernel takes, untouched: the caller decides
  // how they are stepped.
  std::vector<int> add(const std::string& op, const Lists&, const GroupCall&);

  // The same, with the gradients and state buffers that the parameters and the optimizer's state have, the buffers
  // under `keys`: no list is made for Python. `held`: None, or the first gradients of pairs. Returns false, and adds
  // nothing, if a buffer is missing or of another dtype than the Hyper's state_dtype, if no kernel takes a tensor, if
  // only one of a pair is there, or if only some parameters of a gauged group have gradients.
  bool add_whole(const std::string& op, const py::list& params, const py::object& state, const py::tuple& keys,
                 const GroupCall&, const py::object& held);

  // Throws if the tensors' memory overlaps in a way that has no meaning. After it, `run` cannot fail. Returns the
  // tensors that `run` writes: `last` itself if those are the same, so that most steps make no new tuple. The caller
  // holds it until the next step's.
  py::tuple check(const py::object& last);

  // Between `check` and `run`: |g|^2 of every parameter on the device of `table`, (parameters(),) float64 zeros, before
  // clipping. `new_scratch(size)`: float64 memory there.
  void sq_norms(const py::object& table, const py::object& new_scratch);
  int64_t parameters() const { return parameters_; }  // of all groups, with those that have no gradient
  std::vector<py::object> places() const;             // a tensor on each device that a kernel runs on

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
    RuleId rule;
    int64_t slot, slot_count;  // slot_count 0: no statistics
    bool by_row;
    int64_t row;  // of the table of `sq_norms`
    TensorNumbers numbers;
    void* count;      // on the host; null: none there
    PyObject* param;  // borrowed
    bool rounds_at_random = false;
    uint32_t parameter = 0;
    int64_t norms = 1;              // that are kept, of a rule that keeps them
    const double* radii = nullptr;  // null: the norms that are there
  };
  // What is measured is measured on one device: the first's.
  bool measures_on(int device, PyObject* param);
  bool runs_dense(const Operands&, const Job&, bool by_row) const;
  Strided strided_of(const Operands&) const;
  // As a chunk: not measured, dense; at the end of `to`.
  Chunk whole_tensor(const Operands&, const Job&) const;
  Chunk& add_whole_tensor(std::vector<Chunk>& to, const Operands&, const Job&) const;
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
  struct Group {  // a GroupCall that has been read
    const Op& op;
    RuleId rule;
    Stats stats;
    int index;
    std::optional<int> device_of_numbers;
    const LrMultipliers* lr_multipliers;
    uint32_t first_parameter;
  };
  Group read_group(const std::string& name, const GroupCall& call);

  // The tensors of one parameter that has a gradient, besides its view, which was read at `first_read`.
  struct Given {
    PyObject *param, *grad;
    PyObject* buffers[kMostBuffers];
    PyObject *held, *master, *count;  // null or None: none
    PyObject* radius;                 // the same
    bool first;
    size_t first_read = 0;
  };
  // Their views as of now; null: no kernel takes the tensor, or there is none.
  struct Views {
    const View *w, *g, *v[kMostBuffers], *h, *master, *count, *radius;
  };
  // Returns false if no kernel takes it, and nothing was added.
  bool take(const View* w, const Given&, const Group&, int i, int64_t slot, int64_t slot_count);
  static bool fit(const Views&, const Traits&, const Given&);
  void count_steps_on_host();
  // Throws for shapes and memory that have no meaning.
  static Operands operands_of(const Views&, const Group&, const Traits&, const Given&, int i);
  // Reads the norms that a step is to keep. Returns false if no kernel can; throws for weights without a norm.
  bool take_norms(const View& w, const Views&, const Given&, const Group&, int i, Job&) const;
  // Where the slots of the next parameter begin, if they come one after another; the next ones begin behind them.
  int64_t next_slots(int64_t count, Stats);
  void cut(const Operands&, const Job&, double* table);
  KeptTensor kept_tensor(const Operands&, const Job&, double* table);

  // Those of the last step stay: a parameter whose tensors are all as they were need not be checked again.
  std::vector<Operands> operands_;
  size_t taken_ = 0;  // of them, in this step
  std::vector<Job> jobs_;
  std::vector<Hyper> hypers_;
  std::vector<py::object> owned_;   // gradients, or lists of what came as lists
  std::vector<PyObject*> written_;  // borrowed; the tuple that `check` returns owns them while `run` runs
  // Where each tensor was in memory at the last step, in the order of reading. Between most steps nothing moves, and
  // the order of the rounds need not be found again.
  void begin_parameter();  // views that are read for one stay valid until the next begins
  const View* read(PyObject* object, bool is_kept);
  std::vector<CachedView> cached_;
  size_t reading_ = 0;
  bool changed_ = false;  // something of this parameter, since the last step
  bool moved_ = true, complete_ = false, has_pairs_ = false, has_cuda_ = false;
  int measured_ = kCpu;
  py::object like_;  // none yet: nothing is measured so far

  int64_t slots_ = 0, parameters_ = 0, first_row_ = 0;
  std::vector<View> clip_coefs_;  // none: nothing is clipped
  std::vector<int64_t> slot_offsets_, last_offsets_;
  py::tuple offsets_;
  std::vector<int> rounds_, copies_first_;

  std::vector<Chunk> chunks_;
  std::vector<KeptTensor> kept_;
  std::vector<Strided> strided_;
  std::vector<double> partials_;
  std::vector<Pending> pending_;
  std::vector<cuda::SlotParts> slot_parts_;
};

}  // namespace nk
