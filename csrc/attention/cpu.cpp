// SPDX-License-Identifier: Apache-2.0
// The CPU operators of multi-head attention. Heads are batch entries; the top-k match, the usage and the
// gradient are the memory read's kernels, the dense read has one of its own.
#include "../memory_read/passes.h"

namespace vosops {
namespace {

// [B, N, h * C] as batch entries b * h + head.
Operand heads_of(const Tensor& x, int64_t heads, const char* name) {
  Operand out;
  out.data = x.const_data_ptr();
  out.dtype = dtype_of(x, name);
  out.batch_stride = x.stride(0);
  out.heads = heads;
  out.head_stride = x.size(2) / heads * x.stride(2);
  out.channel_stride = x.stride(2);
  out.positions.dims = 1;
  out.positions.size[0] = x.size(1);
  out.positions.stride[0] = x.stride(1);
  return out;
}

Call make_attention(const Tensor& query, const Tensor& key, const std::optional<Tensor>& gate, int64_t heads,
                    bool distance, double scale) {
  Call call;
  Problem& p = call.p;
  STD_TORCH_CHECK(key.size(0) == query.size(0) && key.size(2) == query.size(2),
                  "key must have the batch and channels of query");
  p.batch = query.size(0) * heads;
  p.channels = int(query.size(2) / heads);
  p.queries = query.size(1);
  p.memory = key.size(1);
  STD_TORCH_CHECK(p.memory > 0 && p.memory < INT32_MAX - 1024 && p.queries < INT32_MAX - 1024,
                  "between 1 and 2^31 memory positions and queries, got ", p.memory, " and ", p.queries);
  p.l2 = distance;  // 2 scale <q, k> - |k|^2
  p.scale = float(scale);
  p.query = heads_of(query, heads, "query");
  p.key = heads_of(key, heads, "key");
  if (gate) {
    p.gate = heads_of(*gate, heads, "identity_gate");
    p.gate.head_stride = gate->size(2) == 1 ? 0 : gate->stride(2);
  }
  return call;
}

std::tuple<Tensor, Tensor> attention_match(Tensor query, Tensor key, std::optional<Tensor> gate,
                                           int64_t heads, bool distance, double scale, int64_t top_k) {
  Call call = make_attention(query, key, gate, heads, distance, scale);
  const Problem& p = call.p;
  const int k = int(std::min(top_k, p.memory));
  const Tensor indices = make(query, {query.size(0), heads, p.queries, k}, ScalarType::Long);
  const Tensor weights = make(query, {query.size(0), heads, p.queries, k}, ScalarType::Float);
  if (indices.numel() > 0) match_all(call, k, data_of<int64_t>(indices), data_of<float>(weights));
  return {indices, weights};
}

std::tuple<Tensor, Tensor> attention_dense(Tensor query, Tensor key, std::optional<Tensor> gate,
                                           int64_t heads, bool distance, double scale,
                                           std::vector<Tensor> values, std::optional<Tensor> identity) {
  Call call = make_attention(query, key, gate, heads, distance, scale);
  const Problem& p = call.p;
  std::vector<Bank> bank(values.size());
  Banks banks;
  banks.heads = heads;
  for (size_t i = 0; i < values.size(); ++i) {
    STD_TORCH_CHECK(values[i].size(1) == p.memory, "value must hold one entry per memory position");
    bank[i].value = heads_of(values[i], heads, "value");
    if (identity) bank[i].identity = heads_of(*identity, heads, "identity");
    bank[i].channels = values[i].size(2) / heads;
    bank[i].column = banks.columns;
    banks.channels += bank[i].channels;
    banks.columns += values[i].size(2);
  }
  banks.bank = bank.data();
  banks.count = int(bank.size());
  const Tensor read = make(query, {query.size(0), p.queries, banks.columns}, ScalarType::Float);
  const Tensor lse = make(query, {query.size(0), heads, p.queries}, ScalarType::Float);
  if (lse.numel() == 0) return {read, lse};
  // The accumulators of a task's queries should stay in cache; the more queries, the less often a task's walk
  // over the memory has to be repeated, so they may take more of it than elsewhere.
  const int64_t panels = ceil_div(p.queries, call.k.cols);
  const int64_t panel_bytes = (banks.channels + p.channels) * call.k.cols * 4;
  const int64_t each = call.chunk(panels, std::max<int64_t>(1, 5 * kCacheBytes / 4 / panel_bytes), 1);
  call.for_ranges(panels, each, [&](int64_t batch, int64_t first, int64_t last) {
    call.k.attention(p, banks, batch, first, last, data_of<float>(read), data_of<float>(lse));
  });
  return {read, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_dense_backward(
    Tensor query, Tensor key, std::optional<Tensor> gate, int64_t heads, bool distance, double scale,
    Tensor value, std::optional<Tensor> identity, Tensor grad_read, Tensor delta, Tensor lse) {
  Call call = make_attention(query, key, gate, heads, distance, scale);
  Values values;
  values.objects = 1;
  values.channels = value.size(2) / heads;
  values.value = heads_of(value, heads, "value");
  if (identity) values.identity = heads_of(*identity, heads, "identity");
  return dense_backward_all(call, values, floats_of(grad_read, "grad_read"), floats_of(delta, "delta"),
                            floats_of(lse, "lse"), query);
}

Tensor attention_usage(Tensor query, Tensor key, std::optional<Tensor> gate, int64_t heads, bool distance,
                       double scale, Tensor lse) {
  Call call = make_attention(query, key, gate, heads, distance, scale);
  const float* norms = floats_of(lse, "lse");
  const Tensor usage = make(query, {query.size(0), heads, call.p.memory}, ScalarType::Float);
  usage_all(call, norms, data_of<float>(usage));
  return usage;
}

}  // namespace
}  // namespace vosops

STABLE_TORCH_LIBRARY_IMPL(vosops, CPU, m) {
  m.impl("attention_match", TORCH_BOX(&vosops::attention_match));
  m.impl("attention_dense", TORCH_BOX(&vosops::attention_dense));
  m.impl("attention_dense_backward", TORCH_BOX(&vosops::attention_dense_backward));
  m.impl("attention_usage", TORCH_BOX(&vosops::attention_usage));
}
