// SPDX-License-Identifier: Apache-2.0
// The CPU operators of the top-k read: match and gather. The kernels do the work.
#include "passes.h"

namespace vosops {
namespace {

std::tuple<Tensor, Tensor> memory_match(Tensor query_key, Tensor memory_key, std::optional<Tensor> shrinkage,
                                        std::optional<Tensor> selection, std::optional<Tensor> memory_mask,
                                        std::optional<Tensor> centers, std::optional<Tensor> precision,
                                        bool l2, double scale, int64_t top_k) {
  Call call =
      make_call(query_key, memory_key, shrinkage, selection, memory_mask, centers, precision, l2, scale);
  const Problem& p = call.p;
  const int k = int(std::min(top_k, p.memory));
  const Tensor indices = make(query_key, {p.batch, p.queries, k}, ScalarType::Long);
  const Tensor weights = make(query_key, {p.batch, p.queries, k}, ScalarType::Float);
  if (p.batch * p.queries == 0) return {indices, weights};
  match_all(call, k, data_of<int64_t>(indices), data_of<float>(weights));
  return {indices, weights};
}

struct MatchTensors {
  const int64_t* indices;
  const float* weights;
  int64_t batch, queries;
  int k;

  MatchTensors(const Tensor& i, const Tensor& w)
      : indices(static_cast<const int64_t*>(i.const_data_ptr())),
        weights(static_cast<const float*>(w.const_data_ptr())),
        batch(i.size(0)),
        queries(i.size(1)),
        k(int(i.size(2))) {
    STD_TORCH_CHECK(i.scalar_type() == ScalarType::Long && w.scalar_type() == ScalarType::Float &&
                        i.is_contiguous() && w.is_contiguous() && w.numel() == i.numel(),
                    "indices and weights must be contiguous int64 and float32 of one shape");
  }
};

// Channels of a task: whole blocks, one for each thread or more.
int64_t channel_chunk(int64_t channels) {
  const int64_t blocks = ceil_div(channels, kChannelBlock), threads = get_num_threads();
  return ceil_div(blocks, ceil_div(blocks, ceil_div(blocks, std::max<int64_t>(1, threads)))) * kChannelBlock;
}

// Before any work: an index past the memory would read foreign bytes.
void check_indices(const MatchTensors& m, int64_t memory) {
  int64_t largest = -1;
  for (int64_t i = 0; i < m.batch * m.queries * m.k; ++i) largest = std::max(largest, m.indices[i]);
  STD_TORCH_CHECK(largest < memory, "match.indices must lie in the memory of ", memory, " positions, got ",
                  largest);
}

Tensor memory_gather(Tensor indices, Tensor weights, Tensor memory_value) {
  const Kernels& k = kernels();
  const MatchTensors m(indices, weights);
  const Values values = values_of(memory_value);
  const int64_t memory = count_of(memory_value, 3), channels = values.objects * values.channels;
  const Tensor read =
      make(memory_value, {m.batch, values.objects, values.channels, m.queries}, ScalarType::Float);
  check_indices(m, memory);
  if (read.numel() == 0) return read;
  if (values.value.channel_stride == 1) {
    for (int64_t batch = 0; batch < m.batch; ++batch)
      parallel_for(0, ceil_div(m.queries, 16), 1, [&](int64_t b, int64_t e) {
        k.gather_rows(values, batch, m.indices, m.weights, m.k, m.queries, b * 16,
                      std::min(m.queries, e * 16), data_of<float>(read));
      });
    return read;
  }
  const int64_t chunk = channel_chunk(channels), each = ceil_div(channels, chunk);
  parallel_for(0, m.batch * each, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t c0 = task % each * chunk;
      k.gather_channels(values, task / each, memory, m.indices, m.weights, m.k, m.queries, c0,
                        std::min(channels, c0 + chunk), data_of<float>(read));
    }
  });
  return read;
}

// Deterministic: every channel block is summed by one thread in order, and the partial gradients of the
// weights are added in order of the blocks.
std::tuple<Tensor, Tensor> memory_gather_backward(Tensor grad_read, Tensor indices, Tensor weights,
                                                  Tensor memory_value, bool need_value) {
  const Kernels& k = kernels();
  const MatchTensors m(indices, weights);
  const Values values = values_of(memory_value);
  const int64_t memory = count_of(memory_value, 3), channels = values.objects * values.channels;
  const float* grad = floats_of(grad_read, "grad_read");
  check_indices(m, memory);
  const Tensor grad_weights = make(memory_value, {m.batch, m.queries, m.k}, ScalarType::Float);
  const Tensor grad_value = make(
      memory_value, {m.batch, values.objects, values.channels, need_value ? memory : 0}, ScalarType::Float);
  const int64_t size = m.queries * m.k;
  std::memset(grad_weights.mutable_data_ptr(), 0, sizeof(float) * m.batch * size);
  if (m.batch * channels == 0 || size == 0) {
    std::memset(grad_value.mutable_data_ptr(), 0, sizeof(float) * grad_value.numel());
    return {grad_weights, grad_value};
  }
  const int64_t chunk = channel_chunk(channels), each = ceil_div(channels, chunk);
  std::vector<float> partial(each * size);
  for (int64_t batch = 0; batch < m.batch; ++batch) {
    std::fill(partial.begin(), partial.end(), 0.f);
    parallel_for(0, each, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t c0 = task * chunk;
        k.gather_backward(values, batch, memory, m.indices, m.weights, m.k, m.queries, c0,
                          std::min(channels, c0 + chunk), grad, partial.data() + task * size,
                          need_value ? data_of<float>(grad_value) : nullptr);
      }
    });
    float* sum = data_of<float>(grad_weights) + batch * size;
    for (int64_t task = 0; task < each; ++task)
      for (int64_t i = 0; i < size; ++i) sum[i] += partial[task * size + i];
  }
  return {grad_weights, grad_value};
}

}  // namespace
}  // namespace vosops

STABLE_TORCH_LIBRARY_IMPL(vosops, CPU, m) {
  m.impl("memory_match", TORCH_BOX(&vosops::memory_match));
  m.impl("memory_gather", TORCH_BOX(&vosops::memory_gather));
  m.impl("memory_gather_backward", TORCH_BOX(&vosops::memory_gather_backward));
}
