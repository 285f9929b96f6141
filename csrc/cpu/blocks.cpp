// blocks.cpp - see blocks.h.
#include "blocks.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "share.h"

namespace nk::cpu {
namespace {

// Below this many multiply-adds one thread is faster than waking the pool.
constexpr int64_t kSerial = 1 << 17;
constexpr int64_t kMostUnitCols = 512 / kUnitCols;
constexpr int64_t kMostRows = 512;
constexpr int64_t kChunkSteps = 256;  // rows of the operands per chunk, if they are of several samples
constexpr int64_t kMostSteps = 512;   // of one sample

int64_t parts(int64_t n, int64_t most) { return (n + most - 1) / most; }
int64_t up(int64_t n, int64_t unit) { return parts(n, unit) * unit; }
int64_t item(DType dtype) { return dtype == DType::f64 ? 8 : 4; }

struct Free {
  void operator()(char* p) const { std::free(p); }
};

// Kept by the thread: to fault in a few megabytes anew takes as long as a small layer.
char* thread_scratch(int64_t bytes) {
  thread_local std::unique_ptr<char, Free> room;
  thread_local int64_t size = 0;
  if (bytes > size) {
    room.reset();
    size = 0;
    room.reset(static_cast<char*>(std::aligned_alloc(64, up(bytes, 64))));
    if (!room) throw std::bad_alloc();
    size = bytes;
  }
  return room.get();
}

// ---- The cut ------------------------------------------------------------------------------------------------------

struct Grid {
  int64_t rows, cols;  // blocks, of row units and of column units
};

// So many blocks that each fits, and that 2 and 8 threads alike are busy to the end. A block of r x c packs r + c
// operands; that one costs as much as kPacking multiply-adds is measured.
Grid cut(int64_t row_units, int64_t unit_rows, int64_t col_units, int64_t groups) {
  constexpr double kPacking = 32;
  const int64_t least_rows = parts(row_units, std::max<int64_t>(1, kMostRows / unit_rows));
  const int64_t least_cols = parts(col_units, kMostUnitCols);
  Grid best{least_rows, least_cols};
  double least = 0;
  for (int64_t i = least_rows; i <= std::min(row_units, least_rows + 8); i++)
    for (int64_t j = least_cols; j <= std::min(col_units, least_cols + 8); j++) {
      const double rows = (double)unit_rows * row_units / i, cols = (double)kUnitCols * col_units / j;
      const double most_rows = (double)unit_rows * parts(row_units, i),
                   most_cols = (double)kUnitCols * parts(col_units, j);
      auto cost = [](double r, double c) { return r * c + kPacking * (r + c); };
      double time = 0;
      for (int64_t threads : {2, 8})
        time += threads * ((parts(i * j * groups, threads) - 1) * cost(rows, cols) + cost(most_rows, most_cols));
      if (least == 0 || time < least) least = time, best = {i, j};
    }
  return best;
}

// Samples per chunk, or the box of positions if one sample takes several.
void cut_steps(const int64_t (&extent)[3], int64_t batch, Block& block) {
  int64_t steps = 1;
  for (int d = 0; d < 3; d++) steps *= block.box[d] = extent[d];
  block.samples = 1;
  block.is_split = steps > kMostSteps;
  if (!block.is_split) {
    const int64_t most = std::max<int64_t>(1, kChunkSteps / steps);
    block.samples = parts(batch, parts(batch, most));
    return;
  }
  for (int d = 0; d < 3; d++) {
    const int64_t inner = steps / extent[d];
    if (inner < kMostSteps) {
      block.box[d] = parts(extent[d], parts(extent[d], kMostSteps / inner));
      return;
    }
    block.box[d] = 1;
    steps = inner;
  }
}

void set_zero(const SampleSums& sums, int64_t bytes, int64_t batch) {
  std::memset(sums.total, 0, bytes);
  if (sums.centred) std::memset(sums.centred, 0, bytes);
  std::fill(sums.sq_norms, sums.sq_norms + batch, 0.0);
}

}  // namespace

void outer_moments(const Outer& outer) {
  const int64_t size = outer.outputs * outer.inputs, work = outer.batch * outer.steps * size;
  if (work == 0) return set_zero(outer.sums, size * item(outer.dtype), outer.batch);
  Block all{};
  const int64_t extent[3] = {1, 1, outer.steps};
  cut_steps(extent, outer.batch, all);
  all.unit_rows = kUnitRows;
  all.run_rows = outer.outputs;
  const int64_t row_units = all.units_per_run(), col_units = parts(outer.inputs, kUnitCols);
  const Grid grid = cut(row_units, kUnitRows, col_units, 1);
  const int64_t rows = kUnitRows * parts(row_units, grid.rows), cols = kUnitCols * parts(col_units, grid.cols);
  const int64_t chunk = all.samples * all.box[2], count = grid.rows * grid.cols;
  all.row_room = rows * chunk;
  all.col_room = cols * chunk;
  all.tile_room = rows * cols * (1 + (outer.sums.centred != nullptr) + all.is_split);

  const int64_t fixed =
      8 * kUnitCols * all.samples + item(outer.dtype) * ((kUnitCols + 2) * all.samples + 14 * kUnitCols);
  const int64_t bytes = fixed + item(outer.dtype) * (all.row_room + all.col_room + all.tile_room) + 8 * 64;
  std::vector<double> norms(count * outer.batch);
  const Isa& isa = table();
  share(count, work > kSerial, [&](int64_t task) {
    Block block = all;
    const int64_t i = task % grid.rows, j = task / grid.rows;
    block.first_unit = i * row_units / grid.rows;
    block.units = (i + 1) * row_units / grid.rows - block.first_unit;
    block.col = j * col_units / grid.cols * kUnitCols;
    block.cols = std::min(outer.inputs, (j + 1) * col_units / grid.cols * kUnitCols) - block.col;
    block.scratch = thread_scratch(bytes);
    block.sq_norms = norms.data() + task * outer.batch;
    isa.outer(outer, block);
  });
  for (int64_t b = 0; b < outer.batch; b++) {
    double sum = 0;
    for (int64_t task = 0; task < count; task++) sum += norms[task * outer.batch + b];
    outer.sums.sq_norms[b] = sum;
  }
}

}  // namespace nk::cpu
