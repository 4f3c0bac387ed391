// SPDX-License-Identifier: Apache-2.0
#include "cuda_kernels.cuh"

namespace vosops::gpu::local {

const Kernels& kernels_bfloat16() { return kKernels<BFloat16>; }

__global__ void __launch_bounds__(kPackThreads) sum_kernel(const __grid_constant__ TableSum p) {
  sum_thread(p, int64_t(blockIdx.x) * kPackThreads + threadIdx.x);
}

cudaError_t launch_sum(const TableSum& p, cudaStream_t stream) {
  const int64_t count = int64_t(p.heads) * p.offsets * p.channels;
  sum_kernel<<<unsigned((count + kPackThreads - 1) / kPackThreads), kPackThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace vosops::gpu::local
