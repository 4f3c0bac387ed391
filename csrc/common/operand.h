// SPDX-License-Identifier: Apache-2.0
// Tensors as the kernels see them: a base pointer, a type and strides. No torch here.
#pragma once
#include <cstdint>

namespace vosops {

enum class DType : int32_t { kFloat, kBFloat16, kHalf };

// A flattened run of positions (T, H, W, ...) with any strides; neighbouring dimensions that are
// contiguous with one another are merged, so that the usual layouts have one.
struct Positions {
  static constexpr int kMaxDims = 6;
  int dims = 0;
  int64_t size[kMaxDims] = {}, stride[kMaxDims] = {};
};

// [batch, channel, position] or [batch, object, channel, position].
struct Operand {
  const void* data = nullptr;
  DType dtype = DType::kFloat;
  int64_t batch_stride = 0, object_stride = 0, channel_stride = 0;
  int64_t heads = 1, head_stride = 0;  // batch entries of the kernels that share one of the tensor
  Positions positions;

  explicit operator bool() const { return data != nullptr; }
};

}  // namespace vosops
