// scalar.h - numbers: fused multiply-add, the types that tensors are stored in, how those are widened and rounded.
//
// Scalar code for host and device; includes nothing but <stdint.h>.
// NK_HD functions are always inlined: each ISA level compiles this header with its own flags, and an out-of-line copy
// made for AVX-512 must never be the one that the linker keeps for an older machine.
#pragma once
#include <stdint.h>

#if defined(__CUDACC__)
#define NK_HD __host__ __device__ __forceinline__
#else
#define NK_HD inline __attribute__((always_inline))
#endif

namespace nk {

// a*b + c with one rounding. The portable baseline has no FMA hardware, where __builtin_fma is a slow library call:
// it rounds twice and stands outside the bitwise promise.
#if defined(__FMA__) || defined(__aarch64__) || defined(__CUDACC__)
NK_HD float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
NK_HD double fma(double a, double b, double c) { return __builtin_fma(a, b, c); }
#else
NK_HD float fma(float a, float b, float c) { return a * b + c; }
NK_HD double fma(double a, double b, double c) { return a * b + c; }
#endif

NK_HD float sqrt(float x) { return __builtin_sqrtf(x); }
NK_HD double sqrt(double x) { return __builtin_sqrt(x); }

// x, or y where x is NaN or infinite.
NK_HD float finite_or(float x, float y) { return x - x == 0 ? x : y; }
NK_HD double finite_or(double x, double y) { return x - x == 0 ? x : y; }

NK_HD float as_float(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, 4);
  return x;
}
NK_HD uint32_t as_bits(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  return bits;
}

// y, or x where x is zero.
NK_HD float zero_or(float x, float y) { return x == 0 ? x : y; }
NK_HD double zero_or(double x, double y) { return x == 0 ? x : y; }

// Storage types. Arithmetic on them happens in `Real<T>`: double for double, float for everything else.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};
template <class T> struct RealOf {
  using type = float;
};
template <> struct RealOf<double> {
  using type = double;
};
template <class T> using Real = typename RealOf<T>::type;

NK_HD float widen(bf16 x) { return as_float((uint32_t)x.bits << 16); }

// The bits of a float rounded to the nearest bfloat16, ties to even, in the upper half; the lower half has no meaning.
// NaN stays NaN. U is a word, or several side by side.
template <class U, class Bool> NK_HD U round_to_bf16(U u, Bool is_nan) {
  const U rounded = u + 0x7fffu + ((u >> 16) & 1u), quiet_nan = U{} + 0x7fc00000u;
  return is_nan ? quiet_nan : rounded;
}
NK_HD bf16 narrow_bf16(float x) { return {(uint16_t)(round_to_bf16(as_bits(x), x != x) >> 16)}; }
NK_HD bf16 narrow(float x, bf16) { return narrow_bf16(x); }

// The same, up or down at random: up with the probability that is the position between the two neighbours, so that the
// mean of the stored numbers is x. `random`: 16 uniform bits. A number beyond the largest bfloat16 has only one
// neighbour that is a number, and is rounded to nearest.
template <class U, class Bool> NK_HD U round_at_random_to_bf16(U u, U random, Bool is_nan) {
  const auto is_beyond = (u & 0x7fff0000u) == U{} + 0x7f7f0000u;
  const U rounded = u + (is_beyond ? U{} + 0x8000u : random), quiet_nan = U{} + 0x7fc00000u;
  return is_nan ? quiet_nan : rounded;
}
NK_HD bf16 narrow_bf16_at_random(float x, uint16_t random) {
  return {(uint16_t)(round_at_random_to_bf16(as_bits(x), (uint32_t)random, x != x) >> 16)};
}

// binary16 without denormal float operations, so that flush-to-zero mode changes nothing.
NK_HD float widen(f16 x) {
  const uint32_t sign = (uint32_t)(x.bits & 0x8000u) << 16, rest = (uint32_t)(x.bits & 0x7fffu) << 13;
  const uint32_t normal = rest + (112u << 23), special = rest + (224u << 23);
  const float subnormal = as_float(rest + (113u << 23)) - as_float(113u << 23);
  const uint32_t u = rest >= (31u << 23) ? special : rest < (1u << 23) ? as_bits(subnormal) : normal;
  return as_float(sign | u);
}
NK_HD f16 narrow_f16(float x) {
  const uint32_t sign = (as_bits(x) >> 16) & 0x8000u, u = as_bits(x) & 0x7fffffffu;
  const uint32_t special = u > 0x7f800000u ? 0x7e00u : 0x7c00u;            // NaN : overflow and infinity
  const uint32_t subnormal = as_bits(as_float(u) + 0.5f) - as_bits(0.5f);  // the adder rounds for us
  const uint32_t normal = (u + 0xc8000fffu + ((u >> 13) & 1u)) >> 13;
  return {(uint16_t)(sign | (u >= 0x47800000u ? special : u < 0x38800000u ? subnormal : normal))};
}
NK_HD f16 narrow(float x, f16) { return narrow_f16(x); }

// ---- The list of storage types --------------------------------------------------------------------------------------

template <class... Members> struct List {
  static constexpr int size = sizeof...(Members);
};
template <class A, class B> constexpr bool is_same = false;
template <class A> constexpr bool is_same<A, A> = true;
// The position of a type in a list; the list's size if it is not there.
template <class T, class... Members> constexpr int position(List<Members...>) {
  int at = 0;
  bool is_found = false;
  ((is_found = is_found || is_same<T, Members>, at += !is_found), ...);
  return at;
}

using StorageTypes = List<double, float, bf16, f16>;
using FloatTypes = List<float, bf16, f16>;  // whose arithmetic is float's

// A position in StorageTypes.
enum class DType : uint8_t { f64, f32, bf16, f16 };
template <class T> constexpr DType dtype_of = (DType)position<T>(StorageTypes{});
static_assert(dtype_of<double> == DType::f64 && dtype_of<float> == DType::f32 && dtype_of<bf16> == DType::bf16 &&
              dtype_of<f16> == DType::f16);

// What torch calls a storage type, and DLPack's code for its kind.
struct Storage {
  const char* name;
  uint8_t dlpack_code;
};
template <class T> inline constexpr Storage storage_of{};
template <> inline constexpr Storage storage_of<double>{"float64", 2};
template <> inline constexpr Storage storage_of<float>{"float32", 2};
template <> inline constexpr Storage storage_of<bf16>{"bfloat16", 4};
template <> inline constexpr Storage storage_of<f16>{"float16", 2};

// f(T{}) of the type T of the list that is `dtype`. On the host: nvcc lets no function of both sides call f.
template <class F, class T, class... Rest> [[gnu::always_inline]] inline auto dispatch(List<T, Rest...>, DType dtype,
                                                                                       const F& f) {
  if constexpr (sizeof...(Rest) > 0)
    if (dtype != dtype_of<T>) return dispatch(List<Rest...>{}, dtype, f);
  return f(T{});
}
template <class F> [[gnu::always_inline]] inline auto dispatch(DType dtype, const F& f) {
  return dispatch(StorageTypes{}, dtype, f);
}

// Bytes of a stored number, and of one that it is computed with.
[[gnu::always_inline]] inline int item_size(DType dtype) {
  return dispatch(dtype, [](auto x) { return (int)sizeof x; });
}
[[gnu::always_inline]] inline int real_size(DType dtype) {
  return dispatch(dtype, [](auto x) { return (int)sizeof(Real<decltype(x)>); });
}

}  // namespace nk
