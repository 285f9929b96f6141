// update_f64.cu - update.cuh for double.
#include "update.cuh"

template struct nk::cuda::Updates<double>;
