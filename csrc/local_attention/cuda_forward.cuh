// SPDX-License-Identifier: Apache-2.0
// Local attention of a tile of queries: scores of the window around each, softmax, read.
#pragma once
#include "cuda_tile.cuh"

namespace vosops::gpu::local {

// Neighbouring lanes take neighbouring positions, which is how biases lie.
VOSOPS_DEVICE void add_bias(const Local& p, const Tile& t, float* scores) {
  if (!p.bias.data) return;
  const int row = warp() * 16 + lane() % 16;
  const int64_t base = t.batch * p.bias.batch_stride + t.head * p.bias_head_stride +
                       (t.y + row / kSide) * p.bias.row_stride + (t.x + row % kSide) * p.bias.column_stride;
  for (int offset = lane() / 16; offset < p.offsets(); offset += 2) {
    const int dy = offset / p.window;
    if (t.inside(p, row) && t.meets(p, row, dy, offset - dy * p.window))
      scores[row * p.score_stride() + offset] +=
          element(p.bias.data, p.bias.dtype, base + offset * p.bias.channel_stride);
  }
  sync_warp();
}

// The offsets i * 32 + lane of a window, their places in it and their terms; past the last one dy is off any
// map.
struct LaneOffsets {
  int dy[kLaneOffsets], dx[kLaneOffsets];
  float term[kLaneOffsets];

  VOSOPS_DEVICE LaneOffsets(const Local& p, const Tile& t) {
    const Divider by_window(p.window);
#pragma unroll
    for (int i = 0; i < kLaneOffsets; ++i) {
      const int offset = i * 32 + lane();
      const bool there = offset < p.offsets();
      dy[i] = there ? by_window(offset) : -kSide - p.window - p.height;
      dx[i] = there ? offset - dy[i] * p.window : 0;
      term[i] = there && p.weight_offset ? p.weight_offset[t.head * p.offsets() + offset] : 0;
    }
  }
};

template <class T>
VOSOPS_DEVICE uint16_t narrow(float x) {
  return uint16_t(T::pack(x, 0));
}

// This warp's scores become 16-bit weights exp(score - largest) in their place, 0 up to padded_offsets;
// shared.inverse gets 1 / the rows' sums, 0 without any match.
template <class T>
VOSOPS_DEVICE void soften(const Local& p, const Tile& t, const Shared& shared, bool write_lse) {
  const LaneOffsets of(p, t);
#pragma unroll 1
  for (int row = warp() * 16; row < warp() * 16 + 16; ++row) {
    float* scores = shared.scores + row * p.score_stride();
    float x[kLaneOffsets], best = -infinity(), sum = 0;
#pragma unroll
    for (int i = 0; i < kLaneOffsets; ++i) {
      x[i] = t.meets(p, row, of.dy[i], of.dx[i]) ? scores[i * 32 + lane()] + of.term[i] : -infinity();
      best = largest(best, x[i]);
    }
    for (int mask = 16; mask; mask /= 2) best = largest(best, shuffle_xor(best, mask));
    const float shift = best == -infinity() ? 0 : best;
    sync_warp();
#pragma unroll
    for (int i = 0; i < kLaneOffsets; ++i) {
      const float weight = expf(x[i] - shift);
      const int offset = i * 32 + lane();
      sum += weight;
      if (offset < p.padded_offsets()) reinterpret_cast<uint16_t*>(scores)[offset] = narrow<T>(weight);
    }
    for (int mask = 16; mask; mask /= 2) sum += shuffle_xor(sum, mask);
    if (lane() == 0) {
      shared.inverse[row] = sum == 0 ? 0 : 1 / sum;
      if (write_lse && t.inside(p, row))
        p.lse[t.plane * p.area() + t.position(p, row)] = sum == 0 ? infinity() : shift + logf(sum);
    }
  }
  sync_warp();
}

// A block: a tile (block_x), a share of the value channels (block_y), one head (block_z).
template <class T>
VOSOPS_DEVICE void forward_block(const Local& p, uint8_t* memory) {
  const Tile t(p);
  const Shared shared(memory, p, 1);
  add_scores<T>(p, t, shared, p.query, p.key, p.weight, 0, p.query.channels, p.scale, shared.scores);
  add_bias(p, t, shared.scores);
  soften<T>(p, t, shared, block_y() == 0);
  const int first = block_y() * p.chunks * kChunk, end = first + p.chunks * kChunk;
#pragma unroll 1
  for (int c0 = first; c0 < end && c0 < p.value.channels; c0 += kChunk) {
    const int channels = p.value.channels - c0 < kChunk ? p.value.channels - c0 : kChunk;
    float* to = p.read + (int64_t(t.plane) * p.value.channels + c0) * p.area();
    read_cells<T>(p, t, shared.strips, reinterpret_cast<const uint16_t*>(shared.scores), p.weight_stride(),
                  p.value, p.relative_value, c0, channels, 1, shared.inverse, to);
  }
}

}  // namespace vosops::gpu::local
