// isa.h - the table of function pointers that each compilation of loops.cpp fills.
#pragma once
#include "../backend.h"
#include "../formulas.h"

namespace nk::cpu {

struct Isa {
  void (*run[Rules::size][StorageTypes::size])(const Chunk&);
  void (*run_pair[StepRules::size][StorageTypes::size])(const Chunk&);
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
