// SPDX-License-Identifier: Apache-2.0
// The CPU operators that pass over all scores: the dense read and its gradient, usage, the best query.
#include "passes.h"

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

std::tuple<Tensor, Tensor, Tensor, Tensor> memory_read_dense_backward(
    Tensor query_key, Tensor memory_key, std::optional<Tensor> shrinkage, std::optional<Tensor> selection,
    std::optional<Tensor> memory_mask, std::optional<Tensor> centers, std::optional<Tensor> precision,
    bool l2, double scale, Tensor memory_value, Tensor grad_read, Tensor delta, Tensor lse) {
  Call call =
      make_call(query_key, memory_key, shrinkage, selection, memory_mask, centers, precision, l2, scale);
  return dense_backward_all(call, values_of(memory_value), floats_of(grad_read, "grad_read"),
                            floats_of(delta, "delta"), floats_of(lse, "lse"), query_key);
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
  usage_all(call, norms, data_of<float>(usage));
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
