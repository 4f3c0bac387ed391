// SPDX-License-Identifier: Apache-2.0
// The kernels of local attention, one translation unit per element type.
#pragma once
#include <cuda_runtime.h>

#include "cuda_pack.cuh"
#include "cuda_problem.cuh"

namespace vosops::gpu::local {

// Each launches one kernel; `shared` is its dynamic shared memory in bytes.
struct Kernels {
  cudaError_t (*pack)(const Packs&, cudaStream_t);
  cudaError_t (*pack_tables)(const PackTables&, cudaStream_t);
  cudaError_t (*forward)(const Local&, dim3 grid, int64_t shared, cudaStream_t);
  cudaError_t (*queries)(const LocalBackward&, dim3 grid, int64_t shared, cudaStream_t);
  cudaError_t (*spread)(const LocalBackward&, dim3 grid, int64_t shared, cudaStream_t);
  cudaError_t (*table)(const TableGradient&, dim3 grid, int64_t shared, cudaStream_t);
};
const Kernels& kernels_half();
const Kernels& kernels_bfloat16();
cudaError_t launch_sum(const TableSum&, cudaStream_t);

}  // namespace vosops::gpu::local
