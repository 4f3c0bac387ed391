// SPDX-License-Identifier: Apache-2.0
// Local attention and its gradient on CUDA: checks, packing, the cut of the work into blocks, launches.
#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "../common/cuda_tensors.h"
#include "cuda_launch.h"

namespace vosops::gpu::local {
namespace {

constexpr int64_t kScratchBytes =
    64 << 20;                        // for the weights of the planes that the backward pass takes at once
constexpr int64_t kReserved = 1024;  // bytes of shared memory that the driver keeps of every block
constexpr int64_t kSplitPositions = 512;  // of a table's gradient, at least

using OptionalTensor = std::optional<Tensor>;

Map map_of(const Tensor& x, const char* name) {
  const auto stride = [&](int d) { return x.size(d) == 1 ? 0 : x.stride(d); };  // torch lets it be anything
  return {x.const_data_ptr(), dtype_of(x, name), stride(0), stride(1), stride(2), stride(3)};
}

struct Call {
  const Tensor& like;
  Device device;
  const Kernels& kernels;
  Local p;
  Packs packs;
  PackTables tables;
  std::vector<Tensor> owned;

  Call(const Tensor& query, const Kernels& k) : like(query), device(query), kernels(k) {}

  cudaStream_t stream() const { return device.stream(); }
  int64_t planes() const { return int64_t(p.batch) * p.heads; }
  int64_t tiles() const { return ceil_div(p.height, kSide) * p.tiles_x; }
  bool empty() const { return p.batch * p.area() == 0; }

  template <class V>
  V* own(std::initializer_list<int64_t> shape, ScalarType type) {
    owned.push_back(make(like, shape, type));
    return data_of<V>(owned.back());
  }

  // Where the products can read it: in place, or packed by `pack`.
  Cells cells_of(const Tensor& x, const char* name) {
    const Map from = map_of(x, name);
    Cells out;
    out.channels = int(x.size(1)) / p.heads;
    const auto aligned = [](int64_t stride) { return stride % 8 == 0; };
    if (x.scalar_type() == like.scalar_type() && x.stride(1) == 1 && aligned(from.batch_stride) &&
        aligned(from.row_stride) && aligned(from.column_stride) &&
        reinterpret_cast<uintptr_t>(from.data) % 16 == 0) {
      out.data = static_cast<const uint16_t*>(from.data);
      out.batch_stride = from.batch_stride;
      out.row_stride = from.row_stride;
      out.column_stride = from.column_stride;
      return out;
    }
    Pack& pack = packs.maps[packs.count++];
    pack.from = from;
    pack.channels = int(x.size(1));
    pack.height = p.height;
    pack.width = p.width;
    pack.to = own<uint16_t>({x.size(0), x.size(2), x.size(3), x.size(1)}, like.scalar_type());
    packs.channels = std::max(packs.channels, pack.channels);
    out.data = pack.to;
    out.column_stride = pack.channels;
    out.row_stride = out.column_stride * p.width;
    out.batch_stride = out.row_stride * p.height;
    return out;
  }

  Table table_of(const OptionalTensor& x, const char* name, int channels, bool channels_first) {
    if (!x) return {};
    PackTable& pack = tables.tables[tables.count++];
    pack.from = floats_of(x, name);
    pack.offsets = p.offsets();
    pack.channels = channels;
    pack.channels_first = channels_first;
    pack.high = own<uint16_t>({x->numel()}, like.scalar_type());
    pack.low = own<uint16_t>({x->numel()}, like.scalar_type());
    pack.has_low = own<int32_t>({p.heads}, ScalarType::Int);
    return {pack.high, pack.low, pack.has_low, channels};
  }

  // Packs what cells_of and table_of found to need it.
  void pack() {
    packs.batch = p.batch;
    tables.heads = p.heads;
    if (packs.count) check(kernels.pack(packs, stream()), "local_attention, pack");
    if (tables.count) check(kernels.pack_tables(tables, stream()), "local_attention, pack_tables");
  }

