// mixed.h - the launch of a tensor whose streams are stored differently, for run.cu.
#pragma once
#include "update.cuh"

namespace nk::cuda {

struct MixedTensor {
  StridedTensor all;  // a dense one has one dimension
  float* master_weights;
  DType dtype, v_dtype[kMostBuffers];
  bool rounds_at_random;
  uint32_t parameter;
};

void launch_mixed(Measure, uint32_t blocks, cudaStream_t, const MixedTensor&, const Hyper&);

}  // namespace nk::cuda
