// SPDX-License-Identifier: Apache-2.0
// The device code of local attention, run on the host block by block.
#include <algorithm>
#include <cmath>

#include "local_attention/cuda_backward.cuh"
#include "local_attention/cuda_pack.cuh"

namespace {

using namespace vosops::gpu;
using namespace vosops::gpu::local;

struct MapView {
  const void* data;
  int32_t dtype;
  int64_t stride[4];

  vosops::Map map() const {
    return {data, static_cast<vosops::DType>(dtype), stride[0], stride[1], stride[2], stride[3]};
  }
};

// What emulation.py passes: the kernels' own structures may change without it.
struct LocalCall {
  MapView query, key, value, bias, grad;
  int64_t bias_head_stride;
  const float *weight, *weight_offset, *relative_value;
  int32_t half, batch, heads, height, width, window, channels, value_channels;
  float scale;
  int32_t strip_rows, chunks, group, splits;
  float *read, *lse;
  const float* delta;
  float *grad_query, *grad_key, *grad_value, *grad_bias, *grad_weight, *grad_offset, *grad_relative;
};

int blocks_for(int64_t count, int64_t each) { return int((count + each - 1) / each); }

template <class T>
struct Run {
  const LocalCall& c;
  Emulator emulator;
  Local p;
  std::vector<std::unique_ptr<uint8_t[]>> owned;

  // NaN throughout, on 16 bytes.
  template <class V>
  V* own(int64_t count) {
    const int64_t bytes = count * int64_t(sizeof(V)) + 16;
    owned.push_back(std::make_unique<uint8_t[]>(bytes));
    std::memset(owned.back().get(), 0xff, bytes);
    return reinterpret_cast<V*>((reinterpret_cast<uintptr_t>(owned.back().get()) + 15) & ~uintptr_t(15));
  }

  template <class F>
  void grid(int threads, int x, int y, int z, int64_t shared, const F& f) {
    uint8_t* memory = own<uint8_t>(shared);
    for (int k = 0; k < z; ++k)
      for (int j = 0; j < y; ++j)
        for (int i = 0; i < x; ++i) {
          std::memset(memory, 0xff, shared);
          emulator.run(threads, i, j, k, [&] { f(memory); });
        }
    owned.pop_back();
  }

  Cells cells_of(const MapView& from, int channels) {
    Cells out;
    out.channels = channels;
    if (from.stride[1] == 1 && from.dtype != 0) {  // in place, where aligned
      out.data = static_cast<const uint16_t*>(from.data);
      out.batch_stride = from.stride[0], out.row_stride = from.stride[2], out.column_stride = from.stride[3];
      return out;
    }
    Packs packs;
    Pack& pack = packs.maps[0];
    pack.from = from.map();
    pack.channels = channels * c.heads, pack.height = c.height, pack.width = c.width;
    pack.to = own<uint16_t>(c.batch * p.area() * pack.channels);
    packs.maps[1] = pack;  // a launch packs several
    packs.maps[1].to = own<uint16_t>(c.batch * p.area() * pack.channels);
    packs.count = 2, packs.batch = c.batch, packs.channels = pack.channels;
    grid(kPackThreads, packs.blocks() * c.batch, blocks_for(packs.channels, kPackChannels), packs.count,
         kPackPositions * (kPackChannels + 2) * 2,
         [&](uint8_t* memory) { pack_block<T>(packs, reinterpret_cast<uint16_t*>(memory)); });
    pack = packs.maps[1];
    out.data = pack.to;
    out.column_stride = pack.channels;
    out.row_stride = out.column_stride * c.width;
    out.batch_stride = out.row_stride * c.height;
    return out;
  }

  Table table_of(const float* from, int channels, bool channels_first) {
    if (!from) return {};
    const int64_t count = int64_t(c.heads) * p.offsets() * channels;
    PackTables packs;
    PackTable& pack = packs.tables[1];
    pack.from = from;
    pack.high = own<uint16_t>(count), pack.low = own<uint16_t>(count), pack.has_low = own<int32_t>(c.heads);
    pack.offsets = p.offsets(), pack.channels = channels, pack.channels_first = channels_first;
    packs.tables[0] = pack;
    grid(kPackTableThreads, c.heads, 1, 1, 0, [&](uint8_t*) { pack_table_block<T>(packs); });
    return {pack.high, pack.low, pack.has_low, channels};
  }

