// isa.h - the table of function pointers that each compilation of loops.cpp and its neighbours fills.
#pragma once
#include "../core/backend.h"

namespace nk::cpu {

struct Block;
struct ConvBlock;

// At most, and in multiples of: whose squares a row adds up in float arithmetic. Measured, 128 x 1M float32:
// 4096 take about a tenth less time than 1024.
constexpr int64_t kColumns = 4096, kPart = 1024;

// Some columns of a matrix of samples, all rows of them.
struct SampleTile {
  const void* x;  // of the first row; without offsets, of the first of these columns
  int64_t rows, row_stride, size;
  const int64_t* offsets;  // null: side by side; else where each column is, in elements from x
  void *mean, *centred;    // of these columns
  bool squares;
  double factor;
  double *row_sq, *totals;  // as in `Moments`; added to
};

// Of one sample of a normalisation layer: some of its rows and columns.
struct NormPart {
  const void *g, *x;
  int64_t rows, columns, g_stride, x_stride;
  const void *mean, *rstd;    // of the rows; mean null: zeros
  void *of_weight, *of_bias;  // of the columns, or of the rows
};

// The gradients of one row of an embedding's table, a stretch of its columns.
constexpr int64_t kStretch = 256;
struct Position {
  int64_t sample, offset;  // of its gradient, in elements
};
struct EmbeddingRow {
  const void* g;
  const Position* at;  // sample by sample
  int64_t count, size;
  int64_t samples;  // of the batch
  bool squares;
  void *total, *centred;
  double* row_sq;  // (samples): added to
};

// The loops of one file each: a function for each storage type.
constexpr int kTypes = StorageTypes::size;
struct SumLoops {
  double (*sum[kTypes])(const void* x, int64_t size, bool squares);
  bool (*recentre[2])(void* raw, const void* total, int64_t size, double share, double least);  // double, float
};
struct MomentLoops {
  void (*run[kTypes])(const SampleTile&);
};
struct NormLoops {
  void (*columns[kTypes])(const NormPart&);
  void (*rows[kTypes])(const NormPart&);
};
struct EmbeddingLoops {
  void (*row[kTypes])(const EmbeddingRow&);
};

struct Isa {
  void (*run[3][Rules::size][kTypes])(const Chunk&);  // by Measure; null: no op runs the rule so
  void (*run_mixed[Rules::size])(const Chunk&);       // null: not a step
  // On a sphere: the first pass, always with sums, and the second, without and with those of the step.
  void (*advance[Directions::size][kTypes])(const Chunk&);
  void (*turn[2][Directions::size][kTypes])(const Chunk&);
  void (*advance_mixed[Directions::size])(const Chunk&);
  void (*turn_mixed[Directions::size])(const Chunk&);
  void (*sq_norm[kTypes])(const Chunk&, bool is_gauged);
  const SumLoops* sums;
  const MomentLoops* moments;
  const NormLoops* norm_sums;
  const EmbeddingLoops* embedding;
  void (*outer)(const Outer&, const Block&);
  void (*conv)(const Conv&, const ConvBlock&);
};

#if defined(__x86_64__)
namespace v2 {
extern const Isa table;
}
namespace v3 {
extern const Isa table;
}
namespace v4 {
extern const Isa table;
}
#elif defined(__aarch64__)
namespace neon {
extern const Isa table;
}
#else
namespace portable {
extern const Isa table;
}
#endif

}  // namespace nk::cpu
