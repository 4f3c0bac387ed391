// SPDX-License-Identifier: Apache-2.0
// The CPU operators that pass over all scores: the dense read and its gradient, usage, the best query.
#include "call.h"

namespace vosops {
namespace {

std::tuple<Tensor, Tensor> memory_read_dense(Tensor query_key, Tensor memory_key,
                                             std::optional<Tensor> shrinkage, std::optional<Tensor> selection,
                                             std::optional<Tensor> memory_mask, std::optional<Tensor> centers,
                                             std::optional<Tensor> precision, bool l2, double scale,
                                             Tensor memory_value) {
  Call call =
      make_call(query_key, memory_key, shrinkage, selection, memory_mask, centers, precision, l2, scale);
  const Problem& p = call.p;
  const Values values = values_of(memory_value);
  STD_TORCH_CHECK(count_of(memory_value, 3) == p.memory,
                  "memory_value must hold one entry per memory position");
  const Tensor read =
      make(query_key, {p.batch, values.objects, values.channels, p.queries}, ScalarType::Float);
  const Tensor lse = make(query_key, {p.batch, p.queries}, ScalarType::Float);
  if (p.batch * p.queries == 0) return {read, lse};
  call.pack();
  // The accumulators of a task's queries should stay in cache.
  const int64_t row_bytes = std::max<int64_t>(1, values.objects * values.channels) * 4 * call.k.rows;
  const int64_t blocks = call.chunk(call.packed.blocks, std::max<int64_t>(4, kCacheBytes / row_bytes), 1);
  call.for_ranges(call.packed.blocks, blocks, [&](int64_t batch, int64_t b0, int64_t b1) {
    call.k.dense(p, call.packed, values, batch, b0, b1, data_of<float>(read), data_of<float>(lse));
  });
  return {read, lse};
}

// Gradients to the packed operands a [B, Q, depth] and b [B, M, depth], the bias [B, M] and the values.
// Every task adds to queries of its own; their sums are added in order, so a run repeats bit for bit.
std::tuple<Tensor, Tensor, Tensor, Tensor> memory_read_dense_backward(
    Tensor query_key, Tensor memory_key, std::optional<Tensor> shrinkage, std::optional<Tensor> selection,
    std::optional<Tensor> memory_mask, std::optional<Tensor> centers, std::optional<Tensor> precision,
    bool l2, double scale, Tensor memory_value, Tensor grad_read, Tensor delta, Tensor lse) {
  Call call =
      make_call(query_key, memory_key, shrinkage, selection, memory_mask, centers, precision, l2, scale);
  const Problem& p = call.p;
  const Kernels& k = call.k;
  const Values values = values_of(memory_value);
  const float* grad = floats_of(grad_read, "grad_read");
  const float* shift = floats_of(delta, "delta");
  const float* norms = floats_of(lse, "lse");
  call.pack();
  const int64_t depth = call.packed.depth, columns = values.objects * values.channels;
  const Tensor grad_left = make(query_key, {p.batch, p.queries, depth}, ScalarType::Float);
  const Tensor grad_right = make(query_key, {p.batch, p.memory, depth}, ScalarType::Float);
  const Tensor grad_bias = make(query_key, {p.batch, p.memory}, ScalarType::Float);
  const Tensor grad_value =
      make(query_key, {p.batch, values.objects, values.channels, p.memory}, ScalarType::Float);
  const int64_t rows = ceil_div(p.queries, k.chunk) * k.chunk, panel = rows * k.cols;
  const int64_t value_panels = ceil_div(columns, k.cols), key_panels = ceil_div(depth, k.cols);
  const int64_t chunk =
      ceil_div(ceil_div(p.memory, std::max<int64_t>(1, get_num_threads())), k.cols) * k.cols;
  const int64_t tasks = ceil_div(p.memory, chunk);
  auto grad_rows = uninitialised(value_panels * panel), left = uninitialised(key_panels * panel);
  std::vector<float> partial(tasks * key_panels * panel);
  for (int64_t batch = 0; batch < p.batch && p.queries > 0; ++batch) {
    parallel_for(0, value_panels, 1, [&](int64_t first, int64_t last) {
      k.pack_grad(grad + batch * columns * p.queries, columns, p.queries, first, last, grad_rows.get());
    });
    k.unpack_queries(call.packed, batch, p.queries, left.get());
    std::fill(partial.begin(), partial.end(), 0.f);
    parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task)
        k.dense_backward(p, call.packed, values, batch, task * chunk, std::min(p.memory, (task + 1) * chunk),
                         norms, shift, grad_rows.get(), left.get(),
                         partial.data() + task * key_panels * panel, data_of<float>(grad_right),
                         data_of<float>(grad_bias), data_of<float>(grad_value));
    });
    float* out = data_of<float>(grad_left) + batch * p.queries * depth;
    parallel_for(0, p.queries, 64, [&](int64_t q0, int64_t q1) {
      for (int64_t q = q0; q < q1; ++q)
        for (int64_t c = 0; c < depth; ++c) {
          float sum = 0;
          for (int64_t task = 0; task < tasks; ++task)
            sum += partial[((task * key_panels + c / k.cols) * rows + q) * k.cols + c % k.cols];
          out[q * depth + c] = sum;
        }
    });
  }
  if (p.queries == 0)
    for (const Tensor& x : {grad_right, grad_bias, grad_value})
      std::memset(x.mutable_data_ptr(), 0, sizeof(float) * x.numel());
  return {grad_left, grad_right, grad_bias, grad_value};
}

