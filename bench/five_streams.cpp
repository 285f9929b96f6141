// five_streams.cpp - the machine's own limit: one flat loop that reads w, g, v and writes w, v, on torch's pool.
// The least that a momentum step can do; bench/sgd.py compiles it with the machine's compiler and times it beside the rest.
#include <cstdint>

using ParallelFor = int (*)(int64_t, int64_t, int64_t, void (*)(int64_t, int64_t, void*), void*);

extern "C" void five_streams(ParallelFor parallel_for, float* w, const float* g, float* v, int64_t n, int64_t threads) {
  struct Work {
    float *w, *v;
    const float* g;
  } work{w, v, g};
  parallel_for(
      0, n, (n + threads - 1) / threads,
      [](int64_t begin, int64_t end, void* context) {
        const Work& work = *static_cast<Work*>(context);
        float* __restrict w = work.w;
        float* __restrict v = work.v;
        const float* __restrict g = work.g;
        for (int64_t i = begin; i < end; i++) {
          v[i] = 0.9f * v[i] + (g[i] + 5e-4f * w[i]);
          w[i] = w[i] - 1e-6f * v[i];
        }
      },
      &work);
}
