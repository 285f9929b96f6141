// samples.cpp - who runs the loops over samples: cuts them into tasks, and adds what those sum in their order.
//
// How many tasks there are depends on shapes alone, never on the number of threads: the sums do not either.
#include <algorithm>
#include <limits>
#include <vector>

#include "share.h"

namespace nk::cpu {
namespace {

constexpr int64_t kTasks = 256;

int64_t pieces(int64_t n, int64_t size) { return (n + size - 1) / size; }

// Tasks that sum a number for each of `rows`: not so many that their sums outgrow what they read.
int64_t task_count(int64_t pieces, int64_t rows) {
  return std::min({pieces, kTasks, std::max<int64_t>(16, (int64_t{1} << 22) / rows)});
}

// Where the columns from `begin` on are, in elements from the row's start.
void find_columns(const Samples& s, int64_t begin, int64_t size, int64_t* offsets) {
  int64_t index[64], at = 0;  // torch's own limit on dimensions
  for (int d = s.ndim - 1; d >= 0; d--) {
    index[d] = begin % s.shape[d];
    begin /= s.shape[d];
    at += index[d] * s.strides[d];
  }
  for (int64_t j = 0; j < size; j++) {
    offsets[j] = at;
    for (int d = s.ndim - 1; d >= 0; d--) {
      at += s.strides[d];
      if (++index[d] < s.shape[d]) break;
      at -= s.shape[d] * s.strides[d];
      index[d] = 0;
    }
  }
}

}  // namespace

void moments(const Moments& m) {
  std::vector<int64_t> first_tile{0};  // of each tensor
  int64_t columns = 0;
  for (int64_t i = 0; i < m.count; i++) {
    first_tile.push_back(first_tile.back() + pieces(m.samples[i].columns, kColumns));
    columns += m.samples[i].columns;
  }
  const int64_t tiles = first_tile.back(), tasks = task_count(tiles, m.rows), sums = m.rows + 2;
  const int item = m.dtype == DType::f64 ? 8 : m.dtype == DType::f32 ? 4 : 2, real = m.dtype == DType::f64 ? 8 : 4;
  const auto run = table().moments[(int)m.dtype];
  std::vector<double> partials(tasks * sums);

  share(tasks, columns * m.rows > kSerialCoordinates, [&](int64_t task) {
    double* partial = partials.data() + task * sums;
    int64_t tile = tiles * task / tasks;
    const int64_t end = tiles * (task + 1) / tasks;
    int64_t i = std::upper_bound(first_tile.begin(), first_tile.end(), tile) - first_tile.begin() - 1;
    for (; tile < end; tile++) {
      while (tile >= first_tile[i + 1]) i++;
      const Samples& s = m.samples[i];
      const int64_t begin = (tile - first_tile[i]) * kColumns, size = std::min(kColumns, s.columns - begin);
      int64_t offsets[kColumns];
      if (s.ndim) find_columns(s, begin, size, offsets);
      run({static_cast<const char*>(s.x) + (s.ndim ? 0 : begin * item), m.rows, s.row_stride, size,
           s.ndim ? offsets : nullptr, static_cast<char*>(s.mean) + begin * real,
           m.squares ? static_cast<char*>(s.centred) + begin * real : nullptr, m.squares, partial, partial + m.rows});
    }
  });

  std::fill_n(m.row_sq, m.rows, 0.0);
  std::fill_n(m.totals, 2, 0.0);
  for (int64_t task = 0; task < tasks; task++) {
    const double* partial = partials.data() + task * sums;
    for (int64_t b = 0; b < m.rows; b++) m.row_sq[b] += partial[b];
    for (int k = 0; k < 2; k++) m.totals[k] += partial[m.rows + k];
  }
  if (!m.squares) m.totals[1] = std::numeric_limits<double>::quiet_NaN();
}

}  // namespace nk::cpu
