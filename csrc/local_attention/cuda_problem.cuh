// SPDX-License-Identifier: Apache-2.0
// One call of local attention as its CUDA kernels see it, and the shared memory of a block.
#pragma once
#include "../common/cuda_numbers.cuh"
#include "problem.h"

namespace vosops::gpu::local {

constexpr int kThreads = 128;  // of a block: four warps, each two rows of the tile
constexpr int kSide = 8;       // of the tile of queries of a block
constexpr int kRows = kSide * kSide;
constexpr int kMaxWindow = 15;
constexpr int kLaneOffsets = 8;    // offsets of a window that a lane holds: 15 * 15 <= 8 * 32
constexpr int kMaxChannels = 128;  // of a head's keys
constexpr int kMaxValueChannels = 1024;
constexpr int kChunk = 128;  // value channels that a warp sums up at a time

VOSOPS_ANYWHERE constexpr int round_up(int x, int multiple) {
  return (x + multiple - 1) / multiple * multiple;
}
// Of one position in shared memory. An odd number of 16 bytes: eight rows have no bank in common.
VOSOPS_ANYWHERE constexpr int row_bytes(int channels) { return round_up(channels, 16) * 2 + 16; }

// x / by for x * by < 2^16.
struct Divider {
  uint32_t factor;
  VOSOPS_DEVICE explicit Divider(int by) : factor(65536 / uint32_t(by) + 1) {}
  VOSOPS_DEVICE int operator()(int x) const { return int(uint32_t(x) * factor >> 16); }
};

// A map of 16-bit elements, channels innermost, every position aligned to 16 bytes.
struct Cells {
  const uint16_t* data = nullptr;
  int64_t batch_stride = 0, row_stride = 0, column_stride = 0;
  int channels = 0;  // of one head
};

// A relative table as 16-bit terms whose sum is the float32 entry to 16 bits or more:
// [head][offset][channel].
struct Table {
  const uint16_t *high = nullptr, *low = nullptr;
  const int32_t* has_low = nullptr;  // [head], whether `low` is not all zero
  int channels = 0;

  explicit VOSOPS_ANYWHERE operator bool() const { return high != nullptr; }
};

struct Local {
  int batch = 0, heads = 1, height = 0, width = 0, window = 1;
  int tiles_x = 0, strip_rows = 2;  // tiles side by side; rows of keys that a block loads at once
  int chunks = 1;                   // of kChunk value channels, of one block
  int first_plane = 0;              // batch entry * heads + head of block_z = 0
  float scale = 1;
  Cells query, key, value;
  Table weight, relative_value;
  const float* weight_offset = nullptr;  // [head][offset], or null
  Map bias;                              // of the first head, its channels are offsets; data null without
  int64_t bias_head_stride = 0;
  float *read = nullptr, *lse = nullptr;

