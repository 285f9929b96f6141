// tile.h - the register tile: c_b of a few rows and two registers of columns, summed over t without leaving the
// registers, then squared, added and forgotten.
#pragma once
#include "blocks.h"
#include "simd.h"

namespace nk::cpu::NK_ISA {
namespace {

// 14 x 2 of 32 registers, 6 x 2 of 16: what is left holds two of columns and one of a row. Measured against 8 x 3,
// 6 x 4 and 4 x 3, which are no faster and waste more columns.
constexpr int kTileRows = kRegister == 64 ? 14 : 6;
template <class R> constexpr int kLane = kRegister / (int)sizeof(R);
template <class R> constexpr int kTileCols = 2 * kLane<R>;
template <class R> using Register = Side<R, kLane<R>>;
template <class R> using Part = typename Register<R>::Part;

// Of rows that are read where they lie each needs an address of its own, and there are 16 registers for those.
constexpr int kTileLines = kRegister == 64 ? 9 : 6;

static_assert(kUnitRows % kTileRows == 0 && kUnitLines % kTileLines == 0 && kUnitCols % kTileCols<float> == 0);

// 0, 1, ..., N-1, for a table with a kernel for every number of rows.
template <int... I> struct Numbers {};
template <int N, int... I> struct Count : Count<N - 1, N - 1, I...> {};
template <int... I> struct Count<0, I...> {
  using type = Numbers<I...>;
};
template <int N> using CountTo = typename Count<N>::type;

// One tile and the samples of one chunk.
template <class R> struct Tile {
  int64_t samples, steps;
  const R *rows, *cols;            // of the first sample
  int64_t row_sample, col_sample;  // to the next
  R *total, *centred;              // centred null: not wanted
  R* c;                            // of a sample that takes more than one chunk
  bool opens, closes;              // this chunk is the first, the last of its samples
  const R *minus_n, *share;        // of each sample, see YoungsCramer
  R* squares;                      // of each sample, a sum down each column of the unit
  double* lanes;                   // of each sample kUnitCols sums; this tile's begin here
  bool begins_unit, ends_unit;
  int64_t valid;  // columns that are not padding
};

template <class R, int M> NK_HD void open(const Tile<R>& tile, Part<R> (&c)[M][2]) {
#pragma GCC unroll 16
  for (int i = 0; i < M; i++)
#pragma GCC unroll 2
    for (int j = 0; j < 2; j++) {
      if (tile.opens)
        c[i][j] = Part<R>{};
      else
        __builtin_memcpy(&c[i][j], tile.c + i * kTileCols<R> + j * kLane<R>, kRegister);
    }
}

template <class R, int M, bool kSquares>
NK_HD void add_sample(const Tile<R>& tile, int64_t b, const Part<R> (&c)[M][2], Register<R> (&squares)[2]) {
  constexpr Width<kLane<R>> width;
  const auto minus_n = Register<R>::all(tile.minus_n[b]), share = Register<R>::all(tile.share[b]);
#pragma GCC unroll 16
  for (int i = 0; i < M; i++)
#pragma GCC unroll 2
    for (int j = 0; j < 2; j++) {
      const int at = i * kTileCols<R> + j * kLane<R>;
      const Register<R> x{{c[i][j]}};
      Register<R> total = load(tile.total + at, width);
      if constexpr (kSquares) {
        Register<R> centred = load(tile.centred + at, width);
        YoungsCramer::add(total, centred, x, minus_n, share);
        store(tile.centred + at, centred);
      } else {
        total = total + x;
      }
      store(tile.total + at, total);
      squares[j] = fma(x, x, squares[j]);
    }
}

template <class R, int M> NK_HD void close(const Tile<R>& tile, int64_t b, const Part<R> (&c)[M][2]) {
  constexpr int kCols = kTileCols<R>;
  constexpr Width<kLane<R>> width;
  if (tile.c)
#pragma GCC unroll 16
    for (int i = 0; i < M; i++)
#pragma GCC unroll 2
      for (int j = 0; j < 2; j++) __builtin_memcpy(tile.c + i * kCols + j * kLane<R>, &c[i][j], kRegister);
  if (!tile.closes) return;
  R* kept = tile.squares + b * kCols;
  Register<R> squares[2] = {Register<R>::all(0), Register<R>::all(0)};
  if (!tile.begins_unit)
    for (int j = 0; j < 2; j++) squares[j] = load(kept + j * kLane<R>, width);
  if (tile.centred)
    add_sample<R, M, true>(tile, b, c, squares);
  else
    add_sample<R, M, false>(tile, b, c, squares);
  for (int j = 0; j < 2; j++) store(kept + j * kLane<R>, squares[j]);
  if (!tile.ends_unit) return;
  double* lanes = tile.lanes + b * kUnitCols;
  if (tile.valid == kCols)
    for (int l = 0; l < kCols; l++) lanes[l] += (double)kept[l];
  else
    for (int l = 0; l < tile.valid; l++) lanes[l] += (double)kept[l];
}

// c_b[i][j] = sum_t rows[t][i] cols[t][j], both packed.
template <class R, int M> void packed(const Tile<R>& tile) {
  for (int64_t b = 0; b < tile.samples; b++) {
    Part<R> c[M][2];
    open(tile, c);
    const R *row = tile.rows + b * tile.row_sample, *col = tile.cols + b * tile.col_sample;
#pragma GCC unroll 2
    for (int64_t t = 0; t < tile.steps; t++, row += kTileRows, col += kTileCols<R>) {
      Part<R> y[2];
      __builtin_memcpy(y, col, sizeof y);
#pragma GCC unroll 16
      for (int i = 0; i < M; i++) {
        const Part<R> x = row[i] - Part<R>{};
        c[i][0] = fma_part(x, y[0], c[i][0]);
        c[i][1] = fma_part(x, y[1], c[i][1]);
      }
    }
    close(tile, b, c);
  }
}

// A box of positions, walked in row-major order, and what a step along each dimension adds to the address of a row.
struct Walk {
  int64_t n[3], row[3];
};

// c_b[i][j] = sum over the box of rows[i] cols[j]. Row i lies at rows + at[i]. Rows and columns are either numbers side
// by side, or one that stands for all.
template <class R, int M, bool kWideRows, bool kWideCols>
void lines(const Tile<R>& tile, const int64_t* offsets, const Walk& walk) {
  constexpr int64_t kCols = kTileCols<R>, kColStep = kWideCols ? kCols : 1;
  int64_t at[M];
  for (int i = 0; i < M; i++) at[i] = offsets[i];
  for (int64_t b = 0; b < tile.samples; b++) {
    Part<R> c[M][2];
    open(tile, c);
    const R *rows = tile.rows + b * tile.row_sample, *col = tile.cols + b * tile.col_sample;
    for (int64_t d = 0; d < walk.n[0]; d++)
      for (int64_t h = 0; h < walk.n[1]; h++) {
        const R* row = rows + d * walk.row[0] + h * walk.row[1];
        for (int64_t w = 0; w < walk.n[2]; w++, row += walk.row[2], col += kColStep) {
          Part<R> y[2];
          if constexpr (kWideCols)
            __builtin_memcpy(y, col, sizeof y);
          else
            y[0] = y[1] = *col - Part<R>{};
#pragma GCC unroll 16
          for (int i = 0; i < M; i++) {
            Part<R> x[2];
            if constexpr (kWideRows)
              __builtin_memcpy(x, row + at[i], sizeof x);
            else
              x[0] = x[1] = row[at[i]] - Part<R>{};
            c[i][0] = fma_part(x[0], y[0], c[i][0]);
            c[i][1] = fma_part(x[1], y[1], c[i][1]);
          }
        }
      }
    close(tile, b, c);
  }
}

}  // namespace
}  // namespace nk::cpu::NK_ISA
