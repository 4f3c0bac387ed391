// SPDX-License-Identifier: Apache-2.0
// The kernels of the match, one translation unit per key type.
#pragma once
#include <cuda_runtime.h>

#include "cuda_problem.cuh"

namespace vosops::gpu {

// `group`: with wgmma, where the device has it.
struct MatchKernel {
  const void* function;
  cudaError_t (*launch)(const Match&, dim3 grid, int shared, cudaStream_t);
};
MatchKernel match_kernel_half(bool selection, bool group);
MatchKernel match_kernel_bfloat16(bool selection, bool group);
cudaError_t launch_merge(const Match&, cudaStream_t);

}  // namespace vosops::gpu
