// moments.cpp - down the rows of a matrix: means, squared deviations, and the rows' norms, in one pass over it.
// Compiled once for each ISA level, in a namespace of its own (NK_ISA); no torch, no STL.
//
// Several rows at a time, one register's width of columns after another: the columns' sums are in registers over those
// rows, the rows' norms over all columns. Sixteen floats or eight doubles side by side on every level, and every sum in
// the order of its rows or columns: the same bits everywhere.
#include "columns.h"
#include "kernels.h"

namespace nk::cpu::NK_ISA {
namespace {

constexpr int kRows = GroupMoments::kTogether, kGroup = GroupMoments::kRows, kFirst = GroupMoments::kFirst;
constexpr double kLeast = GroupMoments::kLeast;
NK_HD bool is_finite(double x) { return x - x == 0; }

// Of every column: what the inner loop reads and writes, and what the groups leave.
template <class R> struct Kept {
  alignas(64) R shift[kColumns], s[kColumns], q[kColumns];
  alignas(64) double mean[kColumns], centred[kColumns];
  double all_sq = 0;  // of all rows
};

// Some columns of rows one after another: in place, or gathered into a block that stays in L1.
template <class T> struct Rows {
  const T* x;
  int64_t stride, columns;
};
template <class T> Rows<T> find_rows(const SampleTile& c, int64_t first, int64_t count, int64_t begin, T* block) {
  const T* x = (const T*)c.x + first * c.row_stride;
  const int64_t size = c.size - begin < kPart ? c.size - begin : kPart;
  if (!c.offsets) return {x + begin, c.row_stride, size};
  for (int64_t j = 0; j < size; j++)
    for (int64_t r = 0; r < count; r++) block[r * kPart + j] = x[c.offsets[begin + j] + r * c.row_stride];
  return {block, kPart, size};
}

template <class T> double square_norm(const T* row, int64_t size) {
  Lanes sum = Lanes::all(0);
  every_side<double, T>(size, [&](int64_t, auto columns) {
    const Lanes value = columns(row);
    sum = fma(value, value, sum);
  });
  return total(sum);
}

template <class R, class T, class Load> NK_HD Side<R, kSide<R>> first_shift(const Rows<T>& rows, int count,
                                                                            Load columns) {
  using S = Side<R, kSide<R>>;
  const S first = columns(rows.x), zero = S::all(0);
  S sum = zero;
  for (int r = 1; r < count; r++) sum = sum + (columns(rows.x + r * rows.stride) - first);
  return GroupMoments::first_shift(first, sum, S::all((R)(1 / (double)count)), zero);
}

template <int N> struct Count {};

// `first`: how many rows make the shift, which these rows begin with; else 0.
template <bool kSquares, int N, class R, class T>
void add_rows(Count<N>, const Rows<T>& rows, int first, int64_t at, Kept<R>& kept, double* row_sq) {
  using S = Side<R, kSide<R>>;
  constexpr Width<kSide<R>> wide;
  R *const kept_shift = kept.shift + at, *const kept_s = kept.s + at, *const kept_q = kept.q + at;
  S norms[N];
  for (S& norm : norms) norm = S::all(0);
  every_side<R, T>(rows.columns, [&](int64_t j, auto columns) {
    if (first) store(kept_shift + j, first_shift<R>(rows, first, columns));
    const S shift = load(kept_shift + j, wide);
    S s = S::all(0), q = s;  // a few rows before all: fewer roundings on any one row's way
#pragma GCC unroll 8
    for (int r = 0; r < N; r++) {
      const S value = columns(rows.x + r * rows.stride);
      norms[r] = fma(value, value, norms[r]);
      GroupMoments::add<kSquares>(s, q, shift, value);
    }
    store(kept_s + j, load(kept_s + j, wide) + s);
    if constexpr (kSquares) store(kept_q + j, load(kept_q + j, wide) + q);
  });
  for (int r = 0; r < N; r++) {
    double sum = total(norms[r]);
    if (sizeof(R) == 4 && !(is_finite(sum) && sum >= kLeast * (double)rows.columns))
      sum = square_norm(rows.x + r * rows.stride, rows.columns);
    kept.all_sq += sum;
    if (row_sq) row_sq[r] += sum;
  }
}

template <bool kSquares, class R> void join(int64_t before, int64_t rows, int64_t size, Kept<R>& kept) {
  const double n0 = (double)before, n1 = (double)rows;
  const Lanes share = Lanes::all(1 / n1), moved = Lanes::all(n1 / (n0 + n1)), cross = Lanes::all(n0 * n1 / (n0 + n1));
  for (int64_t j = 0; j < size; j += kLanes) {
    const Lanes shift = load_as<double>(kept.shift + j);
    Lanes mean = before ? load(kept.mean + j, Width<kLanes>{}) : shift;
    Lanes centred = before ? load(kept.centred + j, Width<kLanes>{}) : Lanes::all(0);
    GroupMoments::join(mean, centred, shift, load_as<double>(kept.s + j), load_as<double>(kept.q + j), share, moved,
                       cross);
    store(kept.mean + j, mean);
    if constexpr (kSquares) store(kept.centred + j, centred);
    store_as(kept.shift + j, finite_or(mean, Lanes::all(0)));
  }
}

// False: float arithmetic cannot hold what came up, and nothing is right but the rows' norms.
template <bool kSquares, class R, class T> __attribute__((noinline)) bool pass(const SampleTile& c, double* row_sq) {
  Kept<R> kept;
  T block[kRows * kPart];
  const auto add = [&](auto count, int64_t r, int64_t size) {
    const int first = r ? 0 : c.rows < kFirst ? (int)c.rows : kFirst;
    for (int64_t j = 0; j < c.size; j += kPart)
      add_rows<kSquares>(count, find_rows(c, r, first ? first : size, j, block), first, j, kept,
                         row_sq ? row_sq + r : nullptr);
  };
  const int64_t padded = (c.size + kSide<R> - 1) / kSide<R> * kSide<R>;
  for (int64_t begin = 0, r = 0; begin < c.rows; begin = r) {
    const int64_t end = begin + kGroup < c.rows ? begin + kGroup : c.rows;
    for (int64_t j = 0; j < padded; j++) kept.s[j] = kept.q[j] = 0;
    for (; r + kRows <= end; r += kRows) add(Count<kRows>{}, r, kRows);
    for (; r < end; r++) add(Count<1>{}, r, 1);
    join<kSquares>(begin, r - begin, c.size, kept);
  }
  const Lanes factor = Lanes::all(c.factor);
  Lanes mean_sq = Lanes::all(0), sum = mean_sq;
  for (int64_t j = 0; j < c.size; j += kLanes) {
    const Lanes mean = load(kept.mean + j, Width<kLanes>{});
    mean_sq = fma(mean, mean, mean_sq);
    put<Real<T>>(c.mean, j, c.size, mean);
    if constexpr (kSquares) {
      const Lanes centred = load(kept.centred + j, Width<kLanes>{});
      sum = sum + centred;
      put<Real<T>>(c.centred, j, c.size, factor * centred);
    }
  }
  if (sizeof(R) == 4) {
    if (!is_finite(total(mean_sq)) || !is_finite(total(sum))) return false;
    if (kSquares && !(total(sum) >= kLeast * (double)c.rows * (double)c.size) && kept.all_sq != 0) return false;
  }
  c.totals[0] += total(mean_sq);
  c.totals[1] += total(sum);
  return true;
}

template <bool kSquares, class T> void run(const SampleTile& c) {
  if (!pass<kSquares, Real<T>, T>(c, c.row_sq)) pass<kSquares, double, T>(c, nullptr);
}

template <class T> void moments(const SampleTile& c) { c.squares ? run<true, T>(c) : run<false, T>(c); }

template <class... Types> constexpr MomentLoops loops(List<Types...>) { return {{moments<Types>...}}; }

}  // namespace

const MomentLoops moment_loops = loops(StorageTypes{});

}  // namespace nk::cpu::NK_ISA
