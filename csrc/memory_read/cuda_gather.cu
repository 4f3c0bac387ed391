// SPDX-License-Identifier: Apache-2.0
// Launches of the read and its gradient.
#include <algorithm>
#include <tuple>

#include "cuda_gather_backward.cuh"
#include "cuda_operators.h"

namespace vosops::gpu {
namespace {

template <class T>
__global__ void __launch_bounds__(kGatherThreads) gather_kernel(const __grid_constant__ Gather p) {
  __shared__ __align__(16) float sums[kGatherRows * kGatherStride];
  gather_block<T>(p, sums);
}

__global__ void __launch_bounds__(kGatherThreads) gather_any_kernel(const __grid_constant__ Gather p) {
  gather_any(p);
}

__global__ void __launch_bounds__(kGatherThreads) turn_kernel(const __grid_constant__ GatherBackward p) {
  __shared__ float tile[kTurn * (kTurn + 1)];
  turn_block(p, tile);
}

template <class T, bool Runs>
__global__ void __launch_bounds__(kGatherThreads)
    grad_weights_kernel(const __grid_constant__ GatherBackward p) {
  grad_weights_warp<T, Runs>(p);
}

__global__ void __launch_bounds__(kGatherThreads) keys_kernel(const __grid_constant__ GatherBackward p) {
  keys_thread(p, int64_t(blockIdx.x) * kGatherThreads + threadIdx.x);
}

__global__ void __launch_bounds__(kGatherThreads) starts_kernel(const __grid_constant__ GatherBackward p) {
  starts_thread(p, int64_t(blockIdx.x) * kGatherThreads + threadIdx.x);
}

template <bool Aligned>
__global__ void __launch_bounds__(kGatherThreads)
    grad_value_kernel(const __grid_constant__ GatherBackward p) {
  __shared__ __align__(16) float sums[kGatherRows * kGatherStride];
  grad_value_block<Aligned>(p, sums);
}

dim3 grid_of(int64_t x, int64_t y, int64_t z) {
  STD_TORCH_CHECK(x <= INT32_MAX && y <= 65535 && z <= 65535,
                  "too many queries, channels or batch entries for the cuda backend: blocks ", x, " x ", y,
                  " x ", z);
  return dim3(unsigned(x), unsigned(y), unsigned(z));
}

Gather gather_of(const Tensor& indices, const Tensor& weights, const Tensor& memory_value) {
  STD_TORCH_CHECK(indices.scalar_type() == ScalarType::Long && weights.scalar_type() == ScalarType::Float &&
                      indices.is_contiguous() && weights.is_contiguous() && indices.dim() == 3 &&
                      weights.numel() == indices.numel(),
                  "indices and weights must be contiguous int64 and float32 of one shape (B, Q, k)");
  check_device(indices, memory_value, "indices");
  check_device(weights, memory_value, "weights");
  const int64_t memory = count_of(memory_value, 3);
  STD_TORCH_CHECK(memory < INT32_MAX - 1024 && indices.size(1) * indices.size(2) < INT32_MAX &&
                      memory_value.size(1) * memory_value.size(2) < INT32_MAX - 1024,
                  "memory positions, matches of a batch entry and channels must each be fewer than 2^31");
  Gather p;
  p.value = operand_of(memory_value, "memory_value");
  p.value.object_stride = memory_value.stride(1);
  p.value.channel_stride = memory_value.stride(2);
  p.value.positions = positions_of(memory_value, 3);
  if (memory_value.size(0) == 1) p.value.batch_stride = 0;
  if (memory_value.size(1) == 1) p.value.object_stride = 0;
  p.batch = int(indices.size(0));
  p.objects = int(memory_value.size(1));
  p.channels = int(memory_value.size(2));
  p.queries = int(indices.size(1));
  p.memory = int(memory);
  p.k = int(indices.size(2));
  p.indices = static_cast<const int64_t*>(indices.const_data_ptr());
  p.weights = static_cast<const float*>(weights.const_data_ptr());
  return p;
}

// Calls f(T()) with the element type of the values.
template <class F>
void with_type(DType type, const F& f) {
  if (type == DType::kFloat)
    f(float());
  else if (type == DType::kHalf)
    f(Half());
  else
    f(BFloat16());
}

// torch's stable sort of the last dimension; torch 2.11's stable headers have no function for it.
std::tuple<Tensor, Tensor> sort_rows(const Tensor& x) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  std::array<StableIValue, 4> stack{from(x), from(std::optional<bool>(true)), from(int64_t(-1)), from(false)};
  STD_TORCH_CHECK(
      torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION) == AOTI_TORCH_SUCCESS,
      "torch.sort failed");
  return {to<Tensor>(stack[0]), to<Tensor>(stack[1])};
}

}  // namespace

