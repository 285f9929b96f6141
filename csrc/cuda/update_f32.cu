// update_f32.cu - update.cuh for float.
#include "update.cuh"

template struct nk::cuda::Updates<float>;
