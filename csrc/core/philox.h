// philox.h - the random bits that weights are rounded with.
//
// Philox4x32-7 of Salmon, Moraes, Dror and Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3" (SC'11, table 2:
// seven rounds are the fewest that pass BigCrush; rounding needs no margin beyond, and each round is a tenth of a
// step): four words that depend on a counter of four words and a key of two, and on nothing else. U is a word, or
// several side by side.
#pragma once
#include "scalar.h"

namespace nk {

NK_HD void multiply(uint32_t a, uint32_t b, uint32_t& high, uint32_t& low) {
  const uint64_t product = (uint64_t)a * b;
  high = (uint32_t)(product >> 32), low = (uint32_t)product;
}

NK_HD uint32_t exclusive_or(uint32_t a, uint32_t b, uint32_t c) { return a ^ b ^ c; }

struct Philox {
  static constexpr int kRounds = 7;
  template <class Key> struct Keys {  // of each round
    Key key[kRounds][2];
    explicit NK_HD Keys(uint64_t first) {
      for (int i = 0; i < kRounds; i++) {
        key[i][0] = (uint32_t)first + i * 0x9e3779b9u;
        key[i][1] = (uint32_t)(first >> 32) + i * 0xbb67ae85u;
      }
    }
  };
  template <class U, class Key> static NK_HD void apply(U (&x)[4], const Keys<Key>& keys) {
    for (int i = 0; i < kRounds; i++) {
      U high0, low0, high1, low1;
      multiply(x[0], 0xd2511f53u, high0, low0);
      multiply(x[2], 0xcd9e8d57u, high1, low1);
      x[0] = exclusive_or(high1, x[1], keys.key[i][0]), x[1] = low1;
      x[2] = exclusive_or(high0, x[3], keys.key[i][1]), x[3] = low0;
    }
  }
};

// The bits that round one coordinate: eight coordinates, in row-major order, share the words of one counter, each takes
// half of one. The key is the seed; the counter is (coordinates / 8 as two words, the parameter's index in the
// optimizer, steps so far).
struct RandomBits {
  static constexpr int kTogether = 8;
  uint64_t seed;
  uint32_t parameter, step;

  NK_HD void words(uint64_t counter, uint32_t (&x)[4]) const {
    x[0] = (uint32_t)counter, x[1] = (uint32_t)(counter >> 32), x[2] = parameter, x[3] = step;
    Philox::apply(x, Philox::Keys<uint32_t>(seed));
  }
};

}  // namespace nk
