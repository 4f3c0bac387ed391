// SPDX-License-Identifier: Apache-2.0
// Keys from any strides into shared memory: the queries of a block once, the memory tile by tile.
#pragma once
#include "cuda_problem.cuh"

namespace vosops::gpu {

VOSOPS_DEVICE uint32_t word(const uint4& v, int i) {
  return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}

// hi + lo = x^2 of two elements, rounded once, in lo. Exact for bfloat16, and for float16 within its range.
template <class T>
VOSOPS_DEVICE void split_squares(uint32_t w, uint32_t& hi, uint32_t& lo) {
  const Pair x = T::unpack(w);
  const float a = x.first * x.first, b = x.second * x.second;
  hi = T::pack(a, b);
  const Pair h = T::unpack(hi);
  lo = T::pack(a - h.first, b - h.second);
}

VOSOPS_DEVICE bool has_infinite_half(uint32_t w) {
  return (w & 0x7c00u) == 0x7c00u || (w & 0x7c000000u) == 0x7c000000u;
}

// Thread t packs row t % 64 and every second chunk of 8 channels.
template <class T, bool Selection>
VOSOPS_DEVICE void pack_queries(const Match& p, const Shared& shared, int batch, int first) {
  const int row = thread_index() % kRows, blocks = blocks_of(p.channels);
  const bool inside = first + row < p.queries;
  const int at = inside ? first + row : 0;
  const auto* q = static_cast<const uint16_t*>(p.query.data) + batch * p.query.batch_stride +
                  offset_of(p.query.positions, at);
  const uint16_t* e = nullptr;
  if constexpr (Selection)
    e = static_cast<const uint16_t*>(p.selection.data) + batch * p.selection.batch_stride +
        offset_of(p.selection.positions, at);
  float constant = 0;
  // Two channels, the first in the low half. Without a branch, so that many loads are in flight.
  const auto load = [&](const uint16_t* from, int64_t stride, int64_t c) {
    const bool there = inside && c < p.channels;
    const uint32_t low = there ? from[c * stride] : 0, high = there ? from[(c + 1) * stride] : 0;
    return low | high << 16;
  };
#pragma unroll 4
  for (int chunk = thread_index() / kRows; chunk < blocks * 8; chunk += kThreads / kRows) {
    uint32_t words[3][4] = {};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t c = chunk * 8 + i * 2;
      const uint32_t pair = load(q, p.query.channel_stride, c);
      if constexpr (Selection) {
        const uint32_t e_pair = load(e, p.selection.channel_stride, c);
        const Pair x = T::unpack(pair), s = T::unpack(e_pair);
        const float a = 2 * s.first * x.first, b = 2 * s.second * x.second;
        words[0][i] = T::pack(a, b);
        const Pair h = T::unpack(words[0][i]);
        words[1][i] = T::pack(a - h.first, b - h.second);
        words[2][i] = e_pair ^ 0x80008000u;  // -e
        constant += s.first * x.first * x.first + s.second * x.second * x.second;
      } else {
        words[0][i] = pair;
      }
    }
#pragma unroll
    for (int part = 0; part < parts_of(Selection); ++part) {
      uint8_t* matrix = shared.queries + (part * blocks + chunk / 8) * kMatrixBytes;
      *reinterpret_cast<uint4*>(matrix + chunk_at(row, chunk % 8)) =
          uint4{words[part][0], words[part][1], words[part][2], words[part][3]};
    }
  }
  if constexpr (Selection) shared.columns->constant[thread_index() / kRows][row] = constant;
}

// What a thread holds of the next tile while the block computes the one before.
struct Ahead {
  uint4 data[kMaxBlocks][4];
  float shrinkage, precision, row, column;
  bool matches;
};

// Eight positions of one channel; what lies past the memory is 0.
VOSOPS_DEVICE uint4 load_positions(const Match& p, const uint16_t* channel, int position) {
  uint4 out = {0, 0, 0, 0};
  if (position + 8 <= p.memory && p.key_run == Run::kPositions8) {
    out = *reinterpret_cast<const uint4*>(channel + position);
  } else if (position + 8 <= p.memory && p.key_run == Run::kPositions4) {
    const uint2 a = *reinterpret_cast<const uint2*>(channel + position);
    const uint2 b = *reinterpret_cast<const uint2*>(channel + position + 4);
    out = uint4{a.x, a.y, b.x, b.y};
  } else {
    uint64_t half[2] = {0, 0};
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll 1
      for (int i = 3; i >= 0; --i) {
        const int at = position + h * 4 + i;
        half[h] = half[h] << 16 | (at < p.memory ? channel[offset_of(p.key.positions, at)] : 0);
      }
    out = uint4{uint32_t(half[0]), uint32_t(half[0] >> 32), uint32_t(half[1]), uint32_t(half[1] >> 32)};
  }
  return out;
}

