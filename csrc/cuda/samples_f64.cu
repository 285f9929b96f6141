// samples_f64.cu - samples.cuh for double.
#include "samples.cuh"

template struct nk::cuda::SampleKernels<double>;
