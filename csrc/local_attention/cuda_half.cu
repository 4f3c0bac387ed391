// SPDX-License-Identifier: Apache-2.0
#include "cuda_kernels.cuh"

namespace vosops::gpu::local {

const Kernels& kernels_half() { return kKernels<Half>; }

}  // namespace vosops::gpu::local