  Run(const LocalCall& call, int seed) : c(call) {
    emulator.random.seed(seed);
    p.batch = c.batch, p.heads = c.heads, p.height = c.height, p.width = c.width, p.window = c.window;
    p.tiles_x = blocks_for(c.width, kSide), p.strip_rows = c.strip_rows, p.chunks = c.chunks;
    p.scale = c.scale;
    p.query = cells_of(c.query, c.channels);
    p.key = cells_of(c.key, c.channels);
    p.value = cells_of(c.value, c.value_channels);
    p.weight = table_of(c.weight, c.channels, false);
    p.relative_value = table_of(c.relative_value, c.value_channels, true);
    p.weight_offset = c.weight_offset;
    p.bias = c.bias.map();
    p.bias_head_stride = c.bias_head_stride;
    p.read = c.read, p.lse = c.lse;
  }

  int tiles() const { return blocks_for(c.height, kSide) * p.tiles_x; }
  int planes() const { return c.batch * c.heads; }

  void forward() {
    grid(kThreads, tiles(), blocks_for(c.value_channels, p.chunks * kChunk), planes(), shared_bytes(p, 1),
         [&](uint8_t* memory) { forward_block<T>(p, memory); });
  }

  void sum(const TableSum& s) {
    grid(kPackThreads, blocks_for(int64_t(s.heads) * s.offsets * s.channels, kPackThreads), 1, 1, 0,
         [&](uint8_t*) { sum_thread(s, int64_t(block_x()) * kPackThreads + thread_index()); });
  }

  void backward() {
    LocalBackward b;
    b.forward = p;
    b.grad = cells_of(c.grad, c.value_channels);
    b.lse = c.lse, b.delta = c.delta;
    const int64_t plane_weights = p.area() * p.padded_offsets();
    b.weights = own<uint16_t>(c.group * plane_weights);
    b.differences = own<uint16_t>(c.group * plane_weights);
    b.grad_query = c.grad_query, b.grad_key = c.grad_key, b.grad_value = c.grad_value;
    b.grad_bias = c.grad_bias;
    const int parts = tiles() * (kThreads / 32);
    if (c.weight_offset) b.offset_parts = own<float>(int64_t(planes()) * parts * p.offsets());
    std::vector<TableGradient> tables;
    const auto add_table = [&](const uint16_t* weights, const Cells& cells) {
      TableGradient table;
      table.forward = p;
      table.weights = weights;
      table.cells = cells;
      table.split_positions = round_up(blocks_for(p.area(), c.splits), kRows);
      table.splits = blocks_for(p.area(), table.split_positions);
      table.parts = own<float>(int64_t(planes()) * table.splits * p.offsets() * cells.channels);
      tables.push_back(table);
    };
    if (c.weight) add_table(b.differences, p.query);
    if (c.relative_value) add_table(b.weights, b.grad);
    for (int plane = 0; plane < planes(); plane += c.group) {
      const int count = std::min(c.group, planes() - plane);
      b.forward.first_plane = plane;
      grid(kThreads, tiles(), 1, count, shared_bytes(p, 2),
           [&](uint8_t* memory) { query_block<T>(b, memory); });
      grid(kThreads, tiles(), 1 + blocks_for(c.value_channels, kChunk), count, spread_bytes(p),
           [&](uint8_t* memory) { spread_block<T>(b, memory); });
      for (TableGradient& table : tables) {
        table.forward.first_plane = plane;
        grid(kThreads, blocks_for(p.offsets(), kRows) * blocks_for(table.cells.channels, kChunk),
             table.splits, count, table_bytes(table),
             [&](uint8_t* memory) { table_block<T>(table, memory); });
      }
    }
    for (const TableGradient& table : tables) {
      const bool first = table.weights == b.weights;
      sum({table.parts, first ? c.grad_relative : c.grad_weight, c.batch, c.heads, table.splits, p.offsets(),
           table.cells.channels, first});
    }
    if (c.weight_offset) sum({b.offset_parts, c.grad_offset, c.batch, c.heads, parts, p.offsets(), 1, false});
  }
};

}  // namespace

extern "C" {

int size_of_local() { return int(sizeof(LocalCall)); }

void emulate_local(const LocalCall* call, int backward, int seed) {
  const auto run = [&](auto type) {
    Run<decltype(type)> all(*call, seed);
    if (backward)
      all.backward();
    else
      all.forward();
  };
  if (call->half)
    run(Half());
  else
    run(BFloat16());
}
}