  // The longest strips with which `bytes` of shared memory leave room for `blocks` of them, or else fit at
  // all.
  template <class Bytes>
  int64_t fit(int blocks, const Bytes& bytes) {
    const int64_t all = device.shared_memory(), wanted = (all + kReserved) / blocks - kReserved;
    p.strip_rows = p.widest_row() <= row_bytes(64) ? 8 : 4;
    while (p.strip_rows > 2 && bytes() > wanted) p.strip_rows /= 2;
    STD_TORCH_CHECK(bytes() <= all, "local_attention: heads of ", p.query.channels, " and ", p.value.channels,
                    " channels need ", bytes(), " bytes of shared memory, this GPU has ", all);
    return bytes();
  }
};

// Serves what the Python side lets through, and refuses the rest rather than reading foreign bytes.
Call call_of(const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& relative_bias,
             const OptionalTensor& relative_weight, const OptionalTensor& relative_offset,
             const OptionalTensor& relative_value, int64_t heads, int64_t window, int64_t dilation,
             double scale) {
  const ScalarType type = query.scalar_type();
  STD_TORCH_CHECK((type == ScalarType::Half || type == ScalarType::BFloat16) && key.scalar_type() == type &&
                      value.scalar_type() == type,
                  "the cuda backend serves float16 and bfloat16; query, key and value must have one dtype");
  STD_TORCH_CHECK(query.dim() == 4 && key.dim() == 4 && value.dim() == 4,
                  "query, key and value must have 4 dimensions");
  for (int64_t d = 0; d < 4; ++d)
    STD_TORCH_CHECK(key.size(d) == query.size(d) && (d == 1 || value.size(d) == query.size(d)),
                    "key must have the shape of query, and value its batch and map");
  STD_TORCH_CHECK(heads > 0 && query.size(1) % (8 * heads) == 0 && value.size(1) % (8 * heads) == 0 &&
                      query.size(1) > 0 && value.size(1) > 0 && query.size(1) / heads <= kMaxChannels &&
                      value.size(1) / heads <= kMaxValueChannels,
                  "the cuda backend serves heads of a multiple of 8 channels up to ", int(kMaxChannels),
                  " of query and ", int(kMaxValueChannels), " of value, got ", query.size(1), " and ",
                  value.size(1), " channels in ", heads, " heads");
  STD_TORCH_CHECK(window > 0 && window % 2 == 1 && window <= kMaxWindow && dilation == 1,
                  "the cuda backend serves odd windows up to ", int(kMaxWindow), " without dilation, got ",
                  window, " and dilation ", dilation);
  STD_TORCH_CHECK(query.size(0) * heads <= 65535 && query.size(2) < (1 << 24) && query.size(3) < (1 << 24) &&
                      query.size(0) * query.size(2) * query.size(3) < INT32_MAX,
                  "too many batch entries, heads or positions for the cuda backend");
  const int64_t offsets = window * window;
  const std::pair<const OptionalTensor*, const char*> optional[] = {{&relative_bias, "relative_bias"},
                                                                    {&relative_weight, "relative_weight"},
                                                                    {&relative_offset, "relative_offset"},
                                                                    {&relative_value, "relative_value"}};
  check_device(query, query, "query");
  check_device(key, query, "key");
  check_device(value, query, "value");
  for (const auto& [tensor, name] : optional)
    if (*tensor) check_device(**tensor, query, name);

  Call call(query, type == ScalarType::Half ? kernels_half() : kernels_bfloat16());
  Local& p = call.p;
  p.batch = int(query.size(0));
  p.heads = int(heads);
  p.height = int(query.size(2));
  p.width = int(query.size(3));
  p.window = int(window);
  p.tiles_x = int(ceil_div(p.width, kSide));
  p.scale = float(scale);
  const int channels = int(query.size(1) / heads), value_channels = int(value.size(1) / heads);
  STD_TORCH_CHECK(!relative_weight || relative_weight->numel() == heads * offsets * channels,
                  "relative_weight must be (h * window^2, C / h)");
  STD_TORCH_CHECK(!relative_offset || relative_offset->numel() == heads * offsets,
                  "relative_offset must be (h * window^2,)");
  STD_TORCH_CHECK(!relative_value || relative_value->numel() == heads * offsets * value_channels,
                  "relative_value must be (h, Cv / h, window^2)");
  if (relative_bias) {
    const Tensor& b = *relative_bias;
    STD_TORCH_CHECK(b.dim() == 5 && b.size(0) == p.batch && b.size(1) == heads && b.size(2) == offsets &&
                        b.size(3) == p.height && b.size(4) == p.width,
                    "relative_bias must be (B, h, window^2, H, W)");
    p.bias = {b.const_data_ptr(), dtype_of(b, "relative_bias"), b.stride(0), b.stride(2), b.stride(3),
              b.stride(4)};
    p.bias_head_stride = b.stride(1);
  }
  p.weight_offset = floats_of(relative_offset, "relative_offset");
  if (call.empty()) return call;
  p.query = call.cells_of(query, "query");
  p.key = call.cells_of(key, "key");
  p.value = call.cells_of(value, "value");
  p.weight = call.table_of(relative_weight, "relative_weight", channels, false);
  p.relative_value = call.table_of(relative_value, "relative_value", value_channels, true);
  return call;
}

std::tuple<Tensor, Tensor> local_attention(Tensor query, Tensor key, Tensor value,
                                           OptionalTensor relative_bias, OptionalTensor relative_weight,
                                           OptionalTensor relative_offset, OptionalTensor relative_value,
                                           int64_t num_heads, int64_t window, int64_t dilation,
                                           double scale) {
  Call call = call_of(query, key, value, relative_bias, relative_weight, relative_offset, relative_value,
                      num_heads, window, dilation, scale);
  Local& p = call.p;
  const Tensor read = make(query, {p.batch, value.size(1), p.height, p.width}, ScalarType::Float);
  const Tensor lse = make(query, {p.batch, num_heads, p.height, p.width}, ScalarType::Float);
  if (call.empty()) return {read, lse};
  call.pack();
  p.read = data_of<float>(read);
  p.lse = data_of<float>(lse);
  const int64_t shared = call.fit(2, [&] { return shared_bytes(p, 1); });
  // With too few tiles for all multiprocessors the value channels are split; each share scores again.
  const int64_t blocks = call.tiles() * call.planes(), chunks = ceil_div(p.value.channels, kChunk);
  const int64_t wanted =
      std::clamp<int64_t>(2 * call.device.multiprocessors() / std::max<int64_t>(blocks, 1), 1, chunks);
  p.chunks = int(ceil_div(chunks, wanted));
  const dim3 grid(unsigned(call.tiles()), unsigned(ceil_div(chunks, p.chunks)), unsigned(call.planes()));
  check(call.kernels.forward(p, grid, shared, call.stream()), "local_attention");
  return {read, lse};
}

// The gradient of one table, from the weights of groups of planes.
struct TableTask {
  TableGradient gradient;
  TableSum sum;
  int64_t shared = 0;
  dim3 grid;

