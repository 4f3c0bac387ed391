// SPDX-License-Identifier: Apache-2.0
// Gradients of the read, without atomics and so the same in every run. grad_w is a dot product of rows;
// grad_v is a gather too, over the entries that chose a position, which a stable sort by position has brought
// together.
#pragma once
#include "cuda_gather.cuh"

namespace vosops::gpu {

struct GatherBackward {
  Gather forward;
  const float* grad = nullptr;       // [B, O Cv, Q]
  float* grad_rows = nullptr;        // [B, Q, O Cv]
  float* grad_weights = nullptr;     // [B, Q, k]
  int32_t* keys = nullptr;           // [B, Q k] position, or M for an entry that reads nothing
  const int32_t* sorted = nullptr;   // [B, Q k] keys in order
  const int64_t* entries = nullptr;  // [B, Q k] where they came from
  int32_t* starts = nullptr;         // [B, M + 1] first entry of a position in `sorted`
  float* grad_value = nullptr;       // [B, O Cv, M]
};

constexpr int kTurn = 32;  // a tile of the transpose

// grad [C][Q] -> grad_rows [Q][C]: 32 x 32 tiles, queries block_x, channels block_y.
VOSOPS_DEVICE void turn_block(const GatherBackward& p, float* tile) {
  const int64_t channels = int64_t(p.forward.objects) * p.forward.channels, queries = p.forward.queries;
  const int64_t q0 = int64_t(block_x()) * kTurn, c0 = int64_t(block_y()) * kTurn, batch = block_z();
  for (int r = warp(); r < kTurn; r += kGatherThreads / 32)
    if (c0 + r < channels && q0 + lane() < queries)
      tile[r * (kTurn + 1) + lane()] = p.grad[(batch * channels + c0 + r) * queries + q0 + lane()];
  sync_block();
  for (int r = warp(); r < kTurn; r += kGatherThreads / 32)
    if (q0 + r < queries && c0 + lane() < channels)
      p.grad_rows[(batch * queries + q0 + r) * channels + c0 + lane()] = tile[lane() * (kTurn + 1) + r];
}

// A warp per query (block_x), over all objects and channels; Runs: eight channels at a time.
template <class T, bool Runs>
VOSOPS_DEVICE void grad_weights_warp(const GatherBackward& p) {
  const Gather& f = p.forward;
  const int query = block_x() * (kGatherThreads / 32) + warp(), batch = block_z();
  if (query >= f.queries) return;
  const int64_t row = int64_t(batch) * f.queries + query;
  const float* grad = p.grad_rows + row * f.objects * f.channels;
  for (int j = 0; j < f.k; ++j) {
    const int64_t index = f.indices[row * f.k + j];
    float sum = index >= f.memory ? not_a_number() : 0;
    if (index >= 0 && index < f.memory) {
      const int64_t offset = batch * f.value.batch_stride + offset_of(f.value.positions, int(index));
      for (int object = 0; object < f.objects; ++object) {
        const int64_t base = offset + object * f.value.object_stride;
        const float* g = grad + int64_t(object) * f.channels;
        if constexpr (Runs) {
          for (int c = lane() * kGatherLane; c < f.channels; c += kGatherChannels) {
            const Eight v = load_eight<T>(f.value.data, base + c), w = load_eight<float>(g, c);
#pragma unroll
            for (int i = 0; i < kGatherLane; ++i) sum += v.x[i] * w.x[i];
          }
        } else {
          for (int c = lane(); c < f.channels; c += 32)
            sum += g[c] * element(f.value.data, f.value.dtype, base + c * f.value.channel_stride);
        }
      }
    }
    for (int mask = 16; mask; mask /= 2) sum += shuffle_xor(sum, mask);
    if (lane() == 0) p.grad_weights[row * f.k + j] = sum;
  }
}

// One thread per entry.
VOSOPS_DEVICE void keys_thread(const GatherBackward& p, int64_t at) {
  if (at >= int64_t(p.forward.batch) * p.forward.queries * p.forward.k) return;
  const int64_t index = p.forward.indices[at];
  p.keys[at] = index < 0 || index >= p.forward.memory ? p.forward.memory : int32_t(index);
}

// One thread per position: the first entry of `sorted` that is not below it.
VOSOPS_DEVICE void starts_thread(const GatherBackward& p, int64_t at) {
  const int64_t memory = p.forward.memory, each = int64_t(p.forward.queries) * p.forward.k;
  if (at >= p.forward.batch * (memory + 1)) return;
  const int64_t batch = at / (memory + 1), position = at % (memory + 1);
  const int32_t* sorted = p.sorted + batch * each;
  int64_t low = 0, high = each;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (sorted[middle] < position)
      low = middle + 1;
    else
      high = middle;
  }
  p.starts[at] = int32_t(low);
}

// A block: 16 positions (block_x) and 256 of the O Cv channels (block_y), a warp per position. Aligned: rows
// of `grad_rows` begin on 16 bytes.
template <bool Aligned>
VOSOPS_DEVICE void grad_value_block(const GatherBackward& p, float* sums) {
  const Gather& f = p.forward;
  const int all = f.objects * f.channels, c0 = block_y() * kGatherChannels, batch = block_z();
  const int first = block_x() * kGatherRows, channel = c0 + lane() * kGatherLane;
  const int64_t each = int64_t(f.queries) * f.k;
  for (int row = warp(); row < kGatherRows && first + row < f.memory; row += kGatherThreads / 32) {
    const int32_t* starts = p.starts + int64_t(batch) * (f.memory + 1) + first + row;
    Eight sum = {};
    const int end = starts[1];
#pragma unroll(Aligned ? 4 : 1)
    for (int at = starts[0]; at < end; ++at) {
      const int64_t entry = p.entries[batch * each + at];
      const float weight = f.weights[batch * each + entry];
      const float* grad = p.grad_rows + (int64_t(batch) * f.queries + entry / f.k) * all;
      if constexpr (Aligned) {
        if (channel >= all) continue;
        const Eight g = load_eight<float>(grad, channel);
#pragma unroll
        for (int i = 0; i < kGatherLane; ++i) sum.x[i] += weight * g.x[i];
      } else {
#pragma unroll
        for (int i = 0; i < kGatherLane; ++i)
          if (channel + i < all) sum.x[i] += weight * grad[channel + i];
      }
    }
    store_eight(sums, row, sum);
  }
  const int channels = all - c0 < kGatherChannels ? all - c0 : kGatherChannels;
  const int rows = f.memory - first < kGatherRows ? f.memory - first : kGatherRows;
  store_transposed(sums, channels, rows, p.grad_value + (int64_t(batch) * all + c0) * f.memory + first,
                   f.memory);
}

}  // namespace vosops::gpu
