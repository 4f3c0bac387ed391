// SPDX-License-Identifier: Apache-2.0
// Torch tensors as operands, on torch's stable ABI.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>

#include "operand.h"

namespace vosops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline DType dtype_of(const Tensor& x, const char* name) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return DType::kFloat;
    case ScalarType::BFloat16: return DType::kBFloat16;
    case ScalarType::Half: return DType::kHalf;
    default: break;
  }
  STD_TORCH_CHECK(false, name, ": the cpu backend serves float32, bfloat16 and float16");
  return DType::kFloat;
}

// Dimensions from `first` on, flattened.
inline Positions positions_of(const Tensor& x, int64_t first) {
  Positions out;
  const auto sizes = x.sizes();
  const auto strides = x.strides();
  for (int64_t d = first; d < x.dim(); ++d) {
    if (sizes[d] == 1) continue;
    if (out.dims > 0 && out.stride[out.dims - 1] == sizes[d] * strides[d]) {
      out.size[out.dims - 1] *= sizes[d];
      out.stride[out.dims - 1] = strides[d];
      continue;
    }
    STD_TORCH_CHECK(out.dims < Positions::kMaxDims, "more than ", int(Positions::kMaxDims),
                    " separate dimensions");
    out.size[out.dims] = sizes[d];
    out.stride[out.dims++] = strides[d];
  }
  if (out.dims == 0) {
    out.dims = 1;
    out.size[0] = 1;
  }
  return out;
}

inline int64_t count_of(const Tensor& x, int64_t first) {
  int64_t count = 1;
  for (int64_t d = first; d < x.dim(); ++d) count *= x.sizes()[d];
  return count;
}

// [B, C, positions...].
inline Operand operand_of(const Tensor& x, const char* name) {
  Operand out;
  out.data = x.const_data_ptr();
  out.dtype = dtype_of(x, name);
  out.batch_stride = x.stride(0);
  out.channel_stride = x.stride(1);
  out.positions = positions_of(x, 2);
  return out;
}

inline Operand operand_of(const std::optional<Tensor>& x, const char* name) {
  return x ? operand_of(*x, name) : Operand{};
}

inline const float* floats_of(const std::optional<Tensor>& x, const char* name) {
  if (!x) return nullptr;
  STD_TORCH_CHECK(x->scalar_type() == ScalarType::Float && x->is_contiguous(), name,
                  " must be contiguous float32");
  return static_cast<const float*>(x->const_data_ptr());
}

// Uninitialised tensor of `like`'s device.
inline Tensor make(const Tensor& like, std::initializer_list<int64_t> shape, ScalarType dtype) {
  return torch::stable::new_empty(like, shape, dtype);
}

template <class T>
T* data_of(const Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}

}  // namespace vosops
