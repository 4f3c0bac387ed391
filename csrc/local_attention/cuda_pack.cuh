// SPDX-License-Identifier: Apache-2.0
// Operands as the products read them: maps with channels innermost, tables in 16-bit terms.
#pragma once
#include "cuda_problem.cuh"

namespace vosops::gpu::local {

constexpr int kPackThreads = 256;
constexpr int kPackMaps = 4, kPackTables = 2;  // of a launch, at most
constexpr int kPackTableThreads = 1024;
constexpr int kPackPositions = 32, kPackChannels = 64;  // of a block

struct Pack {
  Map from;
  uint16_t* to = nullptr;  // [batch][row][column][channel]
  int channels = 0, height = 0, width = 0;
};

// The maps of a launch have one size but for the channels.
struct Packs {
  Pack maps[kPackMaps];
  int count = 0, batch = 0, channels = 0;  // the most channels of a map

  // Blocks of positions of a batch entry.
  VOSOPS_ANYWHERE int blocks() const {
    return int((int64_t(maps[0].height) * maps[0].width + kPackPositions - 1) / kPackPositions);
  }
};

// A block: 32 positions of a batch entry (block_x), 64 channels (block_y), a map (block_z).

// tile: [kPackPositions][kPackChannels + 2]. Read along the inner of the strides, written along the channels.
template <class T>
VOSOPS_DEVICE void pack_block(const Packs& all, uint16_t* tile) {
  const Pack& p = all.maps[block_z()];
  const int64_t batch = block_x() / all.blocks();
  constexpr int kStride = kPackChannels + 2;
  const int64_t area = int64_t(p.height) * p.width,
                first = (block_x() - batch * all.blocks()) * kPackPositions;
  const int c0 = block_y() * kPackChannels;
  const bool channels_inner = p.from.channel_stride < p.from.column_stride;
  for (int unit = thread_index(); unit < kPackPositions * kPackChannels; unit += kPackThreads) {
    const int position = channels_inner ? unit / kPackChannels : unit % kPackPositions;
    const int c = channels_inner ? unit % kPackChannels : unit / kPackPositions;
    if (first + position >= area || c0 + c >= p.channels) continue;
    const int64_t y = (first + position) / p.width, x = first + position - y * p.width;
    const float value = element(p.from.data, p.from.dtype,
                                batch * p.from.batch_stride + (c0 + c) * p.from.channel_stride +
                                    y * p.from.row_stride + x * p.from.column_stride);
    tile[position * kStride + c] = uint16_t(T::pack(value, 0));
  }
  sync_block();
  for (int unit = thread_index(); unit < kPackPositions * kPackChannels; unit += kPackThreads) {
    const int position = unit / kPackChannels, c = unit % kPackChannels;
    if (first + position < area && c0 + c < p.channels)
      p.to[(batch * area + first + position) * p.channels + c0 + c] = tile[position * kStride + c];
  }
}

struct PackTable {
  const float* from = nullptr;  // [head][offset][channel] or [head][channel][offset]
  uint16_t *high = nullptr, *low = nullptr;
  int32_t* has_low = nullptr;  // [head]
  int offsets = 0, channels = 0;
  bool channels_first = false;
};

// Block block_x packs head block_x of table block_y.
struct PackTables {
  PackTable tables[kPackTables];
  int count = 0, heads = 0;
};

template <class T>
VOSOPS_DEVICE void pack_table_block(const PackTables& all) {
  const PackTable& p = all.tables[block_y()];
  const int64_t base = int64_t(block_x()) * p.offsets * p.channels;
  bool any_low = false;
#pragma unroll 4
  for (int entry = thread_index(); entry < p.offsets * p.channels; entry += kPackTableThreads) {
    const int offset = entry / p.channels, channel = entry - offset * p.channels;
    const float x = p.from[base + (p.channels_first ? channel * p.offsets + offset : entry)];
    const uint32_t high = T::pack(x, 0) & 0xffff;
    const float rest = x - T::unpack(high).first;
    const uint32_t low = rest - rest == 0 ? T::pack(rest, 0) & 0xffff : 0;
    p.high[base + entry] = uint16_t(high);
    p.low[base + entry] = uint16_t(low);
    any_low = any_low || (low & 0x7fff);
  }
  any_low = any_of_block(any_low);
  if (thread_index() == 0) p.has_low[block_x()] = any_low;
}

}  // namespace vosops::gpu::local
