// sphere.cpp - steps that keep norms: two passes over each tensor or row, back to back, so that what fits into a cache
// is read from memory once. The cut depends on shapes alone, and every sum has one order.
#include <algorithm>
#include <vector>

#include "parallel.h"

namespace nk::cpu {
namespace {

constexpr int kColumns = StepSums::count;

// Norms that take several chunks each run together until they have so many coordinates: few enough for a cache, enough
// for all threads. A larger tensor runs alone.
constexpr int64_t kTogether = 8 * kChunk;

// Short rows whose first passes run together: four streams of so many floats stay in L1.
constexpr int64_t kInL1 = 2048, kMostNorms = 64;

int64_t size_of_norm(const KeptTensor& t) { return t.whole.size / t.slots; }

// The first pass over a part: writes the state, and the sums of each norm or part of one, kColumns apart.
void advance(const KeptTensor& t, int64_t begin, int64_t size, double* sums, int64_t slot_size) {
  Chunk c = part_of(t.whole, begin, size);
  c.rounds_at_random = false;  // that is of the weights, which are not written
  c.sums = sums, c.columns = kColumns, c.slot_size = slot_size;
  const Isa& isa = table();
  const int direction = direction_of(c.rule);
  (is_mixed(c) ? isa.advance_mixed[direction] : isa.advance[direction][(int)c.dtype])(c);
}

// The second one: writes the weights.
void turn(const KeptTensor& t, int64_t begin, int64_t size, const Turn& by, double* sums, int64_t slot_size) {
  Chunk c = part_of(t.whole, begin, size);
  c.turn = by, c.sums = sums, c.slot_size = slot_size;
  const Isa& isa = table();
  const int direction = direction_of(c.rule);
  (is_mixed(c) ? isa.turn_mixed[direction] : isa.turn[sums != nullptr][direction][(int)c.dtype])(c);
}

Turn turn_of(const KeptTensor& t, int64_t slot, const double* sums) {
  const double radius = t.radii ? t.radii[slot] : sqrt(sums[StepSums::weight_sq]);
  return nk::turn_of(sums, radius, t.whole.hyper->lr * t.whole.numbers.of_lr.value());
}

// Where the sums of the statistics of a coordinate go.
double* row_of(const KeptTensor& t, int64_t coordinate) {
  return t.whole.sums + coordinate / t.whole.slot_size * t.whole.columns;
}
void add(double* to, const double* sums) {
  for (int j = 0; j < kColumns; j++) to[j] += sums[j];
}

// Some coordinates of a tensor: norms that lie in one chunk, or a part of one norm.
struct Piece {
  const KeptTensor* of;
  int64_t begin, size;
  int64_t unit = 0;      // of a part: whose it is
  int64_t partial = -1;  // where its sums are, among partial ones; -1: they are those of whole slots of statistics
};

// All norms of a piece, some at a time: the first pass over them, then the second over each.
void run_norms(const Piece& piece, double* partial) {
  const KeptTensor& t = *piece.of;
  const int64_t size = size_of_norm(t), end = piece.begin + piece.size;
  // What strided memory is gathered into holds no whole rows.
  const int64_t most = t.whole.strided ? 1 : std::clamp<int64_t>(kInL1 / size, 1, kMostNorms);
  for (int64_t at = piece.begin; at < end;) {
    double sums[kMostNorms * kColumns];
    const int64_t count = std::min(most, (end - at) / size);
    advance(t, at, count * size, sums, size);
    for (int64_t k = 0; k < count; k++, at += size) {
      const Turn by = turn_of(t, at / size, sums + k * kColumns);
      if (!t.whole.sums) {
        turn(t, at, size, by, nullptr, size);
      } else if (partial) {
        double own[kColumns];
        turn(t, at, size, by, own, size);
        add(partial, own);
      } else {
        turn(t, at, size, by, row_of(t, at), std::min(size, t.whole.slot_size));
      }
    }
  }
}

void run_small(const KeptTensor* tensors, int64_t count, bool on_pool) {
  std::vector<Piece> pieces;
  int64_t partials = 0;
  for (const KeptTensor* t = tensors; t < tensors + count; t++) {
    const int64_t size = size_of_norm(*t), together = kChunk / std::max<int64_t>(size, 1) * size;
    if (size > kChunk) continue;
    const bool is_part = t->whole.sums && t->whole.slot_size > size;
    for (int64_t at = 0; at < t->whole.size; at += together)
      pieces.push_back({t, at, std::min(together, t->whole.size - at), 0, is_part ? partials++ : -1});
  }
  std::vector<double> sums(partials * kColumns);
  const auto partial_of = [&](const Piece& p) { return p.partial < 0 ? nullptr : &sums[p.partial * kColumns]; };
  parallel_for_each((int64_t)pieces.size(), on_pool, [&](int64_t i) { run_norms(pieces[i], partial_of(pieces[i])); });
  for (const Piece& p : pieces)
    if (const double* partial = partial_of(p)) add(row_of(*p.of, p.begin), partial);
}

// Norms of several chunks each: the first pass over all, then the second.
class Together {
 public:
  explicit Together(bool on_pool) : on_pool_(on_pool) {}

