// streams.h - where the coordinates of a run lie, and how they are stored there. Included by loops.cpp.
//
// A loop takes anything that can be loaded, stored and moved along: plain pointers where every stream is of one type,
// the structs below where each has its own.
#pragma once
#include "random.h"

namespace nk::cpu::NK_ISA {
namespace {

// Weights, gradient, state buffers, first gradient of a pair. kItem: bytes of the smallest coordinate; kBuffers: how
// many buffers there is room for, at least one.
template <class W, class G, class V, int kItem, int kBuffers> struct Streams {
  static constexpr int kLine = 64 / kItem;     // coordinates in a cache line
  static constexpr int kAhead = 2048 / kItem;  // of 1 to 8 KB, 2 KB measured best, by a few per cent over the hardware
  // Whether the coordinates of a line are written out side by side: it costs code, and time to compile.
  static constexpr bool kUnrolls = is_same<W, V> && kRegister > 16;
  W w;
  G g;
  V v[kBuffers];
  G h;
  NK_HD Streams at(int64_t i) const {
    Streams moved{w + i, g + i, {}, h + i};
    for (int k = 0; k < kBuffers; k++) moved.v[k] = v[k] + i;
    return moved;
  }
};
template <class Rule> constexpr int kRoom = Rule::traits.buffers > 0 ? Rule::traits.buffers : 1;  // for buffers
template <class T, class Rule> using Uniform = Streams<T*, const T*, T*, (int)sizeof(T), kRoom<Rule>>;

template <bool kWrites, class T> NK_HD void prefetch(const T* p) { __builtin_prefetch(p, kWrites); }

// ---- A type that the chunk names ----------------------------------------------------------------------------------

struct Any {
  char* p;
  DType dtype;  // of FloatTypes
  NK_HD int item() const { return dtype == DType::f32 ? 4 : 2; }
};
NK_HD Any operator+(Any a, int64_t i) { return {a.p + i * a.item(), a.dtype}; }
template <int N> NK_HD Side<float, N> load(Any a, Width<N> n) {
  return dispatch(FloatTypes{}, a.dtype, [&](auto type) { return load((const decltype(type)*)a.p, n); });
}
template <int N> NK_HD Side<float, N> store(Any a, const Side<float, N>& x) {
  return dispatch(FloatTypes{}, a.dtype, [&](auto type) { return store((decltype(type)*)a.p, x); });
}
template <bool kWrites> NK_HD void prefetch(Any a) {
  for (int b = 0; b < 32 * a.item(); b += 64) __builtin_prefetch(a.p + b, kWrites);
}

// ---- bfloat16 that is rounded at random -----------------------------------------------------------------------------

struct AtRandom {
  bf16* p;
  const uint16_t* bits;
};
NK_HD AtRandom operator+(AtRandom a, int64_t i) { return {a.p + i, a.bits + i}; }
template <int N> NK_HD Side<float, N> load(AtRandom a, Width<N> n) { return load((const bf16*)a.p, n); }
template <int kWidth> struct Integers {
  typedef uint32_t Bits __attribute__((vector_size(kWidth * 4)));
  typedef uint16_t Halves __attribute__((vector_size(kWidth * 2)));
};
template <int N> NK_HD Side<float, N> store(AtRandom a, const Side<float, N>& x) {
  using S = Side<float, N>;
  using Bits = typename Integers<S::kWidth>::Bits;
  using Halves = typename Integers<S::kWidth>::Halves;
  S y;
  for (int i = 0; i < S::kParts; i++) {
    Halves random;
    __builtin_memcpy(&random, a.bits + i * S::kWidth, sizeof random);
    const Bits u =
        round_at_random_to_bf16((Bits)x.part[i], __builtin_convertvector(random, Bits), x.part[i] != x.part[i]);
    const Halves upper = __builtin_convertvector(u >> 16, Halves);
    __builtin_memcpy(a.p + i * S::kWidth, &upper, sizeof upper);
    y.part[i] = (typename S::Part)(u & 0xffff0000u);
  }
  return y;
}
template <bool kWrites> NK_HD void prefetch(AtRandom a) { __builtin_prefetch(a.p, kWrites); }

// ---- Weights of any kind: rounded at random, or with a master copy --------------------------------------------------

struct Weights {
  Any stored;
  float* master;         // null: none
  const uint16_t* bits;  // null: rounded to nearest
};
NK_HD Weights operator+(Weights w, int64_t i) {
  return {w.stored + i, w.master ? w.master + i : nullptr, w.bits ? w.bits + i : nullptr};
}
template <int N> NK_HD Side<float, N> load(const Weights& w, Width<N> n) {
  const Side<float, N> stored = load(w.stored, n);
  if (!w.master) return stored;
  Side<float, N> master = load((const float*)w.master, n);
  float room[N];  // not read
  const Side<float, N> rounded = store(Any{(char*)room, w.stored.dtype}, master);
  for (int i = 0; i < master.kParts; i++)
    master.part[i] = current_weight(master.part[i], stored.part[i], rounded.part[i] == stored.part[i]);
  return master;
}
template <int N> NK_HD Side<float, N> store(const Weights& w, const Side<float, N>& x) {
  if (w.bits) return store(AtRandom{(bf16*)w.stored.p, w.bits}, x);
  const Side<float, N> stored = store(w.stored, x);
  return w.master ? store(w.master, x) : stored;
}
template <bool kWrites> NK_HD void prefetch(const Weights& w) {
  prefetch<kWrites>(w.stored);
  if (w.master) prefetch<kWrites>(Any{(char*)w.master, DType::f32});
}

// ---- The last few coordinates: a copy, padded with zeros or with ones ---------------------------------------------

template <class T> struct Padded;
template <class T> struct Padded<T*> {
  T x[kLanes];
  NK_HD T* in(const T* from, int n, bool ones = false) {
    __builtin_memset(x, 0, sizeof x);
    if (ones) store(x, Side<Real<T>, kLanes>::all(1));
    for (int k = 0; k < n; k++) x[k] = from[k];
    return x;
  }
  NK_HD void out(T* to, int n) {
    for (int k = 0; k < n; k++) to[k] = x[k];
  }
};
template <class T> struct Padded<const T*> : Padded<T*> {};
template <> struct Padded<Any> {
  float x[kLanes];
  NK_HD Any in(Any from, int n, bool ones = false) {
    __builtin_memset(x, 0, sizeof x);
    if (ones) store(Any{(char*)x, from.dtype}, Side<float, kLanes>::all(1));
    if (n) __builtin_memcpy(x, from.p, n * from.item());  // a stream that is not read is null
    return {(char*)x, from.dtype};
  }
  NK_HD void out(Any to, int n) { __builtin_memcpy(to.p, x, n * to.item()); }
};
template <> struct Padded<AtRandom> {
  Padded<bf16*> w;
  NK_HD AtRandom in(AtRandom from, int n) { return {w.in(from.p, n), from.bits}; }
  NK_HD void out(AtRandom to, int n) { w.out(to.p, n); }
};
template <> struct Padded<Weights> {
  Padded<Any> stored;
  Padded<float*> master;
  NK_HD Weights in(const Weights& from, int n) {
    return {stored.in(from.stored, n), from.master ? master.in(from.master, n) : nullptr, from.bits};
  }
  NK_HD void out(const Weights& to, int n) {
    stored.out(to.stored, n);
    if (to.master) master.out(to.master, n);
  }
};

}  // namespace
}  // namespace nk::cpu::NK_ISA