  TableTask(Call& call, const uint16_t* weights, const Cells& cells, bool channels_first, const Tensor& out) {
    const Local& p = call.p;
    gradient.forward = p;
    gradient.weights = weights;
    gradient.cells = cells;
    const int64_t splits = std::clamp<int64_t>(p.area() / kSplitPositions, 1, 64);
    gradient.split_positions = int(ceil_div(ceil_div(p.area(), splits), kRows) * kRows);
    gradient.splits = int(ceil_div(p.area(), gradient.split_positions));
    gradient.parts =
        call.own<float>({call.planes(), gradient.splits, p.offsets(), cells.channels}, ScalarType::Float);
    shared = table_bytes(gradient);
    grid = dim3(unsigned(ceil_div(p.offsets(), kRows) * ceil_div(cells.channels, kChunk)),
                unsigned(gradient.splits), 1);
    sum = {gradient.parts,  data_of<float>(out), p.batch,        p.heads,
           gradient.splits, p.offsets(),         cells.channels, channels_first};
  }

  void run(const Call& call, int first_plane, int planes) {
    gradient.forward.first_plane = first_plane;
    grid.z = unsigned(planes);
    check(call.kernels.table(gradient, grid, shared, call.stream()), "local_attention_backward, table");
  }
};

// Gradients of query, key, value, relative_bias, relative_weight, relative_offset and relative_value; empty
// where the operand is absent.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> local_attention_backward(
    Tensor grad_read, Tensor delta, Tensor lse, Tensor query, Tensor key, Tensor value,
    OptionalTensor relative_bias, OptionalTensor relative_weight, OptionalTensor relative_offset,
    OptionalTensor relative_value, int64_t num_heads, int64_t window, int64_t dilation, double scale) {
  Call call = call_of(query, key, value, relative_bias, relative_weight, relative_offset, relative_value,
                      num_heads, window, dilation, scale);
  Local& p = call.p;
  LocalBackward b;
  floats_of(grad_read, "grad_read");
  b.lse = floats_of(lse, "lse");
  b.delta = floats_of(delta, "delta");
  check_device(grad_read, query, "grad_read");
  check_device(lse, query, "lse");
  check_device(delta, query, "delta");
  STD_TORCH_CHECK(lse.numel() == call.planes() * p.area() && delta.numel() == lse.numel(),
                  "delta and lse must be those of this call");
  STD_TORCH_CHECK(grad_read.dim() == 4, "grad_read must have the shape of value");
  for (int64_t d = 0; d < 4; ++d)
    STD_TORCH_CHECK(grad_read.size(d) == value.size(d), "grad_read must have the shape of value");
  const int64_t heads = num_heads, n2 = window * window, h = p.height, w = p.width;
  const auto zeros = [&](const OptionalTensor& x, std::initializer_list<int64_t> shape) {
    const Tensor out = x ? make(query, shape, ScalarType::Float) : make(query, {0}, ScalarType::Float);
    // Stays zero only without a position.
    if (call.empty() && out.numel())
      check(cudaMemsetAsync(data_of<float>(out), 0, out.numel() * sizeof(float), call.stream()),
            "local_attention_backward");
    return out;
  };
  const Tensor grad_query = make(query, {p.batch, query.size(1), h, w}, ScalarType::Float);
  const Tensor grad_key = make(query, {p.batch, query.size(1), h, w}, ScalarType::Float);
  const Tensor grad_value = make(query, {p.batch, value.size(1), h, w}, ScalarType::Float);
  const Tensor grad_bias = zeros(relative_bias, {p.batch, heads, n2, h, w});
  const Tensor grad_weight = zeros(relative_weight, {heads * n2, query.size(1) / heads});
  const Tensor grad_offset = zeros(relative_offset, {heads * n2});
  const Tensor grad_relative = zeros(relative_value, {heads, value.size(1) / heads, n2});
  const auto done = [&] {
    return std::tuple(grad_query, grad_key, grad_value, grad_bias, grad_weight, grad_offset, grad_relative);
  };
  if (call.empty()) return done();

  b.grad = call.cells_of(grad_read, "grad_read");
  call.pack();
  b.grad_query = data_of<float>(grad_query);
  b.grad_key = data_of<float>(grad_key);
  b.grad_value = data_of<float>(grad_value);
  b.grad_bias = relative_bias ? data_of<float>(grad_bias) : nullptr;
  const int64_t plane_weights = p.area() * p.padded_offsets();
  const int64_t group = std::clamp<int64_t>(kScratchBytes / (4 * plane_weights), 1, call.planes());
  b.weights = call.own<uint16_t>({group, plane_weights}, query.scalar_type());
  b.differences = call.own<uint16_t>({group, plane_weights}, query.scalar_type());
  const int64_t parts = call.tiles() * (kThreads / 32);
  if (relative_offset) b.offset_parts = call.own<float>({call.planes(), parts, n2}, ScalarType::Float);
  std::vector<TableTask> tables;
  if (relative_weight) tables.emplace_back(call, b.differences, p.query, false, grad_weight);
  if (relative_value) tables.emplace_back(call, b.weights, b.grad, true, grad_relative);

  const int64_t query_shared = call.fit(1, [&] { return shared_bytes(p, 2); });
  LocalBackward queries = b, spread = b;
  queries.forward = p;
  const int64_t spread_shared = call.fit(3, [&] { return spread_bytes(p); });
  spread.forward = p;
  for (int64_t plane = 0; plane < call.planes(); plane += group) {
    const int count = int(std::min(group, call.planes() - plane));
    queries.forward.first_plane = spread.forward.first_plane = int(plane);
    const dim3 grid(unsigned(call.tiles()), 1, unsigned(count));
    check(call.kernels.queries(queries, grid, query_shared, call.stream()), "local_attention_backward");
    const dim3 all(grid.x, unsigned(1 + ceil_div(p.value.channels, kChunk)), grid.z);
    check(call.kernels.spread(spread, all, spread_shared, call.stream()), "local_attention_backward, keys");
    for (TableTask& table : tables) table.run(call, int(plane), count);
  }
  for (const TableTask& table : tables)
    check(launch_sum(table.sum, call.stream()), "local_attention_backward, sum");
  if (relative_offset) {
    const TableSum sum = {
        b.offset_parts, data_of<float>(grad_offset), p.batch, p.heads, int(parts), int(n2), 1, false};
    check(launch_sum(sum, call.stream()), "local_attention_backward, sum");
  }
  return done();
}

}  // namespace
}  // namespace vosops::gpu::local

STABLE_TORCH_LIBRARY_IMPL(vosops, CUDA, m) {
  m.impl("local_attention", TORCH_BOX(&vosops::gpu::local::local_attention));
  m.impl("local_attention_backward", TORCH_BOX(&vosops::gpu::local::local_attention_backward));
}