Tensor memory_gather(Tensor indices, Tensor weights, Tensor memory_value) {
  Gather p = gather_of(indices, weights, memory_value);
  const Device device(memory_value);
  const Tensor read = make(memory_value, {p.batch, p.objects, p.channels, p.queries}, ScalarType::Float);
  if (read.numel() == 0) return read;
  p.read = data_of<float>(read);
  if (has_channel_runs(p)) {
    const dim3 grid = grid_of(ceil_div(p.queries, kGatherRows),
                              int64_t(p.objects) * ceil_div(p.channels, kGatherChannels), p.batch);
    with_type(p.value.dtype, [&](auto type) {
      gather_kernel<decltype(type)><<<grid, kGatherThreads, 0, device.stream()>>>(p);
    });
  } else {
    const dim3 grid = grid_of(ceil_div(p.queries, kGatherThreads),
                              ceil_div(int64_t(p.objects) * p.channels, kGatherLane), p.batch);
    gather_any_kernel<<<grid, kGatherThreads, 0, device.stream()>>>(p);
  }
  check_launch("memory_gather");
  return read;
}

std::tuple<Tensor, Tensor> memory_gather_backward(Tensor grad_read, Tensor indices, Tensor weights,
                                                  Tensor memory_value, bool need_value) {
  GatherBackward p;
  Gather& f = p.forward;
  f = gather_of(indices, weights, memory_value);
  check_device(grad_read, memory_value, "grad_read");
  p.grad = floats_of(grad_read, "grad_read");
  const Device device(memory_value);
  const cudaStream_t stream = device.stream();
  const int64_t channels = int64_t(f.objects) * f.channels, each = int64_t(f.queries) * f.k;
  STD_TORCH_CHECK(grad_read.numel() == f.batch * channels * f.queries,
                  "grad_read must have the shape of the read");
  Tensor grad_weights = make(memory_value, {f.batch, f.queries, f.k}, ScalarType::Float);
  Tensor grad_value =
      make(memory_value, {f.batch, f.objects, f.channels, need_value ? f.memory : 0}, ScalarType::Float);
  if (f.batch * channels * each == 0) {
    torch::stable::zero_(grad_weights);
    torch::stable::zero_(grad_value);
    return {grad_weights, grad_value};
  }
  const Tensor rows = make(memory_value, {f.batch, f.queries, channels}, ScalarType::Float);
  p.grad_rows = data_of<float>(rows);
  p.grad_weights = data_of<float>(grad_weights);
  turn_kernel<<<grid_of(ceil_div(f.queries, kTurn), ceil_div(channels, kTurn), f.batch), kGatherThreads, 0,
                stream>>>(p);
  check_launch("memory_gather_backward, transpose");
  const dim3 grid = grid_of(ceil_div(f.queries, kGatherThreads / 32), 1, f.batch);
  if (has_channel_runs(f))
    with_type(f.value.dtype, [&](auto type) {
      grad_weights_kernel<decltype(type), true><<<grid, kGatherThreads, 0, stream>>>(p);
    });
  else
    grad_weights_kernel<float, false><<<grid, kGatherThreads, 0, stream>>>(p);
  check_launch("memory_gather_backward, weights");
  if (grad_value.numel() == 0) return {grad_weights, grad_value};

  const Tensor keys = make(memory_value, {f.batch, each}, ScalarType::Int);
  p.keys = data_of<int32_t>(keys);
  keys_kernel<<<grid_of(ceil_div(f.batch * each, kGatherThreads), 1, 1), kGatherThreads, 0, stream>>>(p);
  check_launch("memory_gather_backward, keys");
  const auto [sorted, entries] = sort_rows(keys);
  STD_TORCH_CHECK(sorted.is_contiguous() && entries.is_contiguous(),
                  "torch.sort must give contiguous results");
  const Tensor starts = make(memory_value, {f.batch, int64_t(f.memory) + 1}, ScalarType::Int);
  p.sorted = static_cast<const int32_t*>(sorted.const_data_ptr());
  p.entries = static_cast<const int64_t*>(entries.const_data_ptr());
  p.starts = data_of<int32_t>(starts);
  p.grad_value = data_of<float>(grad_value);
  starts_kernel<<<grid_of(ceil_div(starts.numel(), kGatherThreads), 1, 1), kGatherThreads, 0, stream>>>(p);
  check_launch("memory_gather_backward, starts");
  const dim3 value_grid =
      grid_of(ceil_div(f.memory, kGatherRows), ceil_div(channels, kGatherChannels), f.batch);
  if (channels % kGatherLane == 0)
    grad_value_kernel<true><<<value_grid, kGatherThreads, 0, stream>>>(p);
  else
    grad_value_kernel<false><<<value_grid, kGatherThreads, 0, stream>>>(p);
  check_launch("memory_gather_backward, values");
  return {grad_weights, grad_value};
}

}  // namespace vosops::gpu
