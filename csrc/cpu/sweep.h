// sweep.h - one block of the output over the whole batch: chunk by chunk, tile by tile.
//
// What is summed stays in a scratch that is private to the task and ordered by tiles, so that it is contiguous and
// stays in L2; it is written to its rows in memory once, at the end.
#pragma once
#include "tile.h"

namespace nk::cpu::NK_ISA {
namespace {

struct Scratch {
  char* at;
  template <class X> X* take(int64_t n) {
    X* taken = reinterpret_cast<X*>(at);
    at += (n * (int64_t)sizeof(X) + 63) / 64 * 64;
    return taken;
  }
};

template <class R> bool all_zero(const R* x, int64_t n) {
  bool any = false;
  for (int64_t i = 0; i < n; i++) any |= x[i] != 0;
  return !any;
}

// The positions [first, first + n) of a box, in each dimension.
struct Box {
  int64_t first[3], n[3];
  int64_t steps() const { return n[0] * n[1] * n[2]; }
};

// Operands: kRows, the rows of its tiles; extent(d), the output positions; pack(b, samples, box); place(tile, its
// index, its unit, its first row in the unit, its panel of columns), which sets rows and cols; run(tile, rows);
// is_zero(tile), of the first sample of it; write(sums, rows, columns, to, unit, row, panel).
template <class R, class Operands> class Sweep {
  static constexpr int kRows = Operands::kRows, kCols = kTileCols<R>;

 public:
  Sweep(Operands& operands, const Block& block, int64_t batch, const SampleSums& sums, Scratch scratch)
      : operands_(operands), block_(block), batch_(batch), sums_(sums) {
    tiles_per_unit_ = block.unit_rows / kRows;
    panels_ = (block.cols + kCols - 1) / kCols;
    tile_size_ = kRows * kCols * (1 + (sums.centred != nullptr) + block.is_split);
    lanes_ = scratch.take<double>(block.samples * kUnitCols);
    squares_ = scratch.take<R>(block.samples * kUnitCols);
    minus_n_ = scratch.take<R>(block.samples);
    share_ = scratch.take<R>(block.samples);
    one_ = scratch.take<R>(kRows * kCols);
    tiles_ = scratch.take<R>(block.tile_room);
  }

  void run() {
    __builtin_memset(tiles_, 0, block_.units * tiles_per_unit_ * panels_ * tile_size_ * sizeof(R));
    for (int64_t b = 0; b < batch_; b += block_.samples) {
      samples_ = batch_ - b < block_.samples ? batch_ - b : block_.samples;
      for (int64_t i = 0; i < samples_; i++) {
        const double n = (double)(b + i + 1);
        minus_n_[i] = (R)-n;
        share_[i] = n > 1 ? (R)(1 / (n * (n - 1))) : (R)0;
      }
      for (int64_t i = 0; i < samples_ * kUnitCols; i++) lanes_[i] = 0;
      each_box([&](const Box& box, bool opens, bool closes) {
        operands_.pack(b, samples_, box);
        each_tile([&](Tile<R>& tile, int rows) {
          tile.opens = opens, tile.closes = closes;
          operands_.run(tile, rows);
        });
      });
      for (int64_t i = 0; i < samples_; i++) block_.sq_norms[b + i] = sq_norm(i);
    }
    write(0, static_cast<R*>(sums_.total));
    if (sums_.centred) write(kRows * kCols, static_cast<R*>(sums_.centred));
  }

 private:
  template <class Each> void each_box(Each each) {
    const int64_t d = operands_.extent(0), h = operands_.extent(1), w = operands_.extent(2), *size = block_.box;
    auto part = [](int64_t first, int64_t size, int64_t extent) {
      return first + size < extent ? size : extent - first;
    };
    for (int64_t i = 0; i < d; i += size[0])
      for (int64_t j = 0; j < h; j += size[1])
        for (int64_t k = 0; k < w; k += size[2]) {
          const Box box{{i, j, k}, {part(i, size[0], d), part(j, size[1], h), part(k, size[2], w)}};
          each(box, i + j + k == 0, i + size[0] >= d && j + size[1] >= h && k + size[2] >= w);
        }
  }

  template <class Each> void each_tile(Each each) {
    for (int64_t p = 0; p < panels_; p++) {
      R* sums = tiles_ + p * block_.units * tiles_per_unit_ * tile_size_;
      Tile<R> tile;
      tile.samples = samples_;
      tile.minus_n = minus_n_, tile.share = share_, tile.squares = squares_;
      tile.lanes = lanes_ + p * kCols % kUnitCols;
      tile.valid = block_.cols - p * kCols < kCols ? block_.cols - p * kCols : kCols;
      for (int64_t u = 0; u < block_.units; u++) {
        const int64_t rows = block_.rows_of_unit(block_.first_unit + u);
        for (int64_t row = 0, i = u * tiles_per_unit_; row < rows; row += kRows, i++) {
          R* at = sums + i * tile_size_;
          tile.total = at;
          tile.centred = sums_.centred ? at + kRows * kCols : nullptr;
          tile.c = block_.is_split ? at + tile_size_ - kRows * kCols : nullptr;
          tile.begins_unit = row == 0;
          tile.ends_unit = row + kRows >= rows;
          operands_.place(tile, i, u, row, p);
          for (int64_t line = 0; line < tile_size_; line += 64 / (int)sizeof(R))
            __builtin_prefetch(at + tile_size_ + line, 1);  // the next tile's
          each(tile, tile.ends_unit ? (int)(rows - row) : kRows);
        }
      }
    }
  }

  // Squares of float32 leave its range where those of double do not. Then, and where all are so small that some may
  // have been lost, c_b is formed again and squared in double.
  double sq_norm(int64_t i) {
    const double sum = sum_of_lanes(i);
    if (sizeof(R) == sizeof(double) || sum != sum || (sum >= 0x1p-80 && sum <= 0x1p1023)) return sum;
    double* lanes = lanes_ + i * kUnitCols;
    for (int l = 0; l < kUnitCols; l++) lanes[l] = 0;
    each_tile([&](Tile<R>& tile, int rows) {
      if (!tile.c) {
        tile.rows += i * tile.row_sample, tile.cols += i * tile.col_sample;
        if (operands_.is_zero(tile)) return;
        tile.samples = 1, tile.c = one_, tile.opens = true, tile.closes = false;
        operands_.run(tile, rows);
        tile.samples = samples_;
      }
      double* at = tile.lanes + i * kUnitCols;
      for (int r = 0; r < rows; r++)
        for (int64_t l = 0; l < tile.valid; l++) {
          const double c = tile.c[r * kCols + l];
          at[l] = nk::fma(c, c, at[l]);
        }
    });
    return sum_of_lanes(i);
  }

  double sum_of_lanes(int64_t i) const {
    double sums[kUnitCols];
    for (int l = 0; l < kUnitCols; l++) sums[l] = lanes_[i * kUnitCols + l];
    for (int half = kUnitCols / 2; half; half /= 2)
      for (int l = 0; l < half; l++) sums[l] += sums[l + half];
    return sums[0];
  }

  void write(int64_t skip, R* out) {
    for (int64_t u = 0; u < block_.units; u++) {
      const int64_t rows = block_.rows_of_unit(block_.first_unit + u);
      for (int64_t p = 0; p < panels_; p++)
        for (int64_t row = 0, i = u * tiles_per_unit_; row < rows; row += kRows, i++) {
          const R* from = tiles_ + (p * block_.units * tiles_per_unit_ + i) * tile_size_ + skip;
          const int64_t n = block_.cols - p * kCols < kCols ? block_.cols - p * kCols : kCols;
          operands_.write(from, rows - row < kRows ? rows - row : kRows, n, out, u, row, p);
        }
    }
  }

  Operands& operands_;
  const Block& block_;
  int64_t batch_;
  const SampleSums& sums_;
  int64_t tiles_per_unit_, panels_, tile_size_, samples_ = 0;
  double* lanes_;
  R *squares_, *minus_n_, *share_, *one_, *tiles_;
};

}  // namespace
}  // namespace nk::cpu::NK_ISA
