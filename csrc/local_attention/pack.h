// SPDX-License-Identifier: Apache-2.0
// Operands of any type and strides, packed once per call: O(Q C) floats that every tile reads.
#pragma once
#include "../common/buffer.h"
#include "../common/load.h"
#include "problem.h"

namespace vosops::VOSOPS_ISA {

constexpr int kStripLength = 16;  // queries beside one another in a tile

constexpr int64_t round_up(int64_t count, int64_t unit) { return (count + unit - 1) / unit * unit; }

inline void chunk_channels(int channels, int& width, int& chunks) {
  width = int(least<int64_t>(kCols, round_up(channels, kLanes)));
  chunks = (channels + width - 1) / width;
}

inline void local_layout(const LocalProblem& p, LocalLayout& l) {
  l.classes_y = least<int64_t>(p.dilation, p.height);
  l.classes_x = least<int64_t>(p.dilation, p.width);
  l.planes = p.batch * p.heads * l.classes_y * l.classes_x;
  l.rows = (p.height + p.dilation - 1) / p.dilation;
  l.columns = (p.width + p.dilation - 1) / p.dilation;
  l.reach = p.window / 2;
  l.window_row = int(round_up(p.window, kLanes));
  l.slots = kRows + p.window - 1;
  l.border_row = l.columns + l.window_row;
  chunk_channels(p.channels, l.key_width, l.key_chunks);
  chunk_channels(p.value_channels, l.value_width, l.value_chunks);
  l.blocks = (l.rows + kRows - 1) / kRows;
  // The scores of a tile should stay in the second cache.
  const int64_t each = int64_t(kRows) * l.slots * l.window_row * int64_t(sizeof(float));
  const int64_t length = most<int64_t>(1, least<int64_t>(kStripLength, 160 * 1024 / each));
  l.strips = (l.columns + length - 1) / length;
  l.strip = (l.columns + l.strips - 1) / l.strips;
}

inline Plane plane_of(const LocalProblem& p, const LocalLayout& l, int64_t index) {
  Plane plane;
  plane.first_column = index % l.classes_x;
  index /= l.classes_x;
  plane.first_row = index % l.classes_y;
  index /= l.classes_y;
  plane.head = index % p.heads;
  plane.batch = index / p.heads;
  plane.rows = (p.height - plane.first_row + p.dilation - 1) / p.dilation;
  plane.columns = (p.width - plane.first_column + p.dilation - 1) / p.dilation;
  return plane;
}

// Cells [x, x + count) of a plane's row `y`, ready for load_channel_major and load_position_major.
struct Run {
  Operand operand;
  const void* base;
  int64_t where[kMaxRun];
  bool consecutive = true;
  int count;

