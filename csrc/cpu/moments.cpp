// moments.cpp - down the rows of a matrix: means, squared deviations, and the rows' norms, in one pass over it.
// Compiled once for each ISA level, in a namespace of its own (NK_ISA); no torch, no STL.
//
// Several rows at a time, one register's width of columns after another: the columns' sums are in registers over those
// rows, the rows' norms over all columns. Sixteen floats or eight doubles side by side on every level, and every sum in
// the order of its rows or columns: the same bits everywhere.
#include "kernels.h"
#include "simd.h"

namespace nk::cpu::NK_ISA {
namespace {

using Lanes = Eight<double>;

constexpr int kRows = 8;     // at a time
constexpr int kFirst = 8;    // rows whose mean is the first shift
constexpr int kGroup = 128;  // rows that are summed in the arithmetic type before their sums are joined in double
template <class R> constexpr int kSide = sizeof(R) == 4 ? 16 : 8;

// A sum of n squares of floats in float arithmetic is right if it is at least n times this: whatever the squares lost
// below float's smallest normal number (2^-126; flushed to zero, all of it) is less than its last digit.
constexpr double kLeast = 0x1p-126 * 0x1p24;
NK_HD bool is_finite(double x) { return x - x == 0; }

// Of every column: what the inner loop reads and writes, and what the groups leave.
template <class R> struct Kept {
  alignas(64) R shift[kColumns], s[kColumns], q[kColumns];
  alignas(64) double mean[kColumns], centred[kColumns];
  double all_sq = 0;  // of all rows
};

template <class R, class T> NK_HD Side<R, kSide<R>> load_as(const T* p) {
  if constexpr (sizeof(Real<T>) == sizeof(R))
    return load(p, Width<kSide<R>>{});
  else
    return eight_doubles(load(p, Width<kLanes>{}), 0);
}

// The columns that are left over, padded with zeros.
template <class T, int N> struct Rest {
  T x[N] = {};
  Rest(const T* from, int64_t size) {
    for (int64_t k = 0; k < size; k++) x[k] = from[k];
  }
};

template <class R, class T, class Each> NK_HD void every_side(int64_t size, Each each) {
  constexpr int N = kSide<R>;
  int64_t j = 0;
  for (; j + N <= size; j += N) each(j, [&](const T* row) { return load_as<R>(row + j); });
  if (j < size) each(j, [&](const T* row) { return load_as<R>(Rest<T, N>(row + j, size - j).x); });
}

// Rows one after another: in place, or gathered into a block that stays in L1.
template <class T> struct Rows {
  const T* x;
  int64_t stride;
};
template <class T> Rows<T> find_rows(const SampleTile& c, int64_t first, int64_t count, T* block) {
  const T* x = (const T*)c.x + first * c.row_stride;
  if (!c.offsets) return {x, c.row_stride};
  for (int64_t j = 0; j < c.size; j++)
    for (int64_t r = 0; r < count; r++) block[r * kColumns + j] = x[c.offsets[j] + r * c.row_stride];
  return {block, kColumns};
}

template <class T> double square_norm(const T* row, int64_t size) {
  Lanes sum = Lanes::all(0);
  every_side<double, T>(size, [&](int64_t, auto columns) {
    const Lanes value = columns(row);
    sum = fma(value, value, sum);
  });
  return total(sum);
}

template <int N> struct Count {};

template <bool kSquares, int N, class R, class T>
void add_rows(Count<N>, const Rows<T>& rows, int64_t size, Kept<R>& kept, double* row_sq) {
  using S = Side<R, kSide<R>>;
  constexpr Width<kSide<R>> wide;
  S norms[N];
  for (S& norm : norms) norm = S::all(0);
  every_side<R, T>(size, [&](int64_t j, auto columns) {
    const S shift = load(kept.shift + j, wide);
    S s = S::all(0), q = s;  // a few rows before all: fewer roundings on any one row's way
#pragma GCC unroll 8
    for (int r = 0; r < N; r++) {
      const S value = columns(rows.x + r * rows.stride);
      norms[r] = fma(value, value, norms[r]);
      GroupMoments::add<kSquares>(s, q, shift, value);
    }
    store(kept.s + j, load(kept.s + j, wide) + s);
    if constexpr (kSquares) store(kept.q + j, load(kept.q + j, wide) + q);
  });
  for (int r = 0; r < N; r++) {
    double sum = total(norms[r]);
    if (sizeof(R) == 4 && !(is_finite(sum) && sum >= kLeast * (double)size))
      sum = square_norm(rows.x + r * rows.stride, size);
    kept.all_sq += sum;
    if (row_sq) row_sq[r] += sum;
  }
}

// The first shift: the mean of the first rows, counted from the first of them, so that of a constant column it is
// exactly that constant.
template <class R, class T> void start(const Rows<T>& rows, int count, int64_t size, Kept<R>& kept) {
  using S = Side<R, kSide<R>>;
  const S share = S::all((R)(1 / (double)count)), zero = S::all(0);
  every_side<R, T>(size, [&](int64_t j, auto columns) {
    const S first = columns(rows.x);
    S sum = zero;
    for (int r = 1; r < count; r++) sum = sum + (columns(rows.x + r * rows.stride) - first);
    store(kept.shift + j, finite_or(fma(share, sum, first), zero));
  });
  for (int64_t j = 0; j < size; j += kLanes) {
    store(kept.mean + j, eight_doubles(load(kept.shift + j, Width<kLanes>{}), 0));
    store(kept.centred + j, Lanes::all(0));
  }
}

template <bool kSquares, class R> void join(int64_t before, int64_t rows, int64_t size, Kept<R>& kept) {
  const double n0 = (double)before, n1 = (double)rows;
  const Lanes share = Lanes::all(1 / n1), moved = Lanes::all(n1 / (n0 + n1)), cross = Lanes::all(n0 * n1 / (n0 + n1));
  const auto doubles = [](const R* p) { return eight_doubles(load(p, Width<kLanes>{}), 0); };
  for (int64_t j = 0; j < size; j += kLanes) {
    Lanes mean = load(kept.mean + j, Width<kLanes>{}), centred = load(kept.centred + j, Width<kLanes>{});
    GroupMoments::join(mean, centred, doubles(kept.shift + j), doubles(kept.s + j), doubles(kept.q + j), share, moved,
                       cross);
    store(kept.mean + j, mean);
    if constexpr (kSquares) store(kept.centred + j, centred);
    store_as(kept.shift + j, finite_or(mean, Lanes::all(0)));
  }
}

template <class Out> void put(void* to, int64_t j, int64_t size, const Lanes& x) {
  Out* out = (Out*)to + j;
  if (size - j >= kLanes)
    store_as(out, x);
  else
    for (int64_t k = 0; k < size - j; k++) out[k] = (Out)x[(int)k];
}

// False: float arithmetic cannot hold what came up, and nothing is right but the rows' norms.
template <bool kSquares, class R, class T> bool pass(const SampleTile& c, double* row_sq) {
  Kept<R> kept;
  T block[kRows * kColumns];
  const int first = c.rows < kFirst ? (int)c.rows : kFirst;
  start<R>(find_rows(c, 0, first, block), first, c.size, kept);
  const int64_t padded = (c.size + kSide<R> - 1) / kSide<R> * kSide<R>;
  for (int64_t begin = 0, r = 0; begin < c.rows; begin = r) {
    const int64_t end = begin + kGroup < c.rows ? begin + kGroup : c.rows;
    for (int64_t j = 0; j < padded; j++) kept.s[j] = kept.q[j] = 0;
    for (; r + kRows <= end; r += kRows)
      add_rows<kSquares>(Count<kRows>{}, find_rows(c, r, kRows, block), c.size, kept, row_sq ? row_sq + r : nullptr);
    for (; r < end; r++)
      add_rows<kSquares>(Count<1>{}, find_rows(c, r, 1, block), c.size, kept, row_sq ? row_sq + r : nullptr);
    join<kSquares>(begin, r - begin, c.size, kept);
  }
  Lanes mean_sq = Lanes::all(0), sum = mean_sq;
  for (int64_t j = 0; j < c.size; j += kLanes) {
    const Lanes mean = load(kept.mean + j, Width<kLanes>{}), centred = load(kept.centred + j, Width<kLanes>{});
    mean_sq = fma(mean, mean, mean_sq);
    sum = sum + centred;
    put<Real<T>>(c.mean, j, c.size, mean);
    if constexpr (kSquares) put<Real<T>>(c.centred, j, c.size, centred);
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

}  // namespace

template <class T> void moments(const SampleTile& c) { c.squares ? run<true, T>(c) : run<false, T>(c); }

template void moments<double>(const SampleTile&);
template void moments<float>(const SampleTile&);
template void moments<bf16>(const SampleTile&);
template void moments<f16>(const SampleTile&);

}  // namespace nk::cpu::NK_ISA
