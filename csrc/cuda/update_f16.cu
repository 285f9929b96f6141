// update_f16.cu - update.cuh for f16.
#include "update.cuh"

template struct nk::cuda::Updates<nk::f16>;
