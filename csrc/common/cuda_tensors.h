// SPDX-License-Identifier: Apache-2.0
// Host side of the CUDA operators: device, stream and launches on torch's stable ABI.
#pragma once
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "tensors.h"

namespace vosops::gpu {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline void check(cudaError_t error, const char* what) {
  STD_TORCH_CHECK(error == cudaSuccess, what, ": ", cudaGetErrorString(error));
}

// The tensor's device for the life of this object, and torch's current stream there.
class Device {
 public:
  explicit Device(const Tensor& x) : index_(int(x.get_device_index())), guard_(index_) {
    // The guard switched torch's CUDA runtime; the one linked into this library keeps a device of its own.
    check(cudaSetDevice(index_), "cudaSetDevice");
    void* stream = nullptr;
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream) == AOTI_TORCH_SUCCESS,
                    "no current CUDA stream on device ", index_);
    stream_ = static_cast<cudaStream_t>(stream);
  }

  cudaStream_t stream() const { return stream_; }

  int attribute(cudaDeviceAttr which) const {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, which, index_), "cudaDeviceGetAttribute");
    return value;
  }
  int multiprocessors() const { return attribute(cudaDevAttrMultiProcessorCount); }
  int shared_memory() const { return attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin); }
  int generation() const { return attribute(cudaDevAttrComputeCapabilityMajor); }

 private:
  int index_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

inline void check_launch(const char* kernel) { check(cudaGetLastError(), kernel); }

inline void check_device(const Tensor& x, const Tensor& like, const char* name) {
  STD_TORCH_CHECK(x.is_cuda() && x.get_device_index() == like.get_device_index(), name,
                  " must be on the CUDA device of the other tensors, ", like.get_device_index());
}

}  // namespace vosops::gpu
