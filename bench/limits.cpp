// limits.cpp - what this machine's memory can do: flat loops on torch's pool and nothing else.
// limits.py compiles it with the machine's own compiler and times it beside the rest, in every run.
#include <cstdint>

using ParallelFor = int (*)(int64_t, int64_t, int64_t, void (*)(int64_t, int64_t, void*), void*);

namespace {
struct Arrays {
  float* w;
  const float* g;
  float* v;
  float* h;
};

// One piece per thread, and none so short that a second thread costs more than it brings.
void run(ParallelFor parallel_for, Arrays arrays, int64_t n, int64_t threads, void (*loop)(int64_t, int64_t, void*)) {
  int64_t piece = (n + threads - 1) / threads;
  parallel_for(0, n, piece < 32768 ? 32768 : piece, loop, &arrays);
}
}  // namespace

// The least that a momentum step can do: read w, g and v, write w and v. As a compiler sees it, without prefetching: a
// step that prefetches may pass it by some per cent.
extern "C" void five_streams(ParallelFor parallel_for, float* w, const float* g, float* v, float*, int64_t n,
                             int64_t threads) {
  run(parallel_for, {w, g, v, nullptr}, n, threads, [](int64_t begin, int64_t end, void* context) {
    const Arrays& arrays = *static_cast<Arrays*>(context);
    float* __restrict w = arrays.w;
    float* __restrict v = arrays.v;
    const float* __restrict g = arrays.g;
    for (int64_t i = begin; i < end; i++) {
      v[i] = 0.9f * v[i] + (g[i] + 5e-4f * w[i]);
      w[i] = w[i] - 1e-6f * v[i];
    }
  });
}

// The least that a momentum step from two gradients can do: read w, g, h and v, write w and v.
extern "C" void six_streams(ParallelFor parallel_for, float* w, const float* g, float* v, float* h, int64_t n,
                            int64_t threads) {
  run(parallel_for, {w, g, v, h}, n, threads, [](int64_t begin, int64_t end, void* context) {
    const Arrays& arrays = *static_cast<Arrays*>(context);
    float* __restrict w = arrays.w;
    float* __restrict v = arrays.v;
    const float* __restrict g = arrays.g;
    const float* __restrict h = arrays.h;
    for (int64_t i = begin; i < end; i++) {
      v[i] = 0.9f * v[i] + (0.5f * (h[i] + g[i]) + 1.3f * (h[i] - g[i]) + 5e-4f * w[i]);
      w[i] = w[i] - 1e-6f * v[i];
    }
  });
}

// The least that a step of AdamW can do: read w, g and both averages, write w and the averages. Without its root and
// divisions.
extern "C" void seven_streams(ParallelFor parallel_for, float* w, const float* g, float* v, float* h, int64_t n,
                              int64_t threads) {
  run(parallel_for, {w, g, v, h}, n, threads, [](int64_t begin, int64_t end, void* context) {
    const Arrays& arrays = *static_cast<Arrays*>(context);
    float* __restrict w = arrays.w;
    float* __restrict v = arrays.v;
    float* __restrict h = arrays.h;
    const float* __restrict g = arrays.g;
    for (int64_t i = begin; i < end; i++) {
      v[i] = 0.9f * v[i] + 0.1f * g[i];
      h[i] = 0.99f * h[i] + 0.01f * g[i] * g[i];
      w[i] = w[i] - (1e-8f * w[i] + 1e-6f * v[i] * h[i]);
    }
  });
}

// Read g once. The bits are folded with xor, which compilers may reorder; v takes one word, or the loop would be
// dropped.
extern "C" void read(ParallelFor parallel_for, float* w, const float* g, float* v, float*, int64_t n, int64_t threads) {
  run(parallel_for, {w, g, v, nullptr}, n, threads, [](int64_t begin, int64_t end, void* context) {
    const Arrays& arrays = *static_cast<Arrays*>(context);
    const uint32_t* bits = reinterpret_cast<const uint32_t*>(arrays.g);
    uint32_t folded = 0;
    for (int64_t i = begin; i < end; i++) folded ^= bits[i];
    arrays.v[begin] = static_cast<float>(folded & 1);
  });
}

// Read g and sum its squares: what a norm alone costs. Eight registers' worth of sums, else their latency is the limit.
extern "C" void sum_of_squares(ParallelFor parallel_for, float* w, const float* g, float* v, float*, int64_t n,
                               int64_t threads) {
  run(parallel_for, {w, g, v, nullptr}, n, threads, [](int64_t begin, int64_t end, void* context) {
    const Arrays& arrays = *static_cast<Arrays*>(context);
    constexpr int64_t kLanes = 128;
    float sums[kLanes] = {};
    int64_t i = begin;
    for (; i + kLanes <= end; i += kLanes)
      for (int64_t lane = 0; lane < kLanes; lane++) sums[lane] += arrays.g[i + lane] * arrays.g[i + lane];
    for (; i < end; i++) sums[0] += arrays.g[i] * arrays.g[i];
    float sum = 0.0f;
    for (float s : sums) sum += s;
    arrays.v[begin] = sum;
  });
}

// Read g, write w.
extern "C" void copy(ParallelFor parallel_for, float* w, const float* g, float* v, float*, int64_t n, int64_t threads) {
  run(parallel_for, {w, g, v, nullptr}, n, threads, [](int64_t begin, int64_t end, void* context) {
    const Arrays& arrays = *static_cast<Arrays*>(context);
    float* __restrict w = arrays.w;
    const float* __restrict g = arrays.g;
    for (int64_t i = begin; i < end; i++) w[i] = g[i];
  });
}
