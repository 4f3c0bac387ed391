// SPDX-License-Identifier: Apache-2.0
// Kernels around the blocks of local attention for one element type.
#pragma once
#include "cuda_backward.cuh"
#include "cuda_launch.h"

namespace vosops::gpu::local {

template <class T>
__global__ void __launch_bounds__(kPackThreads) pack_kernel(const __grid_constant__ Packs p) {
  __shared__ uint16_t tile[kPackPositions * (kPackChannels + 2)];
  pack_block<T>(p, tile);
}

template <class T>
__global__ void __launch_bounds__(kPackTableThreads)
    pack_tables_kernel(const __grid_constant__ PackTables p) {
  pack_table_block<T>(p);
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2) local_forward_kernel(const __grid_constant__ Local p) {
  extern __shared__ __align__(16) uint8_t memory[];
  forward_block<T>(p, memory);
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2) local_query_kernel(const __grid_constant__ LocalBackward p) {
  extern __shared__ __align__(16) uint8_t memory[];
  query_block<T>(p, memory);
}

template <class T>
__global__ void __launch_bounds__(kThreads, 3) local_spread_kernel(const __grid_constant__ LocalBackward p) {
  extern __shared__ __align__(16) uint8_t memory[];
  spread_block<T>(p, memory);
}

template <class T>
__global__ void __launch_bounds__(kThreads, 3) local_table_kernel(const __grid_constant__ TableGradient p) {
  extern __shared__ __align__(16) uint8_t memory[];
  table_block<T>(p, memory);
}

template <class P>
cudaError_t launch(void (*kernel)(P), const P& p, dim3 grid, int64_t shared, cudaStream_t stream) {
  const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                 cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared));
  if (error != cudaSuccess) return error;
  kernel<<<grid, kThreads, shared, stream>>>(p);
  return cudaGetLastError();
}

template <class T>
constexpr Kernels kKernels = {
    [](const Packs& p, cudaStream_t stream) {
      const dim3 grid(unsigned(int64_t(p.blocks()) * p.batch),
                      unsigned((p.channels + kPackChannels - 1) / kPackChannels), unsigned(p.count));
      pack_kernel<T><<<grid, kPackThreads, 0, stream>>>(p);
      return cudaGetLastError();
    },
    [](const PackTables& p, cudaStream_t stream) {
      pack_tables_kernel<T><<<dim3(unsigned(p.heads), unsigned(p.count)), kPackTableThreads, 0, stream>>>(p);
      return cudaGetLastError();
    },
    [](const Local& p, dim3 grid, int64_t shared, cudaStream_t stream) {
      return launch<Local>(&local_forward_kernel<T>, p, grid, shared, stream);
    },
    [](const LocalBackward& p, dim3 grid, int64_t shared, cudaStream_t stream) {
      return launch<LocalBackward>(&local_query_kernel<T>, p, grid, shared, stream);
    },
    [](const LocalBackward& p, dim3 grid, int64_t shared, cudaStream_t stream) {
      return launch<LocalBackward>(&local_spread_kernel<T>, p, grid, shared, stream);
    },
    [](const TableGradient& p, dim3 grid, int64_t shared, cudaStream_t stream) {
      return launch<TableGradient>(&local_table_kernel<T>, p, grid, shared, stream);
    },
};

}  // namespace vosops::gpu::local
