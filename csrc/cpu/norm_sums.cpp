// norm_sums.cpp - what the weight and bias of a normalisation layer get of one sample, in one pass over g and x.
// Compiled once for each ISA level, in a namespace of its own (NK_ISA); no torch, no STL.
//
// Sums in the arithmetic type are short; they are added up in double.
#include "columns.h"
#include "kernels.h"

namespace nk::cpu::NK_ISA {
namespace {

constexpr int kRows = NormSums::kTogether, kGroup = NormSums::kRows;  // down the columns
constexpr int kRun = 64;                                              // numbers per lane, along a row

template <class R> R at(const void* p, int64_t i) { return ((const R*)p)[i]; }
template <class R> R mean_at(const NormPart& n, int64_t i) { return n.mean ? at<R>(n.mean, i) : 0; }

template <class R> struct Kept {
  alignas(64) R weight[kPart], bias[kPart];
  alignas(64) double weight_sum[kPart], bias_sum[kPart];
};

template <int N, class R, class T> void add_rows(const NormPart& n, int64_t first, Kept<R>& kept) {
  using S = Side<R, kSide<R>>;
  constexpr Width<kSide<R>> wide;
  const T *g = (const T*)n.g + first * n.g_stride, *x = (const T*)n.x + first * n.x_stride;
  S mean[N], rstd[N];
  for (int r = 0; r < N; r++) mean[r] = S::all(mean_at<R>(n, first + r)), rstd[r] = S::all(at<R>(n.rstd, first + r));
  every_side<R, T>(n.columns, [&](int64_t j, auto columns) {
    S weight = S::all(0), bias = weight;
#pragma GCC unroll 8
    for (int r = 0; r < N; r++)
      NormSums::add(weight, bias, columns(g + r * n.g_stride), columns(x + r * n.x_stride), mean[r], rstd[r]);
    store(kept.weight + j, load(kept.weight + j, wide) + weight);
    store(kept.bias + j, load(kept.bias + j, wide) + bias);
  });
}

template <class R> void add_in_double(double* to, const R* from, int64_t size) {
  for (int64_t j = 0; j < size; j += kLanes) store(to + j, load(to + j, Width<kLanes>{}) + load_as<double>(from + j));
}

template <class T> void norm_columns(const NormPart& n) {
  using R = Real<T>;
  Kept<R> kept;
  const int64_t padded = (n.columns + kSide<R> - 1) / kSide<R> * kSide<R>;
  for (int64_t j = 0; j < padded; j++) kept.weight_sum[j] = kept.bias_sum[j] = 0;
  for (int64_t r = 0; r < n.rows;) {
    const int64_t end = r + kGroup < n.rows ? r + kGroup : n.rows;
    for (int64_t j = 0; j < padded; j++) kept.weight[j] = kept.bias[j] = 0;
    for (; r + kRows <= end; r += kRows) add_rows<kRows, R, T>(n, r, kept);
    for (; r < end; r++) add_rows<1, R, T>(n, r, kept);
    add_in_double(kept.weight_sum, kept.weight, n.columns);
    add_in_double(kept.bias_sum, kept.bias, n.columns);
  }
  for (int64_t j = 0; j < n.columns; j += kLanes) {
    put<R>(n.of_weight, j, n.columns, load(kept.weight_sum + j, Width<kLanes>{}));
    put<R>(n.of_bias, j, n.columns, load(kept.bias_sum + j, Width<kLanes>{}));
  }
}

template <class T> void norm_rows(const NormPart& n) {
  using R = Real<T>;
  using S = Side<R, kSide<R>>;
  for (int64_t r = 0; r < n.rows; r++) {
    const T *g = (const T*)n.g + r * n.g_stride, *x = (const T*)n.x + r * n.x_stride;
    const S mean = S::all(mean_at<R>(n, r)), rstd = S::all(at<R>(n.rstd, r));
    double of_weight = 0, of_bias = 0;
    for (int64_t i = 0; i < n.columns; i += kRun * kSide<R>) {
      const int64_t size = n.columns - i < kRun * kSide<R> ? n.columns - i : kRun * kSide<R>;
      S weight = S::all(0), bias = weight;
      every_side<R, T>(size, [&](int64_t, auto columns) {
        NormSums::add(weight, bias, columns(g + i), columns(x + i), mean, rstd);
      });
      of_weight += total(weight);
      of_bias += total(bias);
    }
    ((R*)n.of_weight)[r] = (R)of_weight;
    ((R*)n.of_bias)[r] = (R)of_bias;
  }
}

template <class... Types> constexpr NormLoops loops(List<Types...>) {
  return {{norm_columns<Types>...}, {norm_rows<Types>...}};
}

}  // namespace

const NormLoops norm_loops = loops(StorageTypes{});

}  // namespace nk::cpu::NK_ISA