  VOSOPS_ANYWHERE int reach() const { return window / 2; }
  VOSOPS_ANYWHERE int offsets() const { return window * window; }
  VOSOPS_ANYWHERE int padded_offsets() const { return round_up(offsets(), 16); }
  VOSOPS_ANYWHERE int halo() const { return kSide + window - 1; }  // side of the keys that a tile meets
  VOSOPS_ANYWHERE int columns() const { return round_up(halo(), 8); }
  VOSOPS_ANYWHERE int64_t area() const { return int64_t(height) * width; }
  // Floats of a row of scores: 8 modulo the 32 banks, so that few rows of a fragment share a bank.
  VOSOPS_ANYWHERE int score_stride() const { return (offsets() + 23) / 32 * 32 + 8; }
  // Elements of a row of 16-bit weights in the place of its scores.
  VOSOPS_ANYWHERE int weight_stride() const { return 2 * score_stride(); }
  VOSOPS_ANYWHERE int strip_positions() const { return strip_rows * columns(); }
  VOSOPS_ANYWHERE int widest_row() const {
    const int values = value.channels < kChunk ? value.channels : kChunk;
    return row_bytes(query.channels > values ? query.channels : values);
  }
  VOSOPS_ANYWHERE int strip_bytes() const { return strip_positions() * widest_row(); }
};

// What the gradients need besides.
struct LocalBackward {
  Local forward;
  Cells grad;                                    // of the read, rounded to 16 bits
  const float *lse = nullptr, *delta = nullptr;  // [batch][head][row][column]
  // Of the planes of a launch, [plane][position][padded offset]: a, and the gradient of s.
  uint16_t *weights = nullptr, *differences = nullptr;
  float *grad_query = nullptr, *grad_key = nullptr, *grad_value = nullptr, *grad_bias = nullptr;
  float* offset_parts = nullptr;  // [plane of the call][tile, warp][offset]; null without
};

// A table's gradient: weights' times cells, the positions cut into `splits`.
struct TableGradient {
  Local forward;
  const uint16_t* weights = nullptr;  // as LocalBackward's
  Cells cells;
  int splits = 1, split_positions = 0;  // a multiple of kRows
  float* parts = nullptr;               // [plane of the call][split][offset][channel]
};

// out[head][offset][channel] (or [head][channel][offset]): the parts of all batch entries, added in order.
struct TableSum {
  const float* parts = nullptr;  // [batch][head][part][offset][channel]
  float* out = nullptr;
  int batch = 0, heads = 0, count = 0, offsets = 0, channels = 0;
  bool channels_first = false;
};

// Shared memory of a block: rows of scores (`buffers` times), 64 queries, two strips.
struct Shared {
  float* scores;
  float* inverse;  // of the sums of the rows' weights
  uint8_t *queries, *strips;

  VOSOPS_DEVICE Shared(uint8_t* base, const Local& p, int buffers) {
    scores = reinterpret_cast<float*>(base);
    inverse = scores + buffers * kRows * p.score_stride();
    queries = reinterpret_cast<uint8_t*>(inverse + kRows);
    strips = queries + kRows * p.widest_row();
  }
};
VOSOPS_ANYWHERE inline int64_t shared_bytes(const Local& p, int buffers) {
  return (int64_t(buffers) * p.score_stride() + 1) * kRows * 4 + kRows * p.widest_row() + 2 * p.strip_bytes();
}

// Of the gradients of keys and values: 16-bit weights in place of the scores, no queries.
VOSOPS_ANYWHERE inline int64_t spread_bytes(const Local& p) {
  return int64_t(kRows) * p.weight_stride() * 2 + 2 * p.strip_bytes();
}
// Of a table's gradient: two strips of 64 positions, of 64 offsets and of channels.
VOSOPS_ANYWHERE inline int64_t table_bytes(const TableGradient& p) {
  const int channels = p.cells.channels < kChunk ? p.cells.channels : kChunk;
  return 2 * kRows * (row_bytes(kRows) + row_bytes(channels));
}

// The 8x8 positions of a block.
struct Tile {
  int plane, batch, head, y, x;

  VOSOPS_DEVICE explicit Tile(const Local& p) {
    plane = p.first_plane + block_z();
    batch = plane / p.heads;
    head = plane - batch * p.heads;
    const int row = block_x() / p.tiles_x;
    y = row * kSide;
    x = (block_x() - row * p.tiles_x) * kSide;
  }
  VOSOPS_DEVICE bool inside(const Local& p, int row) const {
    return y + row / kSide < p.height && x + row % kSide < p.width;
  }
  // Of a position of the tile, on the map of its plane.
  VOSOPS_DEVICE int64_t position(const Local& p, int row) const {
    return int64_t(y + row / kSide) * p.width + x + row % kSide;
  }
  // Whether an offset (dy, dx counted from the window's corner) of a position is on the map.
  VOSOPS_DEVICE bool meets(const Local& p, int row, int dy, int dx) const {
    const int ky = y + row / kSide + dy - p.reach(), kx = x + row % kSide + dx - p.reach();
    return uint32_t(ky) < uint32_t(p.height) && uint32_t(kx) < uint32_t(p.width);
  }
};

}  // namespace vosops::gpu::local
