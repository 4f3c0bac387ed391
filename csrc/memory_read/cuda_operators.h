// SPDX-License-Identifier: Apache-2.0
// The CUDA operators, with the schemas of vosops/ops/memory_read/schema.py.
#pragma once
#include <array>
#include <optional>
#include <tuple>

#include "../common/cuda_tensors.h"

namespace vosops::gpu {

std::tuple<Tensor, Tensor> memory_match(Tensor query_key, Tensor memory_key, std::optional<Tensor> shrinkage,
                                        std::optional<Tensor> selection, std::optional<Tensor> memory_mask,
                                        std::optional<Tensor> centers, std::optional<Tensor> precision,
                                        bool l2, double scale, int64_t top_k);
Tensor memory_gather(Tensor indices, Tensor weights, Tensor memory_value);
std::tuple<Tensor, Tensor> memory_gather_backward(Tensor grad_read, Tensor indices, Tensor weights,
                                                  Tensor memory_value, bool need_value);

}  // namespace vosops::gpu
