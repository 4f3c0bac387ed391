// SPDX-License-Identifier: Apache-2.0
// The read of what was matched, sum_k w_k v_k, and its gradient.
#pragma once

#include "../common/buffer.h"
#include "../common/load.h"
#include "problem.h"

namespace vosops::VOSOPS_ISA {

constexpr int kQueryBlock = 16;                  // queries transposed together
constexpr int kSpan = kLanes == 4 ? 8 : kLanes;  // vectors of a row accumulated in registers

// One query's read of channels [0, channels) from rows that start at `where`; Width vectors at a time.
template <DType T, int Width>
inline int64_t read_span(const void* base, const int64_t* where, const float* weights, int kept, int64_t c,
                         int64_t channels, float* out) {
  for (; c + Width * kLanes <= channels; c += Width * kLanes) {
    Vec sum[Width] = {};
    for (int i = 0; i < kept; ++i)
      for (int v = 0; v < Width; ++v) sum[v] += weights[i] * load_as<T>(base, where[i] + c + v * kLanes);
    for (int v = 0; v < Width; ++v) store(out + c + v * kLanes, sum[v]);
  }
  return c;
}

inline int kept_of(const int64_t* indices, int k) {
  int kept = 0;
  while (kept < k && indices[kept] >= 0) ++kept;
  return kept;
}

inline void gather_rows(const Values& values, int64_t batch, const int64_t* indices, const float* weights,
                        int k, int64_t queries, int64_t q0, int64_t q1, float* read) {
  const int64_t channels = values.channels;
  Buffer<float> rows(kQueryBlock * channels);
  Buffer<int64_t> where(int64_t(kQueryBlock) * k);
  int kept[kQueryBlock];
  for (int64_t q = q0; q < q1; q += kQueryBlock) {
    const int count = int(least<int64_t>(kQueryBlock, q1 - q));
    for (int i = 0; i < count; ++i) {
      const int64_t* row = indices + (batch * queries + q + i) * k;
      kept[i] = kept_of(row, k);
      for (int j = 0; j < kept[i]; ++j) where[i * k + j] = offset(values.value.positions, row[j]);
    }
    for (int64_t o = 0; o < values.objects; ++o) {
      const void* base = base_of(values.value, batch, o);
      with_loader(values.value.dtype, [&](auto loader) {
        constexpr DType kType = decltype(loader)::kType;
        for (int i = 0; i < count; ++i) {
          const float* w = weights + (batch * queries + q + i) * k;
          const int64_t* at = &where[i * k];
          float* out = &rows[i * channels];
          int64_t c = read_span<kType, kSpan>(base, at, w, kept[i], 0, channels, out);
          c = read_span<kType, 1>(base, at, w, kept[i], c, channels, out);
          for (; c < channels; ++c) {
            float sum = 0;
            for (int j = 0; j < kept[i]; ++j) sum += w[j] * loader.at(base, at[j] + c);
            out[c] = sum;
          }
        }
      });
      transpose(rows.data(), channels, count, int(channels),
                read + ((batch * values.objects + o) * channels) * queries + q, queries);
    }
  }
}

// Positions x channels [c0, c1) of the flattened (object, channel) as [M][kChannelBlock].
inline void load_channel_block(const Values& values, int64_t batch, int64_t memory, int64_t c0, int64_t c1,
                               float* out) {
  if (c1 - c0 < kChannelBlock) fill(out, memory * kChannelBlock, 0.f);
  constexpr int kRun = 64;
  int64_t where[kRun];
  for (int64_t c = c0; c < c1;) {  // a block may span objects
    const int64_t object = c / values.channels, channel = c % values.channels;
    const int64_t count = least(c1 - c, values.channels - channel);
    const void* base = base_of(values.value, batch, object);
    for (int64_t m = 0; m < memory; m += kRun) {
      const int run = int(least<int64_t>(kRun, memory - m));
      const bool consecutive = offsets_of(values.value.positions, m, run, where);
      for (int i = 0; i < run; ++i) where[i] += channel * values.value.channel_stride;
      load_position_major(values.value, base, int(count), where, run, consecutive,
                          out + m * kChannelBlock + (c - c0), kChannelBlock);
    }
    c += count;
  }
}

inline void gather_channels(const Values& values, int64_t batch, int64_t memory, const int64_t* indices,
                            const float* weights, int k, int64_t queries, int64_t c0, int64_t c1,
                            float* read) {
  constexpr int kBlockVecs = kChannelBlock / kLanes;
  Buffer<float> block(memory * kChannelBlock);
  float rows[kQueryBlock * kChannelBlock];
  for (int64_t c = c0; c < c1; c += kChannelBlock) {
    const int channels = int(least<int64_t>(kChannelBlock, c1 - c));
    load_channel_block(values, batch, memory, c, c + channels, block.data());
    for (int64_t q = 0; q < queries; q += kQueryBlock) {
      const int count = int(least<int64_t>(kQueryBlock, queries - q));
      for (int i = 0; i < count; ++i) {
        const int64_t* at = indices + (batch * queries + q + i) * k;
        const float* w = weights + (batch * queries + q + i) * k;
        Vec sum[kBlockVecs] = {};
        for (int j = 0; j < k && at[j] >= 0; ++j)
          for (int v = 0; v < kBlockVecs; ++v)
            sum[v] += w[j] * load(&block[at[j] * kChannelBlock + v * kLanes]);
        for (int v = 0; v < kBlockVecs; ++v) store(rows + i * kChannelBlock + v * kLanes, sum[v]);
      }
      transpose(rows, kChannelBlock, count, channels,
                read + (batch * values.objects * values.channels + c) * queries + q, queries);
    }
  }
}

inline void gather_backward(const Values& values, int64_t batch, int64_t memory, const int64_t* indices,
                            const float* weights, int k, int64_t queries, int64_t c0, int64_t c1,
                            const float* grad_read, float* grad_weights, float* grad_value) {
  constexpr int kBlockVecs = kChannelBlock / kLanes;
  Buffer<float> block(memory * kChannelBlock), grad(grad_value ? memory * kChannelBlock : 0);
  Buffer<float> rows(queries * kChannelBlock);
  for (int64_t c = c0; c < c1; c += kChannelBlock) {
    const int channels = int(least<int64_t>(kChannelBlock, c1 - c));
    const int64_t channel = batch * values.objects * values.channels + c;
    load_channel_block(values, batch, memory, c, c + channels, block.data());
    if (channels < kChannelBlock) rows.fill(0);
    transpose(grad_read + channel * queries, queries, channels, int(queries), rows.data(), kChannelBlock);
    grad.fill(0);
    for (int64_t q = 0; q < queries; ++q) {
      const int64_t* at = indices + (batch * queries + q) * k;
      const float* w = weights + (batch * queries + q) * k;
      float* grad_w = grad_weights + q * k;
      Vec g[kBlockVecs];
      for (int v = 0; v < kBlockVecs; ++v) g[v] = load(&rows[q * kChannelBlock + v * kLanes]);
      for (int j = 0; j < k && at[j] >= 0; ++j) {
        const float* row = &block[at[j] * kChannelBlock];
        Vec sum = {};
        for (int v = 0; v < kBlockVecs; ++v) sum += g[v] * load(row + v * kLanes);
        grad_w[j] += reduce_add(sum);
        if (!grad_value) continue;
        float* to = &grad[at[j] * kChannelBlock];
        for (int v = 0; v < kBlockVecs; ++v) store(to + v * kLanes, load(to + v * kLanes) + w[j] * g[v]);
      }
    }
    if (grad_value)
      transpose(grad.data(), kChannelBlock, int(memory), channels, grad_value + channel * memory, memory);
  }
}

}  // namespace vosops::VOSOPS_ISA
