// isa.h - the table of function pointers that each compilation of loops.cpp and its neighbours fills.
#pragma once
#include "../backend.h"
#include "../formulas.h"

namespace nk::cpu {

struct Block;
struct ConvBlock;

// At most: what is kept of each stays in L1 while all rows pass.
constexpr int64_t kColumns = 1024;

// Some columns of a matrix of samples, all rows of them.
struct SampleTile {
  const void* x;  // of the first row; without offsets, of the first of these columns
  int64_t rows, row_stride, size;
  const int64_t* offsets;  // null: side by side; else where each column is, in elements from x
  void *mean, *centred;    // of these columns
  bool squares;
  double *row_sq, *totals;  // as in `Moments`; added to
};

struct Isa {
  void (*run[Rules::size][StorageTypes::size])(const Chunk&);
  void (*run_pair[StepRules::size][StorageTypes::size])(const Chunk&);
  void (*outer)(const Outer&, const Block&);
  void (*conv)(const Conv&, const ConvBlock&);
  void (*moments[StorageTypes::size])(const SampleTile&);
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
