// SPDX-License-Identifier: Apache-2.0
#include "cuda_match_kernels.cuh"

namespace vosops::gpu {

MatchKernel match_kernel_half(bool selection, bool group) { return choose_kernel<Half>(selection, group); }

}  // namespace vosops::gpu
