// SPDX-License-Identifier: Apache-2.0
#include "cuda_match_kernels.cuh"
#include "cuda_merge.cuh"

namespace vosops::gpu {

MatchKernel match_kernel_bfloat16(bool selection, bool group) {
  return choose_kernel<BFloat16>(selection, group);
}

__global__ void __launch_bounds__(kMergeWarps * 32) merge_kernel(const __grid_constant__ Match p) {
  __shared__ uint64_t memory[kMergeWarps * kMergeEntries];
  merge_warp(p, memory);
}

cudaError_t launch_merge(const Match& p, cudaStream_t stream) {
  const int64_t queries = int64_t(p.batch) * p.queries;
  merge_kernel<<<unsigned((queries + kMergeWarps - 1) / kMergeWarps), kMergeWarps * 32, 0, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace vosops::gpu