Tensor memory_usage(Tensor query_key, Tensor memory_key, std::optional<Tensor> shrinkage,
                    std::optional<Tensor> selection, std::optional<Tensor> memory_mask,
                    std::optional<Tensor> centers, std::optional<Tensor> precision, bool l2, double scale,
                    Tensor lse) {
  Call call =
      make_call(query_key, memory_key, shrinkage, selection, memory_mask, centers, precision, l2, scale);
  const Problem& p = call.p;
  const float* norms = floats_of(lse, "lse");
  const Tensor usage = make(query_key, {p.batch, p.memory}, ScalarType::Float);
  call.pack();
  call.for_ranges(p.memory, call.chunk(p.memory, 4096, 64), [&](int64_t batch, int64_t m0, int64_t m1) {
    call.k.usage(p, call.packed, batch, m0, m1, norms, data_of<float>(usage));
  });
  return usage;
}

Tensor memory_best_query(Tensor query_key, Tensor memory_key, std::optional<Tensor> shrinkage,
                         std::optional<Tensor> selection, std::optional<Tensor> memory_mask, bool l2,
                         double scale, std::optional<Tensor> log_prior, std::optional<Tensor> gain,
                         int64_t window) {
  Call call = make_call(query_key, memory_key, shrinkage, selection, memory_mask, {}, {}, l2, scale);
  Problem& p = call.p;
  p.log_prior = floats_of(log_prior, "log_prior");
  p.gain = floats_of(gain, "gain");
  p.window = window;
  const Tensor best = make(query_key, {p.batch, p.memory}, ScalarType::Long);
  call.pack();
  call.for_ranges(p.memory, call.chunk(p.memory, 4096, 64), [&](int64_t batch, int64_t m0, int64_t m1) {
    call.k.best_query(p, call.packed, batch, m0, m1, data_of<int64_t>(best));
  });
  return best;
}

}  // namespace
}  // namespace vosops

STABLE_TORCH_LIBRARY_IMPL(vosops, CPU, m) {
  m.impl("memory_read_dense", TORCH_BOX(&vosops::memory_read_dense));
  m.impl("memory_read_dense_backward", TORCH_BOX(&vosops::memory_read_dense_backward));
  m.impl("memory_usage", TORCH_BOX(&vosops::memory_usage));
  m.impl("memory_best_query", TORCH_BOX(&vosops::memory_best_query));
}
