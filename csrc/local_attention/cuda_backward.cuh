// SPDX-License-Identifier: Apache-2.0
// The gradients of local attention. One pass over the tiles of queries computes the weights again, stores
// them and the gradients of the scores in 16 bits, and finishes the queries. Keys, values and tables are then
// sums that a single block makes, or parts that are added in order: a run repeats bit for bit.
#pragma once
#include "cuda_forward.cuh"

namespace vosops::gpu::local {

// The scores in buffer 0 become weights, the gradients of the weights in buffer 1 those of the scores; both
// in 16 bits in their place and in global memory.
template <class T>
VOSOPS_DEVICE void differentiate(const LocalBackward& b, const Tile& t, const Shared& shared) {
  const Local& p = b.forward;
  const LaneOffsets of(p, t);
  float parts[kLaneOffsets] = {};
#pragma unroll 1
  for (int row = warp() * 16; row < warp() * 16 + 16; ++row) {
    float* scores = shared.scores + row * p.score_stride();
    float* grads = scores + kRows * p.score_stride();
    const bool inside = t.inside(p, row);
    const int64_t position = inside ? t.position(p, row) : 0, at = t.plane * p.area() + position;
    const float lse = inside ? b.lse[at] : 0, delta = inside ? b.delta[at] : 0;
    const int64_t to = (block_z() * p.area() + position) * p.padded_offsets();
    float weight[kLaneOffsets], grad[kLaneOffsets];
#pragma unroll
    for (int i = 0; i < kLaneOffsets; ++i) {
      const int offset = i * 32 + lane();
      weight[i] = grad[i] = 0;
      if (inside && t.meets(p, row, of.dy[i], of.dx[i])) {
        weight[i] = expf(scores[offset] + of.term[i] - lse);
        grad[i] = weight[i] * (grads[offset] - delta);
      }
      parts[i] += grad[i];
      if (b.grad_bias && inside && offset < p.offsets())
        b.grad_bias[(int64_t(t.plane) * p.offsets() + offset) * p.area() + position] = grad[i];
    }
    sync_warp();
#pragma unroll
    for (int i = 0; i < kLaneOffsets; ++i) {
      const int offset = i * 32 + lane();
      if (offset >= p.padded_offsets()) break;
      const uint16_t w = narrow<T>(weight[i]), g = narrow<T>(grad[i]);
      reinterpret_cast<uint16_t*>(scores)[offset] = w;
      reinterpret_cast<uint16_t*>(grads)[offset] = g;
      if (inside) {
        b.weights[to + offset] = w;
        b.differences[to + offset] = g;
      }
    }
  }
  sync_warp();
  if (!b.offset_parts) return;
  const int64_t tiles = int64_t((p.height + kSide - 1) / kSide) * p.tiles_x;
  float* to = b.offset_parts + ((t.plane * tiles + block_x()) * (kThreads / 32) + warp()) * p.offsets();
#pragma unroll
  for (int i = 0; i < kLaneOffsets; ++i)
    if (i * 32 + lane() < p.offsets()) to[i * 32 + lane()] = parts[i];
}

// A block: a tile of queries (block_x) of one head (block_z).
template <class T>
VOSOPS_DEVICE void query_block(const LocalBackward& b, uint8_t* memory) {
  const Local& p = b.forward;
  const Tile t(p);
  const Shared shared(memory, p, 2);
  float* grads = shared.scores + kRows * p.score_stride();
  add_scores<T>(p, t, shared, p.query, p.key, p.weight, 0, p.query.channels, p.scale, shared.scores);
  add_bias(p, t, shared.scores);
#pragma unroll 1
  for (int c0 = 0; c0 < p.value.channels; c0 += kChunk) {
    const int channels = p.value.channels - c0 < kChunk ? p.value.channels - c0 : kChunk;
    add_scores<T>(p, t, shared, b.grad, p.value, p.relative_value, c0, channels, 1, grads);
  }
  differentiate<T>(b, t, shared);
  float* to = b.grad_query + int64_t(t.plane) * p.query.channels * p.area();
  read_cells<T>(p, t, shared.strips, reinterpret_cast<const uint16_t*>(grads), p.weight_stride(), p.key,
                p.weight, 0, p.query.channels, p.scale, nullptr, to);
}

// The weights with which the positions around meet the tile, as if each of the tile had a window over them:
// offset D of the tile's position is -D of the position there, counted from the other end of its window.
VOSOPS_DEVICE void load_mirrored(const Local& p, const Tile& t, const uint16_t* weights, uint16_t* to) {
  const Divider by_halo(p.halo());
#pragma unroll 4
  for (int unit = thread_index(); unit < p.halo() * p.halo() * kRows; unit += kThreads) {
    const int row = unit % kRows, hy = by_halo(unit / kRows), hx = unit / kRows - hy * p.halo();
    const int dy = hy - row / kSide, dx = hx - row % kSide;
    if (uint32_t(dy) >= uint32_t(p.window) || uint32_t(dx) >= uint32_t(p.window)) continue;
    const int y = t.y + hy - p.reach(), x = t.x + hx - p.reach(), offset = dy * p.window + dx;
    uint16_t weight = 0;
    if (uint32_t(y) < uint32_t(p.height) && uint32_t(x) < uint32_t(p.width))
      weight = weights[(block_z() * p.area() + int64_t(y) * p.width + x) * p.padded_offsets() + p.offsets() -
                       1 - offset];
    to[row * p.weight_stride() + offset] = weight;
  }
  sync_block();
}

// A block: a tile of keys (block_x) of one head (block_z); block_y is 0 for the keys' gradient, then come the
// values' in chunks of channels.
template <class T>
VOSOPS_DEVICE void spread_block(const LocalBackward& b, uint8_t* memory) {
  const Local& p = b.forward;
  const Tile t(p);
  uint16_t* weights = reinterpret_cast<uint16_t*>(memory);
  uint8_t* strips = memory + kRows * p.weight_stride() * 2;
  const bool keys = block_y() == 0;
  const Cells& cells = keys ? p.query : b.grad;
  const int c0 = keys ? 0 : (block_y() - 1) * kChunk;
  const int channels = cells.channels - c0 < kChunk ? cells.channels - c0 : kChunk;
  load_mirrored(p, t, keys ? b.differences : b.weights, weights);
  float* to = (keys ? b.grad_key : b.grad_value) + (int64_t(t.plane) * cells.channels + c0) * p.area();
  read_cells<T>(p, t, strips, weights, p.weight_stride(), cells, Table(), c0, channels, keys ? p.scale : 1,
                nullptr, to);
}

// A block: 64 offsets and a chunk of channels (block_x), a share of the positions (block_y), a plane
// (block_z).
template <class T>
VOSOPS_DEVICE void table_block(const TableGradient& b, uint8_t* memory) {
  const Local& p = b.forward;
  const Tile t(p);  // for the plane
  const int blocks = (p.offsets() + kRows - 1) / kRows, c0 = block_x() / blocks * kChunk;
  const int o0 = block_x() % blocks * kRows, l = lane();
  const int channels = b.cells.channels - c0 < kChunk ? b.cells.channels - c0 : kChunk;
  const int64_t begin = int64_t(block_y()) * b.split_positions;
  const int64_t left = p.area() - begin;
  const int count = int(left < b.split_positions ? left : b.split_positions);
  const int offset_row = row_bytes(kRows), offset_bytes = kRows * offset_row;
  const uint16_t* weights = b.weights + (block_z() * p.area() + begin) * p.padded_offsets() + o0;
  const uint16_t* cells = head_of(b.cells, t) + c0;
  const int offsets = p.padded_offsets() - o0 < kRows ? p.padded_offsets() - o0 : kRows;
  float sum[kChunk / 8][4] = {};
  for_strips((count + kRows - 1) / kRows, memory, offset_bytes + kRows * row_bytes(channels),
             [&](int strip, uint8_t* to) {
               const int first = strip * kRows;
               // Offsets past the last of the padded ones have no place to come from.
               const Divider by_chunks(kRows / 8);
               for (int unit = thread_index(); unit < kRows * kRows / 8; unit += kThreads) {
                 const int position = by_chunks(unit), chunk = unit - position * (kRows / 8);
                 const bool there = first + position < count && chunk * 8 < offsets;
                 const int64_t at = int64_t(first + position) * p.padded_offsets() + chunk * 8;
                 start_copy(to + position * offset_row + chunk * 16, there ? weights + at : b.weights, there);
               }
               load_positions(kRows, channels, b.cells.data, to + offset_bytes, [&](int position) {
                 const int64_t at = begin + first + position, y = at / p.width;
                 return first + position < count
                            ? cells + y * b.cells.row_stride + (at - y * p.width) * b.cells.column_stride
                            : nullptr;
               });
             },
             [&](int, uint8_t* from) {
               // Offsets are the rows of the product here: the weights, stored by position, go in transposed.
               const uint8_t* a_at = from + (l % 8 + l / 16 * 8) * offset_row + (warp() * 2 + l / 8 % 2) * 16;
               read_strip<T>(sum, from + offset_bytes, channels, 0, kRows, [&](uint32_t (&a)[4], int at) {
                 load_matrices_transposed(a, a_at + at * offset_row);
               });
             });
  float* to = b.parts + (int64_t(t.plane) * b.splits + block_y()) * p.offsets() * b.cells.channels + c0;
#pragma unroll
  for (int i = 0; i < kChunk / 8; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int offset = o0 + warp() * 16 + l / 4 + j / 2 * 8, c = i * 8 + l % 4 * 2 + j % 2;
      if (offset < p.offsets() && c < channels) to[int64_t(offset) * b.cells.channels + c] = sum[i][j];
    }
}

// One element of a table's gradient.
VOSOPS_DEVICE void sum_thread(const TableSum& p, int64_t element) {
  const int64_t of_head = int64_t(p.offsets) * p.channels;
  if (element >= p.heads * of_head) return;
  const int64_t head = element / of_head, entry = element - head * of_head;
  float sum = 0;
  for (int64_t batch = 0; batch < p.batch; ++batch)
#pragma unroll 8
    for (int64_t part = 0; part < p.count; ++part)
      sum += p.parts[((batch * p.heads + head) * p.count + part) * of_head + entry];
  const int64_t offset = entry / p.channels, channel = entry - offset * p.channels;
  p.out[p.channels_first ? head * of_head + channel * p.offsets + offset : element] = sum;
}

}  // namespace vosops::gpu::local