  Run(const Map& map, const LocalProblem& p, const Plane& plane, int64_t channel, int64_t y, int64_t x,
      int count)
      : count(count) {
    operand.data = map.data;
    operand.dtype = map.dtype;
    operand.batch_stride = map.batch_stride;
    operand.channel_stride = map.channel_stride;
    base = base_of(operand, plane.batch);
    const int64_t start = channel * map.channel_stride + (plane.first_row + y * p.dilation) * map.row_stride;
    for (int i = 0; i < count; ++i) {
      where[i] = start + (plane.first_column + (x + i) * p.dilation) * map.column_stride;
      consecutive &= where[i] == where[0] + i;
    }
  }
  void channel_major(int channels, float* to, int64_t stride) const {
    load_channel_major(operand, base, channels, where, count, consecutive, to, stride);
  }
  void position_major(int channels, float* to, int64_t stride) const {
    load_position_major(operand, base, channels, where, count, consecutive, to, stride);
  }
};

inline void scale_all(float* data, int64_t count, float factor) {
  for (int64_t i = 0; i < count; ++i) data[i] *= factor;
}

// One row of a plane between zeros, channel by channel.
inline void pack_row(const Map& map, const LocalProblem& p, const LocalLayout& l, const Plane& plane,
                     int channels, int64_t y, float factor, float* to) {
  fill(to, channels * l.border_row, 0.f);
  for (int64_t x = 0; x < plane.columns; x += kMaxRun) {
    const Run run(map, p, plane, plane.head * channels, y, x,
                  int(least<int64_t>(kMaxRun, plane.columns - x)));
    run.channel_major(channels, to + l.reach + x, l.border_row);
  }
  if (factor != 1) scale_all(to, channels * l.border_row, factor);
}

// One row of a plane, cell by cell: `chunk_step` floats from a chunk to the next.
inline void pack_cells(const Map& map, const LocalProblem& p, const Plane& plane, int channels, int chunks,
                       int width, int64_t y, float factor, float* to, int64_t chunk_step) {
  for (int chunk = 0; chunk < chunks; ++chunk) {
    float* out = to + chunk * chunk_step;
    const int real = least(width, channels - chunk * width);
    if (real < width) fill(out, plane.columns * width, 0.f);
    for (int64_t x = 0; x < plane.columns; x += kMaxRun) {
      const Run run(map, p, plane, plane.head * channels + chunk * width, y, x,
                    int(least<int64_t>(kMaxRun, plane.columns - x)));
      run.position_major(real, out + x * width, width);
    }
    if (factor != 1) scale_all(out, plane.columns * width, factor);
  }
}

// Rows [first, last) of all planes, counted through.
inline void local_pack(const LocalProblem& p, const LocalLayout& l, const LocalPack& pack, int64_t first,
                       int64_t last) {
  for (int64_t index = first; index < last; ++index) {
    const int64_t which = index / l.rows, y = index % l.rows;
    const Plane plane = plane_of(p, l, which);
    if (y >= plane.rows) continue;
    const auto rows = [&](const Map& map, int channels, float factor, float* to) {
      pack_row(map, p, l, plane, channels, y, factor,
               to + which * l.key_rows(channels) + y * channels * l.border_row);
    };
    const auto cells = [&](const Map& map, int channels, int chunks, int width, float factor, float* to) {
      pack_cells(map, p, plane, channels, chunks, width, y, factor,
                 to + which * l.cells(chunks, width) + y * l.columns * width, l.rows * l.columns * width);
    };
    if (pack.key_rows) rows(p.key, p.channels, p.scale, pack.key_rows);
    if (pack.key_cells) cells(p.key, p.channels, l.key_chunks, l.key_width, p.scale, pack.key_cells);
    if (pack.value_rows) rows(p.value, p.value_channels, 1, pack.value_rows);
    if (pack.value_cells)
      cells(p.value, p.value_channels, l.value_chunks, l.value_width, 1, pack.value_cells);
  }
}

// A table (offset, channel) of one head, with any strides, as [dy][channel][window_row].
inline void pack_table_rows(const float* from, int64_t offset_stride, int64_t channel_stride, int channels,
                            const LocalLayout& l, float* to) {
  fill(to, int64_t(l.window()) * channels * l.window_row, 0.f);
  for (int dy = 0; dy < l.window(); ++dy)
    for (int c = 0; c < channels; ++c)
      for (int dx = 0; dx < l.window(); ++dx)
        to[(int64_t(dy) * channels + c) * l.window_row + dx] =
            from[(dy * l.window() + dx) * offset_stride + c * channel_stride];
}

// The same as [chunk][dy][window_row][width].
inline void pack_table_cells(const float* from, int64_t offset_stride, int64_t channel_stride, int channels,
                             int chunks, int width, const LocalLayout& l, float* to) {
  fill(to, l.table(chunks, width), 0.f);
  for (int dy = 0; dy < l.window(); ++dy)
    for (int dx = 0; dx < l.window(); ++dx)
      for (int c = 0; c < channels; ++c)
        to[((int64_t(c / width) * l.window() + dy) * l.window_row + dx) * width + c % width] =
            from[(dy * l.window() + dx) * offset_stride + c * channel_stride];
}

inline void local_pack_tables(const LocalProblem& p, const LocalLayout& l, const LocalPack& pack,
                              int64_t head) {
  const int64_t offsets = int64_t(p.window) * p.window;
  const float* weight = p.weight + head * offsets * p.channels;
  const float* value = p.relative_value + head * offsets * p.value_channels;
  const int64_t row_floats = int64_t(p.window) * l.window_row;
  if (pack.weight_rows)
    pack_table_rows(weight, p.channels, 1, p.channels, l, pack.weight_rows + head * row_floats * p.channels);
  if (pack.weight_cells)
    pack_table_cells(weight, p.channels, 1, p.channels, l.key_chunks, l.key_width, l,
                     pack.weight_cells + head * l.table(l.key_chunks, l.key_width));
  if (pack.relative_rows)
    pack_table_rows(value, 1, offsets, p.value_channels, l,
                    pack.relative_rows + head * row_floats * p.value_channels);
  if (pack.relative_cells)
    pack_table_cells(value, 1, offsets, p.value_channels, l.value_chunks, l.value_width, l,
                     pack.relative_cells + head * l.table(l.value_chunks, l.value_width));
  if (pack.weight_offset) {
    float* to = pack.weight_offset + head * row_floats;
    fill(to, row_floats, 0.f);
    for (int dy = 0; dy < p.window; ++dy)
      std::memcpy(to + dy * l.window_row, p.weight_offset + head * offsets + dy * p.window,
                  sizeof(float) * p.window);
  }
}

}  // namespace vosops::VOSOPS_ISA
