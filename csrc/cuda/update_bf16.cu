// update_bf16.cu - update.cuh for bf16.
#include "update.cuh"

template struct nk::cuda::Updates<nk::bf16>;
