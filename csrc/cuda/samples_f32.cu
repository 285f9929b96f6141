// samples_f32.cu - samples.cuh for float.
#include "samples.cuh"

template struct nk::cuda::SampleKernels<float>;
