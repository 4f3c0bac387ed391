// SPDX-License-Identifier: Apache-2.0
// Kernels around match_block for one key type.
#pragma once
#include "cuda_launch.h"
#include "cuda_match.cuh"

namespace vosops::gpu {

template <class T, bool Selection, bool Group>
__global__ void __launch_bounds__(kThreads, Selection ? 2 : 3) match_kernel(const __grid_constant__ Match p) {
  extern __shared__ __align__(1024) uint8_t memory[];
#if !VOSOPS_WGMMA
  // Never launched: the host asks for wgmma only where this kernel was compiled for sm_90a.
  if constexpr (Group) __trap();
#endif
  match_block<T, Selection, Group && VOSOPS_WGMMA>(p, memory);
}

template <class T, bool Selection, bool Group>
MatchKernel make_kernel() {
  return {reinterpret_cast<const void*>(&match_kernel<T, Selection, Group>),
          [](const Match& p, dim3 grid, int shared, cudaStream_t stream) {
            match_kernel<T, Selection, Group><<<grid, kThreads, shared, stream>>>(p);
            return cudaGetLastError();
          }};
}

template <class T>
MatchKernel choose_kernel(bool selection, bool group) {
  if (selection) return group ? make_kernel<T, true, true>() : make_kernel<T, true, false>();
  return group ? make_kernel<T, false, true>() : make_kernel<T, false, false>();
}

}  // namespace vosops::gpu
