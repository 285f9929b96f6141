// random.h - the bits that round a run of coordinates, a register of counters at a time. Included by loops.cpp.
#pragma once
#include "../core/philox.h"
#include "simd.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace nk::cpu::NK_ISA {
namespace {

// Words side by side, each the lower half of a lane: where the hardware multiplies them to 64 bits. What is in the
// upper halves has no meaning. Several registers share a round's keys, and hide each other's latency.
constexpr int kWords = kRegister / 8;
typedef uint64_t WordPart __attribute__((vector_size(kRegister)));
template <int kParts> struct Words {
  WordPart part[kParts];
};

NK_HD WordPart multiply(WordPart a, uint32_t b) {
#if defined(__AVX512F__)
  return (WordPart)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(b));
#elif defined(__AVX2__)
  return (WordPart)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b));
#elif defined(__SSE2__)
  return (WordPart)_mm_mul_epu32((__m128i)a, _mm_set1_epi64x(b));
#elif defined(__aarch64__)
  return (WordPart)vmull_n_u32(vmovn_u64((uint64x2_t)a), b);
#else
  return (a & 0xffffffffu) * (uint64_t)b;
#endif
}
template <int kParts>
NK_HD void multiply(const Words<kParts>& a, uint32_t b, Words<kParts>& high, Words<kParts>& low) {
  for (int i = 0; i < kParts; i++) {
    low.part[i] = multiply(a.part[i], b);
    high.part[i] = low.part[i] >> 32;
  }
}

template <int kParts> NK_HD Words<kParts> exclusive_or(Words<kParts> a, const Words<kParts>& b, uint64_t c) {
  const WordPart all = WordPart{} + c;
  for (int i = 0; i < kParts; i++) {
#if defined(__AVX512F__)
    a.part[i] = (WordPart)_mm512_ternarylogic_epi64((__m512i)a.part[i], (__m512i)b.part[i], (__m512i)all, 0x96);
#else
    a.part[i] ^= b.part[i] ^ all;
#endif
  }
  return a;
}

using Keys = Philox::Keys<uint64_t>;  // a lane each, so that one instruction loads them

// The halves of kParts registers of counters, in order.
constexpr int kRandomAtATime = kWords * RandomBits::kTogether;
template <int kParts>
NK_HD void random_bits(const RandomBits& of, const Keys& keys, uint64_t first, uint16_t* out) {
  // Pairs of lanes hold counters half a register apart, so that interleaving puts all in order.
  Words<kParts> x[4];
  for (int i = 0; i < kParts; i++) {
    WordPart lane;
    for (int l = 0; l < kWords; l++) lane[l] = l / 2 + l % 2 * (kWords / 2) + i * kWords;
    x[0].part[i] = lane + first;
    x[1].part[i] = x[0].part[i] >> 32;
    x[2].part[i] = WordPart{} + of.parameter, x[3].part[i] = WordPart{} + of.step;
  }
  Philox::apply(x, keys);
  for (int i = 0; i < kParts; i++) {
    const WordPart a = (x[0].part[i] & 0xffffffffu) | x[1].part[i] << 32;
    const WordPart b = (x[2].part[i] & 0xffffffffu) | x[3].part[i] << 32;
    WordPart halves[2];
#if defined(__AVX512F__)
    halves[0] = (WordPart)_mm512_unpacklo_epi64((__m512i)a, (__m512i)b);
    halves[1] = (WordPart)_mm512_unpackhi_epi64((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
    halves[0] = (WordPart)_mm256_unpacklo_epi64((__m256i)a, (__m256i)b);
    halves[1] = (WordPart)_mm256_unpackhi_epi64((__m256i)a, (__m256i)b);
#else
    halves[0] = WordPart{a[0], b[0]}, halves[1] = WordPart{a[1], b[1]};
#endif
    __builtin_memcpy(out + i * kWords * RandomBits::kTogether, halves, sizeof halves);
  }
}

template <int kParts> struct Registers {
  static constexpr int parts = kParts;
};

// Of the coordinates [begin, begin + n), n at most kSize, of a tensor.
class RandomBlock {
 public:
  static constexpr int kSize = 2048;
  // How many coordinates to take next: blocks end where registers of counters do.
  static NK_HD int64_t most(int64_t begin) { return kSize - begin % kSize; }
  explicit RandomBlock(const RandomBits& of) : of_(of), keys_(of.seed) {}
  [[gnu::noinline]] const uint16_t* fill(int64_t begin, int64_t n) {
    const int64_t skip = begin % kRandomAtATime;
    int64_t i = 0;
    const auto next = [&](auto registers) {
      constexpr int kParts = decltype(registers)::parts;
      random_bits<kParts>(of_, keys_, (uint64_t)(begin - skip + i) / RandomBits::kTogether, bits_ + i);
      i += kParts * kRandomAtATime;
    };
    while (i + 3 * kRandomAtATime < skip + n) next(Registers<4>{});
    while (i < skip + n) next(Registers<1>{});
    return bits_ + skip;
  }

 private:
  RandomBits of_;
  Keys keys_;
  alignas(64) uint16_t bits_[kSize + kLanes];  // the last few are read as eight
};

}  // namespace
}  // namespace nk::cpu::NK_ISA
