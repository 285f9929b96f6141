// blocks.cpp - see blocks.h.
#include "blocks.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <numeric>
#include <utility>
#include <vector>

#include "parallel.h"

namespace nk::cpu {
namespace {

// Below this many multiply-adds one thread is faster than waking the pool.
constexpr int64_t kSerial = 1 << 17;
constexpr int64_t kMostTileRows = 14;
constexpr int64_t kRoomBytes = 16 * 64;  // what rounding to cache lines adds
constexpr int64_t kMostUnitCols = 512 / kUnitCols;
constexpr int64_t kMostRows = 512;
// Rows of the operands per chunk, if they are of several samples, and of one sample. Half as many cost convolutions a
// tenth: the sums come from L2 once per chunk.
constexpr int64_t kChunkSteps = 512, kMostSteps = 1024;

int64_t parts(int64_t n, int64_t most) { return (n + most - 1) / most; }
int64_t up(int64_t n, int64_t unit) { return parts(n, unit) * unit; }

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

// What it costs to bring one number of one position to where the tile reads it, in multiply-adds. Measured: rows copied
// with zeros around them or packed cost this much, what lies there already or is transposed a quarter.
constexpr double kPackOne = 32;

// So many blocks that each fits, and that 2 and 8 threads alike are busy to the end; smaller blocks pack more, which
// hurts the few threads for the sake of the many. `cost(rows, cols)` of a block.
template <class Cost>
Grid cut(int64_t row_units, int64_t unit_rows, int64_t col_units, int64_t groups, const Cost& cost) {
  const int64_t least_rows = parts(row_units, std::max<int64_t>(1, kMostRows / unit_rows));
  const int64_t least_cols = parts(col_units, kMostUnitCols);
  Grid best{least_rows, least_cols};
  double least = 0;
  for (int64_t i = least_rows; i <= std::min(row_units, least_rows + 8); i++)
    for (int64_t j = least_cols; j <= std::min(col_units, least_cols + 8); j++) {
      const double mean = cost((double)unit_rows * row_units / i, (double)kUnitCols * col_units / j);
      const double most = cost((double)unit_rows * parts(row_units, i), (double)kUnitCols * parts(col_units, j));
      auto time = [&](int64_t threads) { return threads * ((parts(i * j * groups, threads) - 1) * mean + most); };
      const double weighed = 3 * time(2) + time(8);
      if (least == 0 || weighed < least) least = weighed, best = {i, j};
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
  if (bytes) {  // the memory of empty tensors is null, which memset is never to see
    std::memset(sums.total, 0, bytes);
    if (sums.centred) std::memset(sums.centred, 0, bytes);
  }
  std::fill(sums.sq_norms, sums.sq_norms + batch, 0.0);
}

// ---- The tasks ----------------------------------------------------------------------------------------------------

// What a call sums, whatever it is made of.
struct Call {
  DType dtype;
  int64_t batch, size, work;  // coordinates of the output, multiply-adds
  const SampleSums& sums;
};

// `cost(rows, cols)` of a block, `rooms(block, rows, cols)` sets how much scratch of its own it takes, `one(block)`
// runs it.
template <class AnyBlock, class Cost, class Rooms, class One>
void run_blocks(const Call& call, AnyBlock all, int64_t runs, int64_t cols, int64_t groups, const Cost& cost,
                const Rooms& rooms, const One& one) {
  const int64_t row_units = runs * all.units_per_run(), col_units = parts(cols, kUnitCols);
  const Grid grid = cut(row_units, all.unit_rows, col_units, groups, cost);
  const int64_t most_rows = all.unit_rows * parts(row_units, grid.rows);
  const int64_t most_cols = kUnitCols * parts(col_units, grid.cols);
  rooms(all, most_rows, most_cols);
  all.tile_room = most_rows * most_cols * (1 + (call.sums.centred != nullptr) + all.is_split);
  const int64_t bytes = all.own_bytes + 8 * kUnitCols * all.samples + kRoomBytes +
                        real_size(call.dtype) * (all.row_room + all.col_room + all.tile_room +
                                                 (kUnitCols + 2) * all.samples + kMostTileRows * kUnitCols);
  const int64_t blocks = grid.rows * grid.cols, count = blocks * groups;
  std::vector<double> norms(count * call.batch);
  parallel_for_each(count, call.work > kSerial, [&](int64_t task) {
    AnyBlock block = all;
    const int64_t i = task % grid.rows, j = task / grid.rows % grid.cols;
    block.group = task / blocks;
    block.first_unit = i * row_units / grid.rows;
    block.units = (i + 1) * row_units / grid.rows - block.first_unit;
    block.col = j * col_units / grid.cols * kUnitCols;
    block.cols = std::min(cols, (j + 1) * col_units / grid.cols * kUnitCols) - block.col;
    block.scratch = thread_scratch(bytes);
    block.sq_norms = norms.data() + task * call.batch;
    one(block);
  });
  for (int64_t b = 0; b < call.batch; b++) {
    double sum = 0;
    for (int64_t task = 0; task < count; task++) sum += norms[task * call.batch + b];
    call.sums.sq_norms[b] = sum;
  }
}

// ---- Convolutions -------------------------------------------------------------------------------------------------

bool is_pointwise(const Conv& conv) {
  for (int d = 0; d < 3; d++)
    if (conv.kernel[d] != 1 || conv.stride[d] != 1 || conv.padding[d] != 0 || conv.in[d] != conv.out[d]) return false;
  return true;
}

// Without a window x and g are the same kind of thing: what there is more of fills the columns.
Conv swapped(const Conv& conv) {
  Conv other = conv;
  std::swap(other.x, other.g);
  std::swap(other.x_sample, other.g_sample);
  std::swap(other.x_channel, other.g_channel);
  std::swap(other.x_space, other.g_space);
  std::swap(other.inputs, other.outputs);
  return other;
}

// Registers of multiply-adds per position. Where rows are as wide as columns every one of them loads a register, and
// runs half as fast; so does a tile of a few rows.
Columns best_columns(const Conv& conv, int64_t taps) {
  const int64_t inputs = conv.inputs, outputs = conv.outputs, groups = conv.groups;
  const int64_t by_outputs = groups * inputs * taps * parts(outputs, kUnitCols);
  const int64_t by_groups = 2 * outputs * inputs * taps * parts(groups, kUnitCols);
  const int64_t by_inputs = 2 * groups * outputs * std::max<int64_t>(taps, 4) * parts(inputs, kUnitCols);
  if (by_outputs <= std::min(by_groups, by_inputs)) return Columns::outputs;
  return by_groups <= by_inputs ? Columns::groups : Columns::inputs;
}

void set_window(const Conv& conv, ConvBlock& block) {
  for (int d = 0; d < 3; d++) {
    const int64_t step = conv.kernel[d] > 1 ? std::gcd(conv.stride[d], conv.dilation[d]) : conv.stride[d];
    block.step[d] = step;
    block.stride[d] = conv.stride[d] / step;
    block.dilation[d] = conv.kernel[d] > 1 ? conv.dilation[d] / step : 1;
  }
}

}  // namespace

void outer_moments(const Outer& outer) {
  const int64_t size = outer.outputs * outer.inputs, work = outer.batch * outer.steps * size;
  if (work == 0) return set_zero(outer.sums, size * real_size(outer.dtype), outer.batch);
  Block block{};
  const int64_t extent[3] = {1, 1, outer.steps};
  cut_steps(extent, outer.batch, block);
  block.unit_rows = kUnitRows;
  block.run_rows = outer.outputs;
  const Isa& isa = table();
  run_blocks(
      {outer.dtype, outer.batch, size, work, outer.sums}, block, 1, outer.inputs, 1,
      [](double rows, double cols) { return rows * cols + kPackOne * (rows + cols); },
      [](Block& block, int64_t rows, int64_t cols) {
        block.row_room = rows * block.samples * block.box[2];
        block.col_room = cols * block.samples * block.box[2];
      },
      [&](const Block& block) { isa.outer(outer, block); });
}

void conv_moments(const Conv& asked) {
  int64_t taps = 1, positions = 1;
  for (int d = 0; d < 3; d++) taps *= asked.kernel[d], positions *= asked.out[d];
  const int64_t size = asked.groups * asked.outputs * asked.inputs * taps, work = asked.batch * positions * size;
  if (work == 0 || asked.in[0] * asked.in[1] * asked.in[2] == 0)
    return set_zero(asked.sums, size * real_size(asked.dtype), asked.batch);
  const bool swaps = is_pointwise(asked) &&
                     asked.outputs * parts(asked.inputs, kUnitCols) < asked.inputs * parts(asked.outputs, kUnitCols);
  const Conv conv = swaps ? swapped(asked) : asked;

  ConvBlock block{};
  cut_steps(conv.out, conv.batch, block);
  set_window(conv, block);
  block.columns = best_columns(conv, taps);
  block.taps = taps;
  block.unit_rows = kUnitLines;
  // Of the output as asked for: (groups, outputs, inputs, taps).
  const int64_t of_input = taps, of_output = asked.inputs * taps, of_group = asked.outputs * of_output;
  const int64_t to_input = swaps ? of_output : of_input, to_output = swaps ? of_input : of_output;
  block.out_group = of_group;
  int64_t runs = conv.outputs, cols = 0, groups = conv.groups;
  switch (block.columns) {
    case Columns::outputs:
      runs = 1, cols = conv.outputs;
      block.run_rows = conv.inputs * taps;
      block.out_row = taps == 1 ? to_input : 1, block.out_col = to_output;
      break;
    case Columns::groups:
      cols = conv.groups, groups = 1;
      block.run_rows = conv.inputs * taps;
      block.out_run = to_output, block.out_row = taps == 1 ? to_input : 1, block.out_col = of_group;
      break;
    case Columns::inputs:
      cols = conv.inputs;
      block.run_rows = taps;
      block.out_run = to_output, block.out_row = 1, block.out_col = to_input;
      break;
  }
  double spread = 1;  // what is copied of x per position and channel
  bool in_place = item_size(conv.dtype) == real_size(conv.dtype);
  for (int d = 0; d < 3; d++) {
    const int64_t reach = (conv.out[d] - 1) * conv.stride[d] + (conv.kernel[d] - 1) * conv.dilation[d];
    in_place = in_place && conv.padding[d] <= 0 && reach - conv.padding[d] < conv.in[d];
    spread *= (double)block.window(d, block.box[d], conv.kernel) / block.box[d];
  }
  if (in_place) spread = 0.25;
  const Isa& isa = table();
  run_blocks(
      {conv.dtype, conv.batch, size, work, conv.sums}, block, runs, cols, groups,
      [&](double rows, double cols) {
        const double channels = std::max(1.0, std::min<double>(rows, block.run_rows) / taps);
        const double block_runs = std::max(1.0, rows / block.run_rows);
        switch (block.columns) {
          case Columns::outputs:
            return rows * cols + kPackOne * (channels * spread + cols / 4);
          case Columns::groups:
            return 2 * rows * cols + kPackOne * cols * (2 * channels * spread + block_runs / 4);
          case Columns::inputs:
            return 2 * rows * cols + kPackOne * cols * 2 * spread;
        }
        return 0.0;
      },
      [&](ConvBlock& block, int64_t rows, int64_t cols) {
        int64_t steps = 1, window = 1;
        for (int d = 0; d < 3; d++) steps *= block.box[d], window *= block.window(d, block.box[d], conv.kernel);
        const bool wide_rows = block.columns != Columns::outputs, wide_cols = block.columns != Columns::inputs;
        const int64_t run_rows = runs == 1 ? std::min(rows, block.run_rows) : block.run_rows;
        const int64_t channels = std::min((run_rows - 1) / taps + 2, parts(block.run_rows, taps));
        block.row_room = (wide_rows ? cols : 1) * block.samples * channels * window;
        block.col_room = (wide_cols ? cols : 1) * std::min(runs, rows / block.unit_rows) * block.samples * steps;
        block.plane_room = wide_rows ? kUnitCols * window : 0;
        block.offset_room = run_rows;
        block.own_bytes = real_size(conv.dtype) * block.plane_room + 8 * block.offset_room;
      },
      [&](const ConvBlock& block) { isa.conv(conv, block); });
}

}  // namespace nk::cpu
