// outer.cpp - the per-sample outer products of a linear layer, compiled once for each ISA level. No torch, no STL.
#include "kernels.h"
#include "pack.h"
#include "sweep.h"

namespace nk::cpu::NK_ISA {
namespace {

template <class R> using Kernel = void (*)(const Tile<R>&);

template <class T> struct Matrices {
  using R = Real<T>;
  static constexpr int kRows = kTileRows, kCols = kTileCols<R>;

  const Outer& outer;
  const Block& block;
  R *rows, *cols;
  int64_t samples = 0, steps = 0;

  int64_t extent(int d) const { return d < 2 ? 1 : outer.steps; }
  int64_t first_row() const { return block.first_unit * kUnitRows; }

  void pack(int64_t b, int64_t n, const Box& box) {
    samples = n, steps = box.n[2];
    const int64_t t = box.first[2], last = first_row() + block.units * kUnitRows;
    pack_rows<kCols>((const T*)outer.a + b * outer.a_sample + t * outer.a_step + block.col, outer.a_sample,
                     outer.a_step, n, steps, block.cols, cols);
    pack_rows<kRows>((const T*)outer.g + b * outer.g_sample + t * outer.g_step + first_row(), outer.g_sample,
                     outer.g_step, n, steps, (last < outer.outputs ? last : outer.outputs) - first_row(), rows);
  }

  void place(Tile<R>& tile, int64_t i, int64_t, int64_t, int64_t panel) const {
    tile.steps = steps;
    tile.rows = rows + i * samples * steps * kRows;
    tile.cols = cols + panel * samples * steps * kCols;
    tile.row_sample = steps * kRows;
    tile.col_sample = steps * kCols;
  }

  template <int... M> static void run(const Tile<R>& tile, int rows, Numbers<M...>) {
    static constexpr Kernel<R> kernels[] = {packed<R, M + 1>...};
    kernels[rows - 1](tile);
  }
  void run(const Tile<R>& tile, int rows) const { run(tile, rows, CountTo<kRows>{}); }

  bool is_zero(const Tile<R>& tile) const {
    return all_zero(tile.rows, steps * kRows) || all_zero(tile.cols, steps * kCols);
  }

  void write(const R* from, int64_t n, int64_t width, R* out, int64_t unit, int64_t row, int64_t panel) const {
    out += (first_row() + unit * kUnitRows + row) * outer.inputs + block.col + panel * kCols;
    for (int64_t i = 0; i < n; i++) __builtin_memcpy(out + i * outer.inputs, from + i * kCols, width * sizeof(R));
  }
};

template <class T> void run(const Outer& outer, const Block& block) {
  Scratch scratch{block.scratch};
  using R = Real<T>;
  Matrices<T> operands{outer, block, scratch.take<R>(block.row_room), scratch.take<R>(block.col_room)};
  Sweep<R, Matrices<T>>(operands, block, outer.batch, outer.sums, scratch).run();
}

}  // namespace

void outer(const Outer& outer, const Block& block) {
  dispatch(outer.dtype, [&](auto type) { run<decltype(type)>(outer, block); });
}

}  // namespace nk::cpu::NK_ISA
