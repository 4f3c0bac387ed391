// SPDX-License-Identifier: Apache-2.0
#include "../common/isa.h"
#include "../common/tensors.h"

namespace vosops {
namespace {

constexpr int64_t kGrain = 8192;  // positions a task should have at least

Tensor soft_aggregate(Tensor probabilities) {
  const Kernels& k = kernels();
  const int64_t batch = probabilities.size(0), objects = probabilities.size(1),
                positions = count_of(probabilities, 2);
  const Operand p = operand_of(probabilities, "probabilities");
  const Tensor logits = make(probabilities, {batch, objects + 1, positions}, ScalarType::Float);
  for (int64_t b = 0; b < batch; ++b)
    torch::stable::parallel_for(0, positions, kGrain, [&](int64_t s0, int64_t s1) {
      k.aggregate(p, b, objects, positions, s0, s1, data_of<float>(logits));
    });
  return logits;
}

Tensor soft_aggregate_backward(Tensor grad, Tensor probabilities) {
  const Kernels& k = kernels();
  const int64_t batch = probabilities.size(0), objects = probabilities.size(1),
                positions = count_of(probabilities, 2);
  const Operand p = operand_of(probabilities, "probabilities");
  const float* incoming = floats_of(grad, "grad");
  const Tensor result = make(probabilities, {batch, objects, positions}, ScalarType::Float);
  for (int64_t b = 0; b < batch; ++b)
    torch::stable::parallel_for(0, positions, kGrain, [&](int64_t s0, int64_t s1) {
      k.aggregate_backward(p, b, objects, positions, s0, s1, incoming, data_of<float>(result));
    });
  return result;
}

}  // namespace
}  // namespace vosops

STABLE_TORCH_LIBRARY_IMPL(vosops, CPU, m) {
  m.impl("soft_aggregate", TORCH_BOX(&vosops::soft_aggregate));
  m.impl("soft_aggregate_backward", TORCH_BOX(&vosops::soft_aggregate_backward));
}
