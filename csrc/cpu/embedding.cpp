// embedding.cpp - one row of an embedding's table: the sum of its gradients, their spread over samples, and the
// samples' norms. Compiled once for each ISA level, in a namespace of its own (NK_ISA); no torch, no STL.
//
// In double for every storage type: the arithmetic hides behind the loads of rows that lie anywhere.
#include "columns.h"
#include "kernels.h"

namespace nk::cpu::NK_ISA {
namespace {

struct Kept {
  alignas(64) double total[kStretch], centred[kStretch], one[kStretch];  // `one`: of one sample
};

// The n-th sample's contribution, which is kept.one.
template <bool kSquares> double add_sample(Kept& kept, int64_t size, int64_t n) {
  const Lanes minus_n = Lanes::all(-(double)n), inverse = Lanes::all(n > 1 ? 1 / ((double)n * (double)(n - 1)) : 0);
  Lanes sq = Lanes::all(0);
  for (int64_t j = 0; j < size; j += kLanes) {
    const Lanes x = load(kept.one + j, Width<kLanes>{});
    Lanes sum = load(kept.total + j, Width<kLanes>{}), centred = load(kept.centred + j, Width<kLanes>{});
    sq = fma(x, x, sq);
    if (n == 1)
      YoungsCramer::first(sum, centred, x);
    else if constexpr (kSquares)
      YoungsCramer::add(sum, centred, x, minus_n, inverse);
    else
      sum = sum + x;
    store(kept.total + j, sum);
    if constexpr (kSquares) store(kept.centred + j, centred);
  }
  return total(sq);
}

template <class T> void sum_positions(const EmbeddingRow& e, int64_t begin, int64_t end, Kept& kept) {
  for (int64_t i = begin; i < end; i++) {
    const T* row = (const T*)e.g + e.at[i].offset;
    every_side<double, T>(e.size, [&](int64_t j, auto columns) {
      const Lanes x = columns(row);
      store(kept.one + j, i == begin ? x : load(kept.one + j, Width<kLanes>{}) + x);
    });
  }
}

template <bool kSquares, class T> void run(const EmbeddingRow& e) {
  using R = Real<T>;
  Kept kept;
  int64_t n = 0;
  for (int64_t i = 0; i < e.count;) {
    const int64_t sample = e.at[i].sample, begin = i;
    while (i < e.count && e.at[i].sample == sample) i++;
    sum_positions<T>(e, begin, i, kept);
    e.row_sq[sample] += add_sample<kSquares>(kept, e.size, ++n);
  }
  const Lanes others = Lanes::all(1 / (double)n - 1 / (double)e.samples);
  for (int64_t j = 0; j < e.size; j += kLanes) {
    const Lanes sum = load(kept.total + j, Width<kLanes>{});
    put<R>(e.total, j, e.size, sum);
    if constexpr (kSquares) {
      Lanes centred = load(kept.centred + j, Width<kLanes>{});
      YoungsCramer::add_zeros(sum, centred, others);
      put<R>(e.centred, j, e.size, centred);
    }
  }
}

template <class T> void embedding_row(const EmbeddingRow& e) { e.squares ? run<true, T>(e) : run<false, T>(e); }

template <class... Types> constexpr EmbeddingLoops loops(List<Types...>) { return {{embedding_row<Types>...}}; }

}  // namespace

const EmbeddingLoops embedding_loops = loops(StorageTypes{});

}  // namespace nk::cpu::NK_ISA
