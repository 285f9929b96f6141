// conv.cpp - the weight gradients of a convolution sample by sample, compiled once for each ISA level. No torch, no
// STL.
//
// No im2col: a tap is an offset into a copy of x with its zeros around it. Per multiply-add of a tile that is one
// address, and as few loads as of packed rows.
#include "isa.h"
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
    samples_ = samples, steps_ = box.steps();
    size_ = 1;
    for (int d = 0; d < 3; d++) size_ *= window_[d] = block_.window(d, box.n[d], conv_.kernel);
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
    tile.row_sample = channels_ * size_ * (wide_rows ? kCols : 1);
    tile.col_sample = steps_ * (wide_cols ? kCols : 1);
    tile.rows = rows_ + (wide_rows ? panel * samples_ * tile.row_sample : 0);
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

  void set_walk(const Box& box) {
    const int64_t wide = block_.columns == Columns::outputs ? 1 : kCols;
    walk_ = {{box.n[0], box.n[1], box.n[2]},
             {block_.stride[0] * window_[1] * window_[2] * wide, block_.stride[1] * window_[2] * wide,
              block_.stride[2] * wide}};
    // Longer rows: fewer of them to begin.
    if (walk_.row[1] == walk_.n[2] * walk_.row[2]) walk_.n[2] *= walk_.n[1], walk_.n[1] = 1;
    if (walk_.n[1] == 1 && walk_.row[0] == walk_.n[2] * walk_.row[2]) walk_.n[2] *= walk_.n[0], walk_.n[0] = 1;
  }

  void set_offsets() {
    const int64_t wide = block_.columns == Columns::outputs ? 1 : kCols, *kernel = conv_.kernel;
    for (int64_t row = first_row_; row < last_row_; row++) {
      const int64_t channel = row / block_.taps - first_channel_, tap = row % block_.taps;
      const int64_t d = tap / (kernel[1] * kernel[2]), h = tap / kernel[2] % kernel[1], w = tap % kernel[2];
      const int64_t at = (d * block_.dilation[0] * window_[1] + h * block_.dilation[1]) * window_[2];
      offsets_[row - first_row_] = (channel * size_ + at + w * block_.dilation[2]) * wide;
    }
  }

  void pack_outputs(int64_t i, const T* x, const T* g, const Box& box) {
    x += (block_.group * conv_.inputs + first_channel_) * conv_.x_channel;
    for (int64_t c = 0; c < channels_; c++)
      copy_window(x + c * conv_.x_channel, box, rows_ + (i * channels_ + c) * size_);
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
                          conv_.inputs * conv_.x_channel, n, box,
                          rows_ + ((p * samples_ + i) * channels_ + c) * size_ * kCols);
      for (int64_t r = 0; r < runs_; r++)
        pack_planes(g + (group * conv_.outputs + first_run_ + r) * conv_.g_channel, conv_.outputs * conv_.g_channel, n,
                    box.n, conv_.g_space, cols_ + ((p * runs_ + r) * samples_ + i) * steps_ * kCols);
    });
  }

  void pack_inputs(int64_t i, const T* x, const T* g, const Box& box) {
    x += (block_.group * conv_.inputs + block_.col) * conv_.x_channel;
    each_panel([&](int64_t p, int64_t n) {
      pack_side_by_side(x + p * kCols * conv_.x_channel, conv_.x_channel, n, box,
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
  void pack_side_by_side(const T* x, int64_t channel, int64_t n, const Box& box, R* to) {
    for (int64_t c = 0; c < n; c++) copy_window(x + c * channel, box, plane_ + c * size_);
    const int64_t one_row[3] = {1, 1, size_}, space[2] = {0, 0};
    pack_planes(plane_, size_, n, one_row, space, to);
  }

  void copy_window(const T* x, const Box& box, R* to) const {
    int64_t first[3];
    for (int d = 0; d < 3; d++) first[d] = box.first[d] * conv_.stride[d] - conv_.padding[d];
    for (int64_t i = 0; i < window_[0]; i++)
      for (int64_t j = 0; j < window_[1]; j++, to += window_[2]) {
        const int64_t d = first[0] + i * block_.step[0], h = first[1] + j * block_.step[1];
        if (d < 0 || d >= conv_.in[0] || h < 0 || h >= conv_.in[1])
          __builtin_memset(to, 0, window_[2] * sizeof(R));
        else
          copy_row(x + d * conv_.x_space[0] + h * conv_.x_space[1], first[2], to);
      }
  }

  void copy_row(const T* x, int64_t first, R* to) const {
    const int64_t n = window_[2], step = block_.step[2], in = conv_.in[2];
    auto clamp = [n](int64_t k) { return k < 0 ? 0 : k > n ? n : k; };
    const int64_t begin = first < 0 ? clamp((-first + step - 1) / step) : 0;
    const int64_t end = in > first ? clamp((in - first + step - 1) / step) : 0;
    for (int64_t k = 0; k < begin; k++) to[k] = 0;
    if (step == 1 && end > begin)
      widen_some(x + first + begin, end - begin, to + begin);
    else
      for (int64_t k = begin; k < end; k++) to[k] = widened(x[first + k * step]);
    for (int64_t k = end > begin ? end : begin; k < n; k++) to[k] = 0;
  }

  const Conv& conv_;
  const ConvBlock& block_;
  R *rows_, *cols_, *plane_;
  int64_t *offsets_, *tile_offsets_ = nullptr;
  int64_t first_run_, runs_, first_row_, last_row_, first_channel_, channels_;
  int64_t samples_ = 0, steps_ = 0, size_ = 0, window_[3] = {};
  Walk walk_{};
};

template <class T> void run(const Conv& conv, const ConvBlock& block) {
  Scratch scratch{block.scratch};
  Windows<T> operands(conv, block, scratch);
  Sweep<Real<T>, Windows<T>>(operands, block, conv.batch, conv.sums, scratch).run();
}

}  // namespace

void conv(const Conv& conv, const ConvBlock& block) {
  switch (conv.dtype) {
    case DType::f64:
      return run<double>(conv, block);
    case DType::f32:
      return run<float>(conv, block);
    case DType::bf16:
      return run<bf16>(conv, block);
    case DType::f16:
      return run<f16>(conv, block);
  }
}

}  // namespace nk::cpu::NK_ISA
