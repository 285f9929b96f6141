// conv.cpp - the weight gradients of a convolution sample by sample, compiled once for each ISA level. No torch, no
// STL.
//
// No im2col: a tap is an offset into a copy of x with its zeros around it. Per multiply-add of a tile that is one
// address, and as few loads as of packed rows.
#include "kernels.h"
#include "pack.h"
#include "sweep.h"

namespace nk::cpu::NK_ISA {
namespace {

template <class R> using Kernel = void (*)(const Tile<R>&, const int64_t* offsets, const Walk&);

template <class R, bool kWideRows, bool kWideCols, int... M>
NK_HD void run_lines(const Tile<R>& tile, int rows, const int64_t* offsets, const Walk& walk, Numbers<M...>) {
  static constexpr Kernel<R> kernels[] = {lines<R, M + 1, kWideRows, kWideCols>...};
  kernels[rows - 1](tile, offsets, walk);
}

template <class R> void set_zero(R* x, int64_t n) { __builtin_memset(x, 0, n * sizeof(R)); }

template <class T> class Windows {
 public:
  using R = Real<T>;
  static constexpr int kRows = kTileLines, kCols = kTileCols<R>;

  Windows(const Conv& conv, const ConvBlock& block, Scratch& scratch)
      : conv_(conv),
        block_(block),
        rows_(scratch.take<R>(block.row_room)),
        cols_(scratch.take<R>(block.col_room)),
        plane_(scratch.take<R>(block.plane_room)),
        offsets_(scratch.take<int64_t>(block.offset_room)) {
    const int64_t per_run = block.units_per_run(), last = block.first_unit + block.units - 1;
    first_run_ = block.first_unit / per_run;
    runs_ = last / per_run + 1 - first_run_;
    const bool is_one = runs_ == 1;
    first_row_ = is_one ? block.first_unit % per_run * block.unit_rows : 0;
    last_row_ = is_one ? last % per_run * block.unit_rows + block.rows_of_unit(last) : block.run_rows;
    first_channel_ = first_row_ / block.taps;
    channels_ = (last_row_ + block.taps - 1) / block.taps - first_channel_;
  }

  int64_t extent(int d) const { return conv_.out[d]; }

  void pack(int64_t b, int64_t samples, const Box& box) {
    first_sample_ = b, samples_ = samples, steps_ = box.steps();
    set_window(box);
    set_walk(box);
    set_offsets();
    for (int64_t i = 0; i < samples; i++) {
      const T* x = (const T*)conv_.x + (b + i) * conv_.x_sample;
      const T* g = (const T*)conv_.g + (b + i) * conv_.g_sample + box.first[0] * conv_.g_space[0] +
                   box.first[1] * conv_.g_space[1] + box.first[2];
      if (block_.columns == Columns::outputs) pack_outputs(i, x, g, box);
      if (block_.columns == Columns::groups) pack_groups(i, x, g, box);
      if (block_.columns == Columns::inputs) pack_inputs(i, x, g, box);
    }
  }

  void place(Tile<R>& tile, int64_t, int64_t unit, int64_t row, int64_t panel) {
    const int64_t run = (block_.first_unit + unit) / block_.units_per_run() - first_run_;
    tile_offsets_ = offsets_ + row_in_run(unit, row) - first_row_;
    const bool wide_rows = block_.columns != Columns::outputs, wide_cols = block_.columns != Columns::inputs;
    tile.row_sample = in_place_ ? conv_.x_sample : channels_ * size_ * (wide_rows ? kCols : 1);
    tile.col_sample = steps_ * (wide_cols ? kCols : 1);
    tile.rows = in_place_ ? in_place_ + first_sample_ * conv_.x_sample
                          : rows_ + (wide_rows ? panel * samples_ * tile.row_sample : 0);
    tile.cols = cols_ + ((wide_cols ? panel * runs_ : 0) + run) * samples_ * tile.col_sample;
  }

  void run(const Tile<R>& tile, int rows) const {
    constexpr CountTo<kRows> counts;
    switch (block_.columns) {
      case Columns::outputs:
        return run_lines<R, false, true>(tile, rows, tile_offsets_, walk_, counts);
      case Columns::groups:
        return run_lines<R, true, true>(tile, rows, tile_offsets_, walk_, counts);
      case Columns::inputs:
        return run_lines<R, true, false>(tile, rows, tile_offsets_, walk_, counts);
    }
  }

  bool is_zero(const Tile<R>& tile) const { return all_zero(tile.cols, tile.col_sample); }

  void write(const R* from, int64_t n, int64_t width, R* out, int64_t unit, int64_t row, int64_t panel) const {
    const int64_t run = (block_.first_unit + unit) / block_.units_per_run();
    out += block_.group * block_.out_group + run * block_.out_run + row_in_run(unit, row) * block_.out_row +
           (block_.col + panel * kCols) * block_.out_col;
    for (int64_t l = 0; l < width; l++)
      for (int64_t i = 0; i < n; i++) out[i * block_.out_row + l * block_.out_col] = from[i * kCols + l];
  }

 private:
  int64_t row_in_run(int64_t unit, int64_t row) const {
    return (block_.first_unit + unit) % block_.units_per_run() * block_.unit_rows + row;
  }

  // Where the rows of the tiles lie: in a copy of x with its zeros around it, or, where none are read and nothing is
  // widened, in x itself.
  void set_window(const Box& box) {
    const Window before = window_;
    size_ = 1;
    int64_t first = (block_.group * conv_.inputs + first_channel_) * conv_.x_channel;
    const int64_t in_x[3] = {conv_.x_space[0], conv_.x_space[1], 1};
    bool inside = block_.columns == Columns::outputs;
    for (int d = 0; d < 3; d++) {
      window_.n[d] = block_.window(d, box.n[d], conv_.kernel);
      size_ *= window_.n[d];
      const int64_t begin = box.first[d] * conv_.stride[d] - conv_.padding[d], step = block_.step[d];
      auto inside_x = [&](int64_t upto) {  // window positions that lie before this one of x
        const int64_t n = (upto - begin + step - 1) / step;
        return upto <= begin ? 0 : n < window_.n[d] ? n : window_.n[d];
      };
      first_[d] = begin, window_.begin[d] = inside_x(0), window_.end[d] = inside_x(conv_.in[d]);
      inside = inside && window_.begin[d] == 0 && window_.end[d] == window_.n[d];
      first += begin * in_x[d];
    }
    in_place_ = nullptr;
    if constexpr (sizeof(T) == sizeof(R))
      if (inside) in_place_ = (const R*)conv_.x + first;
    const int64_t wide = block_.columns == Columns::outputs ? 1 : kCols;
    const int64_t in_copy[3] = {window_.n[1] * window_.n[2] * wide, window_.n[2] * wide, wide};
    for (int d = 0; d < 3; d++) space_[d] = in_place_ ? in_x[d] * block_.step[d] : in_copy[d];
    channel_ = in_place_ ? conv_.x_channel : size_ * wide;
    if (in_place_ || __builtin_memcmp(&window_, &before, sizeof window_) == 0) return;
    if (block_.columns == Columns::outputs)
      set_zero(rows_, block_.samples * channels_ * size_);
    else
      set_zero(plane_, kCols * size_);
  }

  void set_walk(const Box& box) {
    for (int d = 0; d < 3; d++) {
      walk_.n[d] = box.n[d];
      walk_.row[d] = block_.stride[d] * space_[d];
    }
    // Longer rows: fewer of them to begin.
    if (walk_.n[1] == 1 || walk_.row[1] == walk_.n[2] * walk_.row[2]) walk_.n[2] *= walk_.n[1], walk_.n[1] = 1;
    if (walk_.n[1] == 1 && walk_.row[0] == walk_.n[2] * walk_.row[2]) walk_.n[2] *= walk_.n[0], walk_.n[0] = 1;
  }

  void set_offsets() {
    const int64_t* kernel = conv_.kernel;
    for (int64_t row = first_row_; row < last_row_; row++) {
      const int64_t tap = row % block_.taps;
      const int64_t k[3] = {tap / (kernel[1] * kernel[2]), tap / kernel[2] % kernel[1], tap % kernel[2]};
      int64_t at = (row / block_.taps - first_channel_) * channel_;
      for (int d = 0; d < 3; d++) at += k[d] * block_.dilation[d] * space_[d];
      offsets_[row - first_row_] = at;
    }
  }

  void pack_outputs(int64_t i, const T* x, const T* g, const Box& box) {
    x += (block_.group * conv_.inputs + first_channel_) * conv_.x_channel;
    for (int64_t c = 0; c < channels_ && !in_place_; c++)
      copy_window(x + c * conv_.x_channel, rows_ + (i * channels_ + c) * size_);
    g += (block_.group * conv_.outputs + block_.col) * conv_.g_channel;
    each_panel([&](int64_t p, int64_t n) {
      pack_planes(g + p * kCols * conv_.g_channel, conv_.g_channel, n, box.n, conv_.g_space,
                  cols_ + (p * samples_ + i) * steps_ * kCols);
    });
  }

  void pack_groups(int64_t i, const T* x, const T* g, const Box& box) {
    each_panel([&](int64_t p, int64_t n) {
      const int64_t group = block_.col + p * kCols;
      for (int64_t c = 0; c < channels_; c++)
        pack_side_by_side(x + (group * conv_.inputs + first_channel_ + c) * conv_.x_channel,
                          conv_.inputs * conv_.x_channel, n,
                          rows_ + ((p * samples_ + i) * channels_ + c) * size_ * kCols);
      for (int64_t r = 0; r < runs_; r++)
        pack_planes(g + (group * conv_.outputs + first_run_ + r) * conv_.g_channel, conv_.outputs * conv_.g_channel, n,
                    box.n, conv_.g_space, cols_ + ((p * runs_ + r) * samples_ + i) * steps_ * kCols);
    });
  }

  void pack_inputs(int64_t i, const T* x, const T* g, const Box& box) {
    x += (block_.group * conv_.inputs + block_.col) * conv_.x_channel;
    each_panel([&](int64_t p, int64_t n) {
      pack_side_by_side(x + p * kCols * conv_.x_channel, conv_.x_channel, n,
                        rows_ + (p * samples_ + i) * size_ * kCols);
    });
    for (int64_t r = 0; r < runs_; r++) {
      const T* from = g + (block_.group * conv_.outputs + first_run_ + r) * conv_.g_channel;
      R* to = cols_ + (r * samples_ + i) * steps_;
      for (int64_t d = 0; d < box.n[0]; d++)
        for (int64_t h = 0; h < box.n[1]; h++, to += box.n[2])
          widen_some(from + d * conv_.g_space[0] + h * conv_.g_space[1], box.n[2], to);
    }
  }

  template <class Each> void each_panel(Each each) const {
    for (int64_t p = 0; p * kCols < block_.cols; p++)
      each(p, block_.cols - p * kCols < kCols ? block_.cols - p * kCols : kCols);
  }

  // The windows of `n` channels: [position][kCols].
  void pack_side_by_side(const T* x, int64_t channel, int64_t n, R* to) {
    for (int64_t c = 0; c < n; c++) copy_window(x + c * channel, plane_ + c * size_);
    const int64_t one_row[3] = {1, 1, size_}, space[2] = {0, 0};
    pack_planes(plane_, size_, n, one_row, space, to);
  }

  // Of the window the part that lies inside x; the zeros around it are there already.
  void copy_window(const T* x, R* to) const {
    for (int64_t i = window_.begin[0]; i < window_.end[0]; i++)
      for (int64_t j = window_.begin[1]; j < window_.end[1]; j++) {
        const T* row = x + (first_[0] + i * block_.step[0]) * conv_.x_space[0] +
                       (first_[1] + j * block_.step[1]) * conv_.x_space[1] + first_[2];
        R* out = to + (i * window_.n[1] + j) * window_.n[2];
        if (block_.step[2] == 1)
          widen_some(row + window_.begin[2], window_.end[2] - window_.begin[2], out + window_.begin[2]);
        else
          for (int64_t k = window_.begin[2]; k < window_.end[2]; k++) out[k] = widened(row[k * block_.step[2]]);
      }
  }

  const Conv& conv_;
  const ConvBlock& block_;
  R *rows_, *cols_, *plane_;
  int64_t *offsets_, *tile_offsets_ = nullptr;
  int64_t first_run_, runs_, first_row_, last_row_, first_channel_, channels_;
  int64_t first_sample_ = 0, samples_ = 0, steps_ = 0;
  // Positions of the window in each dimension, and which of them lie inside x.
  struct Window {
    int64_t n[3], begin[3], end[3];
  } window_{};
  int64_t first_[3] = {}, size_ = 0;     // its first position in x; all its positions
  int64_t space_[3] = {}, channel_ = 0;  // from one position, one channel to the next
  const R* in_place_ = nullptr;
  Walk walk_{};
};

template <class T> void run(const Conv& conv, const ConvBlock& block) {
  Scratch scratch{block.scratch};
  Windows<T> operands(conv, block, scratch);
  Sweep<Real<T>, Windows<T>>(operands, block, conv.batch, conv.sums, scratch).run();
}

}  // namespace

void conv(const Conv& conv, const ConvBlock& block) {
  dispatch(conv.dtype, [&](auto type) { run<decltype(type)>(conv, block); });
}

}  // namespace nk::cpu::NK_ISA