  void take(const KeptTensor& t, int64_t begin, int64_t size) {
    const int64_t unit = (int64_t)turns_.size();
    turns_.push_back({});
    for (int64_t at = 0; at < size; at += kChunk)
      first_.push_back({&t, begin + at, std::min(kChunk, size - at), unit, (int64_t)first_.size()});
    const int64_t slot = t.whole.sums ? std::min(t.whole.slot_size, size) : size;
    if (slot > kChunk) {
      for (int64_t from = begin; from < begin + size; from += slot)
        for (int64_t at = 0; at < slot; at += kChunk)
          second_.push_back({&t, from + at, std::min(kChunk, slot - at), unit, partials_++});
    } else {
      const int64_t together = kChunk / slot * slot;
      for (int64_t at = 0; at < size; at += together)
        second_.push_back({&t, begin + at, std::min(together, size - at), unit, -1});
    }
    coordinates_ += size;
    if (coordinates_ >= kTogether) run();
  }

  void run() {
    sums_.assign(first_.size() * kColumns, 0.0);
    parallel_for_each((int64_t)first_.size(), on_pool_, [&](int64_t i) {
      const Piece& p = first_[i];
      advance(*p.of, p.begin, p.size, &sums_[i * kColumns], p.size);
    });
    for (size_t i = 0; i < first_.size();) {
      const Piece& p = first_[i];
      double all[kColumns] = {};
      for (; i < first_.size() && first_[i].unit == p.unit; i++) add(all, &sums_[i * kColumns]);
      turns_[p.unit] = turn_of(*p.of, p.begin / size_of_norm(*p.of), all);
    }
    sums_.assign(partials_ * kColumns, 0.0);
    // The end of the first pass is what it has left in the caches.
    const int64_t n = (int64_t)second_.size();
    parallel_for_each(n, on_pool_, [&](int64_t i) {
      const Piece& p = second_[n - 1 - i];
      const KeptTensor& t = *p.of;
      if (!t.whole.sums)
        turn(t, p.begin, p.size, turns_[p.unit], nullptr, p.size);
      else if (p.partial < 0)
        turn(t, p.begin, p.size, turns_[p.unit], row_of(t, p.begin), t.whole.slot_size);
      else
        turn(t, p.begin, p.size, turns_[p.unit], &sums_[p.partial * kColumns], p.size);
    });
    for (const Piece& p : second_)
      if (p.of->whole.sums && p.partial >= 0) add(row_of(*p.of, p.begin), &sums_[p.partial * kColumns]);
    turns_.clear(), first_.clear(), second_.clear();
    partials_ = coordinates_ = 0;
  }

 private:
  bool on_pool_;
  std::vector<Turn> turns_;  // of each norm
  std::vector<Piece> first_, second_;
  std::vector<double> sums_;
  int64_t partials_ = 0, coordinates_ = 0;
};

}  // namespace

void run_on_sphere(const KeptTensor* tensors, int64_t count, int64_t coordinates) {
  const bool on_pool = coordinates > kSerialCoordinates;
  run_small(tensors, count, on_pool);
  Together together(on_pool);
  for (const KeptTensor* t = tensors; t < tensors + count; t++) {
    const int64_t size = size_of_norm(*t);
    if (size <= kChunk) continue;
    for (int64_t slot = 0; slot < t->slots; slot++) together.take(*t, slot * size, size);
  }
  together.run();
}

}  // namespace nk::cpu
