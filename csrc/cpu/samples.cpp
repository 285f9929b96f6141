// samples.cpp - runs the loops over samples: cuts them into tasks, and adds what those sum in their order.
//
// How many tasks there are depends on shapes alone, never on the number of threads: the sums do not either.
#include <algorithm>
#include <atomic>
#include <limits>
#include <vector>

#include "parallel.h"

namespace nk::cpu {
namespace {

constexpr int64_t kTasks = 256;

int64_t pieces(int64_t n, int64_t size) { return (n + size - 1) / size; }

// Tasks that sum a number for each of `rows`: not so many that their sums outgrow what they read.
int64_t task_count(int64_t pieces, int64_t rows) {
  return std::min({pieces, kTasks, std::max<int64_t>(16, (int64_t{1} << 22) / rows)});
}

// What the tasks summed, `sums` numbers each, in their order.
std::vector<double> add_up(const std::vector<double>& partials, int64_t sums) {
  std::vector<double> all(sums);
  for (size_t i = 0; i < partials.size(); i += sums)
    for (int64_t k = 0; k < sums; k++) all[k] += partials[i + k];
  return all;
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
  int64_t columns = 0;
  for (int64_t i = 0; i < m.count; i++) columns += m.samples[i].columns;
  // Wide tiles are faster, but a small matrix has to be enough for all threads.
  const int64_t width = std::clamp(pieces(columns, kTasks * kPart) * kPart, kPart, kColumns);
  std::vector<int64_t> first_tile{0};  // of each tensor
  for (int64_t i = 0; i < m.count; i++) first_tile.push_back(first_tile.back() + pieces(m.samples[i].columns, width));
  const int64_t tiles = first_tile.back(), tasks = task_count(tiles, m.rows), sums = m.rows + 2;
  const int item = item_size(m.dtype), real = real_size(m.dtype);
  const auto run = table().moments->run[(int)m.dtype];
  std::vector<double> partials(tasks * sums);

  parallel_for_each(tasks, columns * m.rows > kSerialCoordinates, [&](int64_t task) {
    double* partial = partials.data() + task * sums;
    int64_t tile = tiles * task / tasks;
    const int64_t end = tiles * (task + 1) / tasks;
    int64_t i = std::upper_bound(first_tile.begin(), first_tile.end(), tile) - first_tile.begin() - 1;
    for (; tile < end; tile++) {
      while (tile >= first_tile[i + 1]) i++;
      const Samples& s = m.samples[i];
      const int64_t begin = (tile - first_tile[i]) * width, size = std::min(width, s.columns - begin);
      int64_t offsets[kColumns];
      if (s.ndim) find_columns(s, begin, size, offsets);
      run({static_cast<const char*>(s.x) + (s.ndim ? 0 : begin * item), m.rows, s.row_stride, size,
           s.ndim ? offsets : nullptr, static_cast<char*>(s.mean) + begin * real,
           m.squares ? static_cast<char*>(s.centred) + begin * real : nullptr, m.squares, m.factor, partial,
           partial + m.rows});
    }
  });

  const auto all = add_up(partials, sums);
  std::copy_n(all.begin(), m.rows, m.row_sq);
  std::copy_n(all.begin() + m.rows, 2, m.totals);
  if (!m.squares) m.totals[1] = std::numeric_limits<double>::quiet_NaN();
}

void row_sums(const RowSums& r) {
  const int item = item_size(r.dtype);
  const auto run = table().sums->sum[(int)r.dtype];
  const int64_t parts = std::max<int64_t>(1, pieces(r.columns, kChunk));
  const int64_t together = std::max<int64_t>(1, kChunk / std::max<int64_t>(1, r.columns)), all = r.rows * parts;
  std::vector<double> partials(parts > 1 ? all : 0);
  double* const sums = parts > 1 ? partials.data() : r.out;

  parallel_for_each(pieces(all, together), r.rows * r.columns > kSerialCoordinates, [&](int64_t task) {
    for (int64_t k = task * together; k < std::min(all, (task + 1) * together); k++) {
      const int64_t begin = k % parts * kChunk;
      sums[k] = run(static_cast<const char*>(r.x) + (k / parts * r.row_stride + begin) * item,
                    std::min(kChunk, r.columns - begin), r.squares);
    }
  });
  for (int64_t b = 0; parts > 1 && b < r.rows; b++) {
    r.out[b] = 0;
    for (int64_t k = 0; k < parts; k++) r.out[b] += sums[b * parts + k];
  }
}

bool recentre(const SecondMoments& m) {
  const int real = real_size(m.dtype);
  const auto run = table().sums->recentre[m.dtype == DType::f64 ? 0 : 1];
  std::atomic<bool> is_kept{true};
  parallel_for_each(pieces(m.count, kChunk), m.count > kSerialCoordinates, [&](int64_t task) {
    const int64_t begin = task * kChunk;
    if (!run(static_cast<char*>(m.raw) + begin * real, static_cast<const char*>(m.total) + begin * real,
             std::min(kChunk, m.count - begin), m.share, m.least))
      is_kept.store(false, std::memory_order_relaxed);
  });
  return is_kept;
}

void norm_sums(const NormBatch& n) {
  const int item = item_size(n.dtype), real = real_size(n.dtype);
  const auto run = (n.along_rows ? table().norm_sums->rows : table().norm_sums->columns)[(int)n.dtype];
  const auto at = [&](const void* p, int64_t i) { return p ? static_cast<const char*>(p) + i * real : nullptr; };
  const auto out = [&](void* p, int64_t i) { return static_cast<char*>(p) + i * real; };
  const auto in = [&](const NormTensor& t, int64_t sample, int64_t row, int64_t column) {
    return static_cast<const char*>(t.x) + (sample * t.sample_stride + row * t.row_stride + column) * item;
  };
  // A sample's rows, or its columns, in parts; small samples together.
  const int64_t length = n.along_rows ? n.rows : n.columns;
  const int64_t part = n.along_rows ? std::max<int64_t>(1, kChunk / std::max<int64_t>(1, n.columns)) : kPart;
  const int64_t parts = pieces(length, part), work = n.rows * n.columns;
  const int64_t together = std::max<int64_t>(1, kChunk * parts / std::max<int64_t>(1, work)), all = n.samples * parts;

  parallel_for_each(pieces(all, together), n.samples * work > kSerialCoordinates, [&](int64_t task) {
    for (int64_t k = task * together; k < std::min(all, (task + 1) * together); k++) {
      const int64_t b = k / parts, begin = k % parts * part, size = std::min(part, length - begin);
      const int64_t row = n.along_rows ? begin : 0, column = n.along_rows ? 0 : begin, to = b * length + begin;
      run({in(n.g, b, row, column), in(n.x, b, row, column), n.along_rows ? size : n.rows,
           n.along_rows ? n.columns : size, n.g.row_stride, n.x.row_stride, at(n.mean, b * n.rows + row),
           at(n.rstd, b * n.rows + row), out(n.of_weight, to), out(n.of_bias, to)});
    }
  });
}

void embedding_moments(const EmbeddingBatch& e) {
  const int item = item_size(e.dtype), real = real_size(e.dtype);
  const auto run = table().embedding->row[(int)e.dtype];
  // Positions by id, and in their order within one.
  std::vector<int64_t> begin(e.table_rows + 1);
  for (int64_t i = 0; i < e.samples * e.positions; i++)
    if (e.ids[i] != e.padding) begin[e.ids[i] + 1]++;
  std::vector<int64_t> touched;
  for (int64_t v = 0; v < e.table_rows; v++) {
    if (begin[v + 1]) touched.push_back(v);
    begin[v + 1] += begin[v];
  }
  std::vector<Position> at(begin[e.table_rows]);
  const int64_t* id = e.ids;
  for (int64_t b = 0; b < e.samples; b++)
    for (int64_t t = 0; t < e.positions; t++, id++)  // afterwards begin[v] is where v ends
      if (*id != e.padding) at[begin[*id]++] = {b, b * e.sample_stride + t * e.position_stride};
  const auto first = [&](int64_t v) { return v ? begin[v - 1] : 0; };

  std::fill_n(e.row_sq, e.samples, 0.0);
  if (at.empty() || !e.columns) return;
  // Ranges of rows of about as many positions each, times stretches of columns.
  const int64_t stretches = pieces(e.columns, kStretch), counted = (int64_t)at.size();
  const int64_t ranges = pieces(task_count((int64_t)touched.size() * stretches, e.samples), stretches);
  std::vector<double> partials(ranges * stretches * e.samples);
  parallel_for_each(ranges * stretches, counted * e.columns > kSerialCoordinates, [&](int64_t task) {
    const int64_t range = task / stretches, column = task % stretches * kStretch;
    const int64_t size = std::min(kStretch, e.columns - column);
    const auto row_after = [&](int64_t position) {
      return std::lower_bound(touched.begin(), touched.end(), position,
                              [&](int64_t v, int64_t p) { return first(v) < p; });
    };
    const auto end = row_after(counted * (range + 1) / ranges);
    for (auto v = row_after(counted * range / ranges); v != end; v++) {
      const int64_t to = (*v * e.columns + column) * real;
      run({static_cast<const char*>(e.g) + column * item, at.data() + first(*v), begin[*v] - first(*v), size, e.samples,
           e.squares, static_cast<char*>(e.total) + to, e.squares ? static_cast<char*>(e.centred) + to : nullptr,
           partials.data() + task * e.samples});
    }
  });
  const auto all = add_up(partials, e.samples);
  std::copy_n(all.begin(), e.samples, e.row_sq);
}

}  // namespace nk::cpu
