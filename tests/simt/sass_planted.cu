// sass_planted.cu - kernels whose machine code is bad in one way each, under the names of those that make promises.
namespace nk {

enum class Measure : unsigned char { nothing };
struct Sgd {};               // right
struct SgdMomentum {};       // accesses of 4 bytes
struct SgdMomentumFirst {};  // a stream that the formula does not have
struct SgdNesterov {};       // the sums of a thread do not fit its registers
struct SgdNesterovFirst {};  // a loop over packs that is not there
struct Gauged {};            // so many registers that few threads ask for memory

struct Table {
  float4 *w, *v;
  const float4* g;
  const float4* h;
  int n;
};

template <class Rule, Measure, class T> __global__ void update(Table t);

__device__ __forceinline__ float4 moved(float4 w, float4 g) { return {w.x - g.x, w.y - g.y, w.z - g.z, w.w - g.w}; }

template <> __global__ void __launch_bounds__(256, 4) update<Sgd, Measure::nothing, float>(Table t) {
#pragma unroll 1
  for (int i = threadIdx.x; i < t.n; i += 512) {
    const float4 w = t.w[i], g = t.g[i], w2 = t.w[i + 256], g2 = t.g[i + 256];
    t.w[i] = moved(w, g);
    t.w[i + 256] = moved(w2, g2);
  }
}
template <> __global__ void update<SgdMomentum, Measure::nothing, float>(Table t) {
#pragma unroll 1
  for (int i = threadIdx.x; i < t.n; i += 256) {
    const float4 w = t.w[i], g = t.g[i], v = t.v[i];
    t.v[i] = moved(v, g);
    float* out = reinterpret_cast<float*>(t.w) + 4 * i + t.n % 4;
    out[0] = w.x - v.x, out[1] = w.y - v.y, out[2] = w.z - v.z, out[3] = w.w - v.w;
  }
}
template <> __global__ void update<SgdMomentumFirst, Measure::nothing, float>(Table t) {
#pragma unroll 1
  for (int i = threadIdx.x; i < t.n; i += 256) {
    const float4 w = t.w[i], g = t.g[i], v = t.v[i];
    t.w[i] = moved(w, g);
    t.v[i] = moved(v, g);
  }
}
template <> __global__ void __launch_bounds__(256, 8) update<SgdNesterov, Measure::nothing, float>(Table t) {
  double sums[48] = {};
#pragma unroll 1
  for (int i = threadIdx.x; i < t.n; i += 256) {
    const float4 w = t.w[i], g = t.g[i], v = t.v[i];
#pragma unroll
    for (int k = 0; k < 48; k++) sums[k] += (double)w.x * g.y + v.z * k;
    t.v[i] = v;
    t.w[i] = moved(w, g);
  }
  for (int k = 0; k < 48; k++) reinterpret_cast<double*>(t.w)[k * 256 + threadIdx.x] = sums[k];
}
template <> __global__ void update<SgdNesterovFirst, Measure::nothing, float>(Table t) {
  for (int i = threadIdx.x; i < t.n; i += 256) t.w[i].x = t.g[i].x;
}
template <> __global__ void __launch_bounds__(256, 1) update<Gauged, Measure::nothing, float>(Table t) {
  double sums[72] = {};
#pragma unroll 1
  for (int i = threadIdx.x; i < t.n; i += 256) {
    const float4 w = t.w[i], g = t.g[i];
#pragma unroll
    for (int k = 0; k < 72; k++) sums[k] += (double)w.x * k + g.y;
    t.w[i] = moved(w, g);
  }
  for (int k = 0; k < 72; k++) reinterpret_cast<double*>(t.w)[k * 256 + threadIdx.x] = sums[k];
}

// Of a kernel over samples: a number of every row, which its packs have anyhow, is read once more.
template <class T, bool> __global__ void moments_in_packs(Table t);
template <> __global__ void __launch_bounds__(256, 4) moments_in_packs<float, true>(Table t) {
  float4 sum = {};
#pragma unroll 1
  for (int i = threadIdx.x; i < t.n; i += 512) {
    const float4 g = t.g[i], g2 = t.g[i + 256];
    sum = moved(moved(sum, g), g2);
    sum.x += reinterpret_cast<const volatile float*>(t.g)[4 * i];
  }
  t.w[threadIdx.x] = sum;
}

}  // namespace nk
