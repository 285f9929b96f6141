// backend.h - the contract between the binding and the back ends: plain structs and, per op, one function for each.
#pragma once
#include <stdint.h>

#include "formulas.h"

namespace nk {

// Coordinates per chunk: one constant for every back end, so that sums do not depend on the back end.
// Measured: 32k with dynamic scheduling is within 3 % of the best for lists of small tensors and for one large one.
constexpr int64_t kChunk = 32768;

// Shape and strides, in elements, of tensors that do not share one dense layout.
struct Strided {
  int ndim;
  const int64_t *shape, *w, *g, *v[kMostBuffers], *h, *master;
};

// A run of coordinates of one tensor. Dense: the pointers are those of its first coordinate. Strided: they are the
// tensor's, and the chunk is [begin, begin + size) in row-major order of the shape.
struct Chunk {
  void* w;
  const void* g;
  void* v[kMostBuffers];   // the rule's state; null where it keeps none
  const void* h;           // the first gradient of a pair, of which g is the second; else null
  const Strided* strided;  // null: dense
  int64_t begin, size;
  int64_t slot_size;  // coordinates per slot of the statistics; the chunk starts at a slot's start or inside one slot
  double* sums;  // null: no statistics; else a row for each slot the chunk touches: StepSums, of a pair PairSums too
  int columns;   // from one row to the next
  const Hyper* hyper;
  RuleId rule;
  DType dtype;  // of w, g and h
  DType v_dtype[kMostBuffers];
  // A copy of w in float32 that takes its place: w is what that is rounded to. Null: none.
  float* master = nullptr;
  bool rounds_at_random = false;  // w, as hyper->rounding says; then coordinates are counted in row-major order
  uint32_t parameter = 0;         // the tensor's index in the optimizer
  TensorNumbers numbers;
  Turn turn;  // of a second pass on a sphere
};

// The coordinates [begin, begin + size) of a chunk; its sums are left to the caller.
[[maybe_unused]] static Chunk part_of(const Chunk& whole, int64_t begin, int64_t size) {
  Chunk c = whole;
  c.begin += begin, c.size = size;
  if (c.strided || begin == 0) return c;
  const int64_t bytes = begin * item_size(c.dtype);
  c.w = static_cast<char*>(c.w) + bytes;
  c.g = static_cast<const char*>(c.g) + bytes;
  for (int k = 0; k < kMostBuffers; k++)
    if (c.v[k]) c.v[k] = static_cast<char*>(c.v[k]) + begin * item_size(c.v_dtype[k]);
  if (c.h) c.h = static_cast<const char*>(c.h) + bytes;
  if (c.master) c.master += begin;
  return c;
}

// A tensor whose norm, or that of each of its rows, a step keeps. `whole` has all of it; `sums` and `slot_size` there
// are those of the statistics: one slot, or one for each row.
struct KeptTensor {
  Chunk whole;
  int64_t slots;        // whose norms are kept
  const double* radii;  // of each; null: the norms that they have
};

// Whether its streams differ in how they are stored.
NK_HD bool is_mixed(const Chunk& c) {
  bool is = c.master || c.rounds_at_random;
  for (int k = 0; k < kMostBuffers; k++) is = is || (c.v[k] && c.v_dtype[k] != c.dtype);
  return is;
}

NK_HD Measure measure_of(const Chunk& c) { return c.h ? Measure::pair : c.sums ? Measure::step : Measure::nothing; }

// What a kernel that owns dW sums over the samples b of a batch, c_b being the contribution of one: total = sum_b c_b,
// centred = sum_b (c_b - mean c)^2 elementwise, sq_norms[b] = |c_b|^2. Written whole, never read.
struct SampleSums {
  void *total, *centred;  // dense, of the real type; centred null: not wanted
  double* sq_norms;
  double* scratch;  // of a CUDA device: outer_scratch(), conv_scratch() unwritten numbers
};

// c_b = g_b^T a_b, of shape (outputs, inputs). Strides in elements; a and g are dense along their last dimension.
struct Outer {
  DType dtype;
  int64_t batch, steps, outputs, inputs;  // B, T, O, I
  const void *a, *g;
  int64_t a_sample, a_step, g_sample, g_step;
  SampleSums sums;
};

// c_b[o, i, k] = sum_h g_b[o, h] x_b[i, h stride + k dilation - padding] within each of `groups` groups, x being zero
// outside. Three space dimensions, the first ones 1 where there are fewer; the last one is dense.
struct Conv {
  DType dtype;
  int64_t batch, groups, outputs, inputs;  // channels of one group
  int64_t in[3], out[3], kernel[3], stride[3], padding[3], dilation[3];
  const void *x, *g;
  int64_t x_sample, x_channel, x_space[2], g_sample, g_channel, g_space[2];
  SampleSums sums;  // (groups outputs, inputs, *kernel)
};

// The samples of one tensor as a matrix: row b begins row_stride elements after row b-1. Its columns are the
// coordinates of `mean`, in the order of their memory.
struct Samples {
  const void* x;
  int64_t row_stride, columns;
  int ndim;  // 0: a row's columns lie side by side; else they are counted in these dimensions, the last one fastest
  const int64_t *shape, *strides;
  void *mean, *centred;  // in the arithmetic type
};

// Mean and sum of squared deviations of every column, and |row|^2 over all tensors.
struct Moments {
  const Samples* samples;
  int64_t count, rows;
  bool squares;    // else `centred` is not written
  double factor;   // of `centred`, as it is written
  double* row_sq;  // (rows)
  double* totals;  // |mean|^2, sum of all squared deviations (NaN without squares)
  DType dtype;
  double* scratch;  // of a CUDA device: moments_scratch() unwritten numbers
};

// The sum of every row of a matrix, or of its squares, in double.
struct RowSums {
  const void* x;  // columns lie side by side
  int64_t rows, columns, row_stride;
  bool squares;
  double* out;
  DType dtype;
  double* scratch;  // of a CUDA device: row_sums_scratch() unwritten numbers
};

// raw = sum_b c_b^2 becomes sum_b (c_b - mean)^2, in place; total = sum_b c_b.
struct SecondMoments {
  void* raw;
  const void* total;  // both dense, f64 or f32
  int64_t count;
  double share, least;  // see `Recentred`
  DType dtype;
};

// Of each sample of a normalisation layer: sums down the columns or along the rows of (rows, columns).
struct NormTensor {
  const void* x;
  int64_t sample_stride, row_stride;  // columns lie side by side
};
struct NormBatch {
  NormTensor g, x;
  int64_t samples, rows, columns;
  const void *mean, *rstd;  // (samples, rows) in the arithmetic type; mean null: zeros
  bool along_rows;
  void *of_weight, *of_bias;  // (samples, columns), along rows (samples, rows), in the arithmetic type
  DType dtype;
};

// An embedding's gradients g (samples, positions, columns), of which id says which row of the table they belong to.
struct EmbeddingBatch {
  const int64_t* ids;  // (samples, positions), from 0 to table_rows - 1
  // Of a CUDA device: positions by id, and in their order within one; where those of each id begin (table_rows + 1).
  const int64_t *order, *begin;
  const void* g;
  int64_t sample_stride, position_stride;  // columns lie side by side
  int64_t samples, positions, columns, table_rows;
  int64_t padding;  // an id that counts for nothing, or -1
  bool squares;     // else `centred` is not written
  // (table_rows, columns) in the arithmetic type. On the CPU zeros: rows without an id are left alone.
  void *total, *centred;
  double* row_sq;  // (samples)
  DType dtype;
  double* scratch;  // of a CUDA device: embedding_scratch() unwritten numbers
};

namespace cpu {
using ParallelFor = int (*)(int64_t begin, int64_t end, int64_t grain, void (*)(int64_t, int64_t, void*),
                            void* context);
void set_parallel_for(ParallelFor);  // torch's own pool

const char* isa();                            // the level in use
int supported(const char** names, int room);  // levels that this binary has and this machine can run, best first
bool select_isa(const char* name);            // false: not one of them

// Any order, any thread; each chunk writes its own sums. `coordinates`: of all chunks together.
void run(const Chunk* chunks, int64_t count, int64_t coordinates);
// Two passes over each tensor or row, back to back. Sums of statistics are added to what is there.
void run_on_sphere(const KeptTensor* tensors, int64_t count, int64_t coordinates);
// |g|^2 of each chunk, of a pair that of its combination, in `sums`: in user units, before clipping.
void sq_norms(const Chunk* chunks, int64_t count, int64_t coordinates);

void outer_moments(const Outer&);
void conv_moments(const Conv&);
void moments(const Moments&);
void row_sums(const RowSums&);
bool recentre(const SecondMoments&);  // false: digits were lost somewhere
void norm_sums(const NormBatch&);
void embedding_moments(const EmbeddingBatch&);
}  // namespace cpu

namespace cuda {
// Coordinates that one block of threads takes: a slot that has more is summed in parts.
constexpr int64_t kBlock = 8192;
NK_HD constexpr int64_t parts(int64_t slot_size) { return slot_size <= kBlock ? 1 : (slot_size + kBlock - 1) / kBlock; }

// Slots whose sums come in `parts` parts each, one after another, every one a row; no parts: zeros.
struct SlotParts {
  double* out;
  const double* parts_of_first;
  int64_t slots, parts;
  int own;  // columns that are summed
};

// How many steps a parameter has taken, in the device's memory.
struct Count {
  void* at;
  bool is_double;  // else a float
};

struct Queue {  // where to launch
  int device;
  void* stream;
};

// The functions of the back end. `const char*`: an error message, or null. Nothing waits for the device.
struct Kernels {
  // Chunks are whole tensors of one device, with slots of equal size; `sums` of a tensor whose slots come in parts is
  // where the parts go, one row after another. Each change of hyper, rule, dtype or of what is measured is another
  // launch, so the caller sorts the chunks by those.
  const char* (*run)(const Chunk* chunks, int64_t count, const Queue&);
  // |g|^2 of each tensor, as cpu::sq_norms has it of chunks; parts(size) of them, one after another, in `sums`.
  const char* (*sq_norms)(const Chunk* chunks, int64_t count, const Queue&);
  // The root of the sum of `count` of them, and the coefficient that clips by it; NaN as the norm of a step that is
  // skipped.
  const char* (*clip_coef)(const double* sq_norms, int64_t count, double max_norm, double* norm, double* coef,
                           const float* found_inf, const Queue&);
  // Before all runs: one more step.
  const char* (*count_steps)(const Count* counts, int64_t count, const float* found_inf, const Queue&);
  // After all runs: adds up the parts, in their order.
  const char* (*add_parts)(const SlotParts* slots, int64_t count, int columns, const float* found_inf, const Queue&);
  // Before all runs: rows of NaN.
  const char* (*fill_nan)(double* table, int64_t size, const float* found_inf, const Queue&);

  // Ops over samples. All memory is the device's.
  int64_t (*outer_scratch)(const Outer&);
  const char* (*outer_moments)(const Outer&, const Queue&);
  int64_t (*conv_scratch)(const Conv&);
  const char* (*conv_moments)(const Conv&, const Queue&);
  int64_t (*moments_scratch)(const Moments&);
  const char* (*moments)(const Moments&, const Queue&);
  int64_t (*row_sums_scratch)(const RowSums&);
  const char* (*row_sums)(const RowSums&, const Queue&);
  const char* (*norm_sums)(const NormBatch&, const Queue&);
  // An id that is not in the table is in no row, and leaves NaN in row_sq of its sample.
  int64_t (*embedding_scratch)(const EmbeddingBatch&);
  const char* (*embedding_moments)(const EmbeddingBatch&, const Queue&);

  // The compute capabilities, 80 for 8.0, that the binary has machine code for.
  int (*architectures)(int* capabilities, int room);
};
}  // namespace cuda

// Null in a binary that was built without CUDA: then the binding takes no CUDA tensor.
extern const cuda::Kernels* cuda_kernels;

}  // namespace nk
