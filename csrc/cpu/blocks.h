// blocks.h - how the output of a kernel that owns dW is cut into tasks, and a task's samples into chunks.
//
// The cut depends on shapes alone, never on the level or the number of threads, and every sum has one order:
// - an element of c_b is one chain of fused multiply-adds over t, of total and centred one chain over b;
// - |c_b|^2 is summed down each column over the rows of a unit in the real type, then in double.
// Every level's register tile divides a unit, so results are the same to the bit on every level with FMA hardware.
#pragma once
#include "../core/backend.h"
#include "../core/formulas.h"

namespace nk::cpu {

constexpr int kUnitCols = 32;
// Multiples of every level's rows per tile, of packed rows and of rows that are read where they lie.
constexpr int kUnitRows = 42, kUnitLines = 36;

// Rows and columns of the output are counted from the start of the group's. Rows come in runs, of which each begins a
// unit; a unit is `unit_rows` rows of one run.
struct Block {
  int64_t first_unit, units, unit_rows, run_rows;
  int64_t col, cols;  // col: a multiple of kUnitCols
  int64_t samples;    // per chunk
  int64_t box[3];     // output positions of a sample per chunk, a run of them in row-major order
  bool is_split;      // a sample takes more than one chunk
  // Elements of scratch, in the order in which they lie there.
  int64_t row_room, col_room, tile_room;
  int64_t own_bytes;  // besides
  int64_t group;      // of a convolution, unless that is the column
  char* scratch;
  double* sq_norms;  // of each sample, this block's part

  NK_HD int64_t rows_of_unit(int64_t unit) const {
    const int64_t rest = run_rows - unit % units_per_run() * unit_rows;
    return rest < unit_rows ? rest : unit_rows;
  }
  NK_HD int64_t units_per_run() const { return (run_rows + unit_rows - 1) / unit_rows; }
};

// What lies side by side in a register: the output channels of a group, where there are enough of them to fill it, else
// groups, or the input channels of a group. Rows are the rest of (output, input, tap), a run of them for each output
// channel unless that is the column.
enum class Columns : uint8_t { outputs, groups, inputs };

struct ConvBlock : Block {
  Columns columns;
  int64_t taps;
  // The window of x that a box of output positions looks at holds every step-th position; stride and dilation in those.
  int64_t step[3], stride[3], dilation[3];
  int64_t offset_room, plane_room;
  int64_t out_run, out_row, out_col, out_group;  // strides of the output

  NK_HD int64_t window(int d, int64_t positions, const int64_t* kernel) const {
    return (positions - 1) * stride[d] + (kernel[d] - 1) * dilation[d] + 1;
  }
};

}  // namespace nk::cpu
