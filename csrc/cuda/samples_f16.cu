// samples_f16.cu - samples.cuh for f16.
#include "samples.cuh"

template struct nk::cuda::SampleKernels<nk::f16>;
