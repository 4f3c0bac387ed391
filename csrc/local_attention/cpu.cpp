// SPDX-License-Identifier: Apache-2.0
// Local attention and its gradient: how the work is cut into tasks.
#include <algorithm>
#include <memory>
#include <tuple>
#include <vector>

#include "../common/isa.h"
#include "../common/tensors.h"

namespace vosops {
namespace {

using torch::stable::parallel_for;

Map map_of(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.dim() == 4, name, " must have 4 dimensions");
  return {x.const_data_ptr(), dtype_of(x, name), x.stride(0), x.stride(1), x.stride(2), x.stride(3)};
}

struct LocalCall {
  const Kernels& k = kernels();
  LocalProblem p;
  LocalLayout l;
  LocalPack pack;
  std::vector<std::unique_ptr<float[]>> owned;

  bool empty() const { return p.batch * p.height * p.width == 0; }

  float* own(int64_t count) {
    // Not zeroed: a kernel fills it completely.
    owned.push_back(std::unique_ptr<float[]>(new float[std::max<int64_t>(count, 1)]));
    return owned.back().get();
  }
  float* rows(int channels) { return own(l.planes * l.key_rows(channels)); }
  float* cells(int chunks, int width) { return own(l.planes * l.cells(chunks, width)); }
  float* table_rows(int channels) { return own(int64_t(p.heads) * p.window * l.window_row * channels); }
  float* table_cells(int chunks, int width) { return own(p.heads * l.table(chunks, width)); }

