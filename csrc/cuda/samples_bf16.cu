// samples_bf16.cu - samples.cuh for bf16.
#include "samples.cuh"

template struct nk::cuda::SampleKernels<nk::bf16>;
