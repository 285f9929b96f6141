# NORMKERN_CUDA: AUTO builds kernels for the GPU that this machine has, if it has one and a compiler; ON for every
# architecture, or those of CMAKE_CUDA_ARCHITECTURES, on any machine with a compiler; OFF none.
set(NORMKERN_CUDA AUTO CACHE STRING "CUDA kernels: AUTO, ON or OFF")
set_property(CACHE NORMKERN_CUDA PROPERTY STRINGS AUTO ON OFF)
if(NOT NORMKERN_CUDA MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "NORMKERN_CUDA: expected AUTO, ON or OFF, got ${NORMKERN_CUDA}")
endif()
if(NOT CMAKE_CUDA_COMPILER)
  unset(CMAKE_CUDA_COMPILER CACHE)  # else check_language would not look again in a build folder where it found none
endif()

set(with_cuda OFF)
if(NORMKERN_CUDA STREQUAL AUTO)
  find_program(NVIDIA_SMI nvidia-smi)
  if(NVIDIA_SMI)
    execute_process(COMMAND ${NVIDIA_SMI} --query-gpu=compute_cap --format=csv,noheader
      OUTPUT_VARIABLE gpus ERROR_QUIET RESULT_VARIABLE failed)
  endif()
  if(gpus AND failed EQUAL 0)
    include(CheckLanguage)
    check_language(CUDA)
    if(CMAKE_CUDA_COMPILER)
      set(with_cuda ON)
      string(REGEX MATCHALL "[0-9]+\\.[0-9]" capabilities "${gpus}")
      list(TRANSFORM capabilities REPLACE "\\." "")
      list(REMOVE_DUPLICATES capabilities)
      list(TRANSFORM capabilities APPEND "-real")
    else()
      message(STATUS "NORMKERN_CUDA=AUTO: there is a GPU but no CUDA compiler: kernels for the CPU only")
    endif()
  endif()
elseif(NORMKERN_CUDA STREQUAL ON)
  include(CheckLanguage)
  check_language(CUDA)
  if(NOT CMAKE_CUDA_COMPILER)
    message(FATAL_ERROR "NORMKERN_CUDA=ON: expected a CUDA compiler, found none (CUDACXX=/path/to/nvcc names one)")
  endif()
  set(with_cuda ON)
  set(capabilities 75-real 80-real 86-real 89-real 90-real 100-real 120)
endif()

if(NOT with_cuda)
  target_sources(_C PRIVATE csrc/cuda/absent.cpp)
  return()
endif()

if(NOT CMAKE_CUDA_ARCHITECTURES)
  set(CMAKE_CUDA_ARCHITECTURES ${capabilities})
endif()
enable_language(CUDA)
if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.8)  # tables of tensors need 32 KB of parameters; 12.8 knows sm_120
  message(FATAL_ERROR "NORMKERN_CUDA=${NORMKERN_CUDA}: expected CUDA 12.8 or newer, got ${CMAKE_CUDA_COMPILER_VERSION}")
endif()
add_library(normkern_cuda OBJECT
  csrc/cuda/update_f64.cu csrc/cuda/update_f32.cu csrc/cuda/update_bf16.cu csrc/cuda/update_f16.cu csrc/cuda/mixed.cu
  csrc/cuda/run.cu csrc/cuda/sq_norms.cu
  csrc/cuda/samples_f64.cu csrc/cuda/samples_f32.cu csrc/cuda/samples_bf16.cu csrc/cuda/samples_f16.cu csrc/cuda/samples.cu
  csrc/cuda/product.cu csrc/cuda/outer.cu csrc/cuda/conv.cu)
set_target_properties(normkern_cuda PROPERTIES POSITION_INDEPENDENT_CODE ON CUDA_VISIBILITY_PRESET hidden)
target_compile_features(normkern_cuda PRIVATE cuda_std_17)
# No fused multiply-add that is not written as one: the same bits as on the CPU. A spilled register is a mistake here.
# Compressed, all architectures take a fifth of the room.
target_compile_options(normkern_cuda PRIVATE
  -fmad=false --compress-mode=size -Werror=all-warnings -Xptxas=-warn-spills,-Werror)
# The runtime is linked statically and finds the driver when it is first asked: without one the CPU part works.
set_target_properties(_C normkern_cuda PROPERTIES CUDA_RUNTIME_LIBRARY Static)
target_link_libraries(_C PRIVATE normkern_cuda)