  // A product over channels needs rows of them, one over offsets cells.
  void run_pack(bool backward) {
    pack.key_rows = rows(p.channels);
    if (p.weight) pack.weight_rows = table_rows(p.channels);
    if (p.weight_offset) pack.weight_offset = table_rows(1);
    if (backward) {
      pack.key_cells = cells(l.key_chunks, l.key_width);
      pack.value_rows = rows(p.value_channels);
      if (p.weight) pack.weight_cells = table_cells(l.key_chunks, l.key_width);
      if (p.relative_value) pack.relative_rows = table_rows(p.value_channels);
    } else {
      pack.value_cells = cells(l.value_chunks, l.value_width);
      if (p.relative_value) pack.relative_cells = table_cells(l.value_chunks, l.value_width);
    }
    parallel_for(0, l.planes * l.rows, 4,
                 [&](int64_t first, int64_t last) { k.local_pack(p, l, pack, first, last); });
    parallel_for(0, p.heads, 1, [&](int64_t first, int64_t last) {
      for (int64_t head = first; head < last; ++head) k.local_pack_tables(p, l, pack, head);
    });
  }
};

LocalCall make_call(const Tensor& query, const Tensor& key, const Tensor& value,
                    const std::optional<Tensor>& relative_bias, const std::optional<Tensor>& relative_weight,
                    const std::optional<Tensor>& relative_offset, const std::optional<Tensor>& relative_value,
                    int64_t num_heads, int64_t window, int64_t dilation, double scale) {
  LocalCall call;
  LocalProblem& p = call.p;
  p.query = map_of(query, "query");
  p.key = map_of(key, "key");
  p.value = map_of(value, "value");
  p.batch = query.size(0);
  p.height = query.size(2);
  p.width = query.size(3);
  STD_TORCH_CHECK(num_heads > 0 && query.size(1) > 0 && query.size(1) % num_heads == 0 && value.size(1) > 0 &&
                      value.size(1) % num_heads == 0,
                  "num_heads must divide the channels, and there must be some");
  for (const Tensor* x : {&key, &value})
    STD_TORCH_CHECK(x->size(0) == p.batch && x->size(2) == p.height && x->size(3) == p.width,
                    "key and value must have the batch and the map of query");
  STD_TORCH_CHECK(key.size(1) == query.size(1), "key must have the channels of query");
  STD_TORCH_CHECK(window > 0 && window % 2 == 1 && window < (1 << 12) && dilation > 0 && dilation < (1 << 30),
                  "window must be odd and positive and dilation positive");
  p.heads = int(num_heads);
  p.window = int(window);
  p.dilation = int(dilation);
  p.channels = int(query.size(1) / num_heads);
  p.value_channels = int(value.size(1) / num_heads);
  p.scale = float(scale);
  const int64_t n2 = window * window;
  if (relative_bias) {
    const Tensor& b = *relative_bias;
    STD_TORCH_CHECK(b.dim() == 5 && b.size(0) == p.batch && b.size(1) == num_heads && b.size(2) == n2 &&
                        b.size(3) == p.height && b.size(4) == p.width,
                    "relative_bias must be (B, h, window^2, H, W)");
    p.bias = {b.const_data_ptr(), dtype_of(b, "relative_bias"), b.stride(0), b.stride(2), b.stride(3),
              b.stride(4)};
    p.bias_head_stride = b.stride(1);
  }
  p.weight = floats_of(relative_weight, "relative_weight");
  p.weight_offset = floats_of(relative_offset, "relative_offset");
  p.relative_value = floats_of(relative_value, "relative_value");
  STD_TORCH_CHECK(!p.weight || relative_weight->numel() == num_heads * n2 * p.channels,
                  "relative_weight must be (h * window^2, C / h)");
  STD_TORCH_CHECK(!p.weight_offset || relative_offset->numel() == num_heads * n2,
                  "relative_offset must be (h * window^2,)");
  STD_TORCH_CHECK(!p.relative_value || relative_value->numel() == num_heads * n2 * p.value_channels,
                  "relative_value must be (h, Cv / h, window^2)");
  if (!call.empty()) call.k.local_layout(p, call.l);
  return call;
}

std::tuple<Tensor, Tensor> local_attention(Tensor query, Tensor key, Tensor value,
                                           std::optional<Tensor> relative_bias,
                                           std::optional<Tensor> relative_weight,
                                           std::optional<Tensor> relative_offset,
                                           std::optional<Tensor> relative_value, int64_t num_heads,
                                           int64_t window, int64_t dilation, double scale) {
  LocalCall call = make_call(query, key, value, relative_bias, relative_weight, relative_offset,
                             relative_value, num_heads, window, dilation, scale);
  const LocalProblem& p = call.p;
  const LocalLayout& l = call.l;
  const Tensor read = make(query, {p.batch, value.size(1), p.height, p.width}, ScalarType::Float);
  const Tensor lse = make(query, {p.batch, num_heads, p.height, p.width}, ScalarType::Float);
  if (call.empty()) return {read, lse};
  call.run_pack(false);
  parallel_for(0, l.planes * l.blocks * l.strips, 1, [&](int64_t begin, int64_t end) {
    call.k.local_forward(p, l, call.pack, begin, end, data_of<float>(read), data_of<float>(lse));
  });
  return {read, lse};
}

// Gradients of query, key, value, relative_bias, relative_weight, relative_offset and relative_value; empty
// where the operand is absent. Every segment adds to buffers of its own; their sums are added in order, so a
// run repeats bit for bit.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> local_attention_backward(
    Tensor grad_read, Tensor delta, Tensor lse, Tensor query, Tensor key, Tensor value,
    std::optional<Tensor> relative_bias, std::optional<Tensor> relative_weight,
    std::optional<Tensor> relative_offset, std::optional<Tensor> relative_value, int64_t num_heads,
    int64_t window, int64_t dilation, double scale) {
  LocalCall call = make_call(query, key, value, relative_bias, relative_weight, relative_offset,
                             relative_value, num_heads, window, dilation, scale);
  const LocalProblem& p = call.p;
  const LocalLayout& l = call.l;
  const int64_t heads = num_heads, n2 = window * window, h = p.height, w = p.width;
  LocalGradients g;
  floats_of(grad_read, "grad_read");
  g.read = map_of(grad_read, "grad_read");
  g.lse = floats_of(lse, "lse");
  g.delta = floats_of(delta, "delta");
  STD_TORCH_CHECK(lse.numel() == p.batch * heads * h * w && delta.numel() == lse.numel(),
                  "delta and lse must be those of this call");
  for (int64_t d = 0; d < 4; ++d)
    STD_TORCH_CHECK(grad_read.size(d) == value.size(d), "grad_read must have the shape of value");
  const Tensor grad_query = make(query, {p.batch, query.size(1), h, w}, ScalarType::Float);
  const Tensor grad_key = make(query, {p.batch, query.size(1), h, w}, ScalarType::Float);
  const Tensor grad_value = make(query, {p.batch, value.size(1), h, w}, ScalarType::Float);
  const Tensor grad_bias = relative_bias ? make(query, {p.batch, heads, n2, h, w}, ScalarType::Float)
                                         : make(query, {0}, ScalarType::Float);
  const auto table = [&](const std::optional<Tensor>& x, std::initializer_list<int64_t> shape) {
    const Tensor out = x ? make(query, shape, ScalarType::Float) : make(query, {0}, ScalarType::Float);
    std::fill_n(data_of<float>(out), out.numel(), 0.f);
    return out;
  };
  const Tensor grad_weight = table(relative_weight, {heads * n2, p.channels});
  const Tensor grad_offset = table(relative_offset, {heads * n2});
  const Tensor grad_relative = table(relative_value, {heads, p.value_channels, n2});
  if (!call.empty()) {
    g.query = data_of<float>(grad_query);
    g.bias = relative_bias ? data_of<float>(grad_bias) : nullptr;
    call.run_pack(true);
    // Segments of a plane overlap in window - 1 rows of keys: no more of them than the threads need.
    const int64_t threads = std::max<int64_t>(1, torch::stable::get_num_threads());
    const int64_t parts = std::clamp<int64_t>((threads + l.planes - 1) / l.planes, 1, l.blocks);
    std::vector<LocalSegment> segments(l.planes * parts);
    for (int64_t i = 0; i < l.planes * parts; ++i) {
      LocalSegment& s = segments[i];
      call.k.local_segment(p, l, i / parts, i % parts, parts, s);
      const int64_t area = (s.last_row - s.first_row) * l.columns;
      s.key_cells = call.own(area * l.key_chunks * l.key_width);
      s.value_cells = call.own(area * l.value_chunks * l.value_width);
      if (p.weight) s.weight_cells = call.own(l.table(l.key_chunks, l.key_width));
      if (p.weight_offset) s.weight_offset = call.own(l.table(1, 1));
      if (p.relative_value) s.relative_cells = call.own(l.table(l.value_chunks, l.value_width));
    }
    parallel_for(0, int64_t(segments.size()), 1, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) call.k.local_backward(p, l, call.pack, g, segments[i]);
    });
    parallel_for(0, l.planes * l.rows, 4, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i)
        call.k.local_collect(p, l, &segments[i / l.rows * parts], int(parts), i % l.rows,
                             data_of<float>(grad_key), data_of<float>(grad_value));
    });
    for (const LocalSegment& s : segments)
      call.k.local_add_tables(p, l, s, data_of<float>(grad_weight), data_of<float>(grad_offset),
                              data_of<float>(grad_relative));
  }
  return {grad_query, grad_key, grad_value, grad_bias, grad_weight, grad_offset, grad_relative};
}

}  // namespace
}  // namespace vosops

STABLE_TORCH_LIBRARY_IMPL(vosops, CPU, m) {
  m.impl("local_attention", TORCH_BOX(&vosops::local_attention));
  m.impl("local_attention_backward", TORCH_BOX(&vosops::local_attention_backward));
}