// Starts the loads of the tile at `first`; each pair of threads also reads what belongs to one column.
VOSOPS_DEVICE void load_tile(const Match& p, int batch, int first, Ahead& ahead) {
  const auto* base = static_cast<const uint16_t*>(p.key.data) + batch * p.key.batch_stride;
  const int t = thread_index();
#pragma unroll
  for (int block = 0; block < kMaxBlocks; ++block) {
    if (block * 64 >= p.channels) break;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      ahead.data[block][i] = uint4{0, 0, 0, 0};
      if (p.key_run == Run::kChannels) {
        const int unit = t + i * kThreads, position = first + unit / 8, channel = block * 64 + unit % 8 * 8;
        if (position < p.memory && channel < p.channels)
          ahead.data[block][i] =
              *reinterpret_cast<const uint4*>(base + offset_of(p.key.positions, position) + channel);
      } else {
        const int channel = block * 64 + t % 16 * 4 + i;
        if (channel < p.channels)
          ahead.data[block][i] = load_positions(p, base + channel * p.key.channel_stride, first + t / 16 * 8);
      }
    }
  }
  const int position = first + t / 2;
  ahead.shrinkage = 1;
  ahead.precision = ahead.row = ahead.column = 0;
  ahead.matches = position < p.memory;
  if (t % 2 == 0 && ahead.matches) {
    if (p.mask.data)
      ahead.matches =
          static_cast<const uint8_t*>(
              p.mask.data)[batch * p.mask.batch_stride + offset_of(p.mask.positions, position)] != 0;
    if (p.shrinkage.data)
      ahead.shrinkage =
          element(p.shrinkage.data, p.shrinkage.dtype,
                  batch * p.shrinkage.batch_stride + offset_of(p.shrinkage.positions, position));
    if (p.precision && ahead.matches) {
      const int64_t at = int64_t(batch) * p.memory + position;
      ahead.precision = p.precision[at];
      ahead.row = p.centers[2 * at];
      ahead.column = p.centers[2 * at + 1];
    }
  }
}

// Eight channels (Words = 4) or four (Words = 2) of one column, and with selection their squares.
template <class T, bool Selection, int Words>
VOSOPS_DEVICE void store_channels(const Shared& shared, int blocks, int block, int column, int byte,
                                  const uint32_t (&w)[Words], int tile) {
  const auto store = [&](int part, const uint32_t (&x)[Words]) {
    uint8_t* to = shared.keys + (part * blocks + block) * kMatrixBytes + byte;
    if constexpr (Words == 4)
      *reinterpret_cast<uint4*>(to) = uint4{x[0], x[1], x[2], x[3]};
    else
      *reinterpret_cast<uint2*>(to) = uint2{x[0], x[1]};
  };
  store(0, w);
  if constexpr (Selection) {
    uint32_t hi[Words], lo[Words];
    bool wide = false;
#pragma unroll
    for (int i = 0; i < Words; ++i) {
      split_squares<T>(w[i], hi[i], lo[i]);
      if constexpr (T::kHalf) wide |= has_infinite_half(hi[i]);
    }
    store(1, hi);
    store(2, lo);
    if (wide) shared.columns->wide[column] = tile;
  }
}

template <class T, bool Selection>
VOSOPS_DEVICE void store_tile(const Match& p, const Shared& shared, const Ahead& ahead, int tile) {
  const int t = thread_index(), blocks = blocks_of(p.channels);
#pragma unroll
  for (int block = 0; block < kMaxBlocks; ++block) {
    if (block * 64 >= p.channels) break;
    const uint4(&data)[4] = ahead.data[block];
    if (p.key_run == Run::kChannels) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int unit = t + i * kThreads, column = unit / 8;
        const uint32_t w[4] = {data[i].x, data[i].y, data[i].z, data[i].w};
        store_channels<T, Selection>(shared, blocks, block, column, chunk_at(column, unit % 8), w, tile);
      }
    } else {
      // Four channels of eight positions: transposed in registers.
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int column = t / 16 * 8 + i, quad = t % 16;
        const uint32_t selector = i % 2 ? 0x7632 : 0x5410;
        const uint32_t w[2] = {bytes_of(word(data[0], i / 2), word(data[1], i / 2), selector),
                               bytes_of(word(data[2], i / 2), word(data[3], i / 2), selector)};
        store_channels<T, Selection>(shared, blocks, block, column, chunk_at(column, quad / 2) + quad % 2 * 8,
                                     w, tile);
      }
    }
  }
}

// Factor and bias of every column, read back from the tile that is in shared memory; see `score`.
template <class T, bool Selection>
VOSOPS_DEVICE void store_columns(const Match& p, const Shared& shared, const Ahead& ahead, int tile) {
  const int column = thread_index() / 2, half = thread_index() % 2;
  Columns& columns = *shared.columns;
  float norm = 0;
  if (!Selection && p.l2) {
    for (int block = 0; block * 64 < p.channels; ++block)
#pragma unroll
      for (int chunk = 0; chunk < 4; ++chunk) {
        const uint4 v = *reinterpret_cast<const uint4*>(shared.keys + block * kMatrixBytes +
                                                        chunk_at(column, half * 4 + chunk));
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const Pair x = T::unpack(word(v, i));
          norm += x.first * x.first + x.second * x.second;
        }
      }
    norm += shuffle_xor(norm, 1);
  }
  if (half == 1) return;
  int state = ahead.matches ? kNormal : kSkipped;
  float factor = p.scale * ahead.shrinkage, bias = Selection ? 0 : -norm;
  if (Selection && T::kHalf && state == kNormal && columns.wide[column] == tile) {
    state = kWide;
    factor = not_a_number();
  }
  if (state == kSkipped) {
    factor = Selection ? 0 : 1;
    bias = -infinity();
  }
  columns.state[column] = state;
  if (state == kWide) columns.wide_tile = tile;
  columns.factor[column] = factor;
  columns.bias[column] = bias;
  columns.precision[column] = ahead.precision;
  columns.row[column] = ahead.row;
  columns.column[column] = ahead.column;
}

}  // namespace vosops::gpu
