// isa.h - the table of function pointers that each compilation of loops.cpp and its neighbours fills.
#pragma once
#include "../backend.h"
#include "../formulas.h"

namespace nk::cpu {

struct Block;
struct ConvBlock;

struct Isa {
  void (*run[Rules::size][StorageTypes::size])(const Chunk&);
  void (*run_pair[StepRules::size][StorageTypes::size])(const Chunk&);
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
