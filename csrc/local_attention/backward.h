// SPDX-License-Identifier: Apache-2.0
// Gradients of local attention, from the log-sum-exp of every query:
//   P = exp(S - lse), dP = <dR, v + relative_value>, dS = P (dP - delta),
//   dq = dS (k + weight), dk = dS' q, dv = P' dR, and the same sums over all queries for the tables.
#pragma once
#include "forward.h"

namespace vosops::VOSOPS_ISA {

// Queries as [chunk][query][column][width], the last chunk padded with 0.
inline void pack_rows_of(const Map& map, const LocalProblem& p, const LocalTile& t, int channels, int chunks,
                         int width, float* to) {
  for (int chunk = 0; chunk < chunks; ++chunk) {
    const int real = least(width, channels - chunk * width);
    for (int r = 0; r < t.rows; ++r) {
      float* out = to + (int64_t(chunk) * t.rows + r) * t.columns * width;
      if (real < width) fill(out, int64_t(t.columns) * width, 0.f);
      Run(map, p, t.plane, t.plane.head * channels + chunk * width, t.y + r, t.x, t.columns)
          .position_major(real, out, width);
    }
  }
}

// Adds s' g to the segment's cells [chunk][segment row][column][width] and to its table, if there is one.
inline void scatter_cells(const LocalTile& t, const LocalSegment& segment, const float* s, const float* g,
                          int chunks, int width, float* cells, float* table) {
  const LocalLayout& l = *t.l;
  const int vecs = width / kLanes;
  const int64_t g_row = int64_t(t.columns) * width, b_row = l.columns * width;
  for (int chunk = 0; chunk < chunks; ++chunk) {
    const float* rows = g + chunk * t.rows * g_row;
    float* b = cells + chunk * (segment.last_row - segment.first_row) * b_row;
    for_runs(t.rows, l.window(), t.low, t.high, [&](int first, int count, int j, int end) {
      const auto tile = scatter_tile_of(count, vecs);
      for (int x = 0; x < t.columns; ++x) {
        const int dx = t.first_dx(x);
        tile(s + x * t.cell + first * t.row + int64_t(j) * l.window_row + dx, t.row, end - j, l.window_row,
             rows + first * g_row + int64_t(x) * width, g_row,
             b + (t.y - l.reach + j - segment.first_row) * b_row + (t.x + x - l.reach + dx) * width, b_row,
             t.last_dx(x) - dx);
      }
    });
    if (!table) continue;
    const auto tile = scatter_tile_of(t.rows, vecs);
    float* relative = table + chunk * l.table(1, width);
    for (int x = 0; x < t.columns; ++x) {
      const int dx = t.first_dx(x);
      tile(s + x * t.cell + dx, t.row + l.window_row, l.window(), l.window_row, rows + int64_t(x) * width,
           g_row, relative + int64_t(dx) * width, int64_t(l.window_row) * width, t.last_dx(x) - dx);
    }
  }
}

// Scores to weights P, and dP to dS; adds dS to the offsets' gradient.
inline void differentiate(const LocalTile& t, const float* offset, float* s, float* ds, int x, int r,
                          float lse, float delta, float* grad_offset) {
  const int64_t other = ds - s;
  for_window(t, s, x, r, [&](float* at, int64_t i, VecI inside) {
    Vec v = load(at);
    if (offset) v += load(offset + i);
    const Vec w = exp((inside ? v : set1(kLowest)) - lse);
    const Vec d = inside ? w * (load(at + other) - delta) : Vec{};
    store(at, w);
    store(at + other, d);
    if (grad_offset) store(grad_offset + i, load(grad_offset + i) + d);
  });
  clear_outside(t, s, x, r);
  clear_outside(t, ds, x, r);
}

// The gradient of relative_bias is dS itself; 0 where an offset is outside the frame.
inline void write_bias(const LocalProblem& p, const LocalTile& t, const float* ds, float* out) {
  const int64_t area = p.height * p.width;
  for (int r = 0; r < t.rows; ++r)
    for (int dy = 0; dy < p.window; ++dy)
      for (int dx = 0; dx < p.window; ++dx) {
        float* to =
            out +
            ((t.plane.batch * p.heads + t.plane.head) * p.window * p.window + dy * p.window + dx) * area +
            (t.plane.first_row + (t.y + r) * p.dilation) * p.width + t.plane.first_column;
        for (int x = 0; x < t.columns; ++x)
          to[(t.x + x) * p.dilation] = ds[x * t.cell + r * t.row + int64_t(r + dy) * t.l->window_row + dx];
      }
}

// The blocks of queries of a plane in even parts, and the keys that they meet.
inline void local_segment(const LocalProblem& p, const LocalLayout& l, int64_t which, int64_t part,
                          int64_t parts, LocalSegment& s) {
  const Plane plane = plane_of(p, l, which);
  const int64_t blocks = blocks_of(plane);
  s.plane = which;
  s.first_block = part * blocks / parts;
  s.last_block = (part + 1) * blocks / parts;
  if (s.first_block == s.last_block) return;
  s.first_row = most<int64_t>(0, s.first_block * plane.rows / blocks - l.reach);
  s.last_row = least(plane.rows, s.last_block * plane.rows / blocks + l.reach);
}

// One segment, tile after tile; fills its buffers.
inline void local_backward(const LocalProblem& p, const LocalLayout& l, const LocalPack& pack,
                           const LocalGradients& g, const LocalSegment& segment) {
  const Plane plane = plane_of(p, l, segment.plane);
  const int64_t head = plane.head, table_row = int64_t(p.window) * l.window_row,
                queries = kRows * kStripLength;
  const int64_t cell = int64_t(kRows) * l.slots * l.window_row;
  Buffer<float> s(l.strip * cell, 0.f), ds(l.strip * cell, 0.f);
  Buffer<float> a(queries * most(p.channels, p.value_channels), 0.f);
  Buffer<float> query_rows(queries * l.key_chunks * l.key_width);
  Buffer<float> read_rows(queries * l.value_chunks * l.value_width);
  Buffer<float> acc((queries + kStripLength) * int64_t(l.key_width), 0.f);
  const auto of_head = [&](const float* tables, int64_t size) {
    return tables ? tables + head * size : nullptr;
  };
  const float* weight_rows = of_head(pack.weight_rows, table_row * p.channels);
  const float* weight_cells = of_head(pack.weight_cells, l.table(l.key_chunks, l.key_width));
  const float* relative_rows = of_head(pack.relative_rows, table_row * p.value_channels);
  const float* offset = of_head(pack.weight_offset, table_row);
  const int64_t area = (segment.last_row - segment.first_row) * l.columns;
  fill(segment.key_cells, area * l.key_chunks * l.key_width, 0.f);
  fill(segment.value_cells, area * l.value_chunks * l.value_width, 0.f);
  if (segment.weight_cells) fill(segment.weight_cells, l.table(l.key_chunks, l.key_width), 0.f);
  if (segment.relative_cells) fill(segment.relative_cells, l.table(l.value_chunks, l.value_width), 0.f);
  if (segment.weight_offset) fill(segment.weight_offset, table_row, 0.f);
  for (int64_t block = segment.first_block; block < segment.last_block; ++block)
    for (int64_t strip = 0; strip < l.strips; ++strip) {
      const LocalTile t(l, plane, block, strip);
      if (!t) continue;
      pack_queries(p.query, p, t, p.channels, a.data());
      score(t, a.data(), p.channels, pack.key_rows + segment.plane * l.key_rows(p.channels), weight_rows,
            s.data());
      if (p.bias.data) add_bias(p, t, s.data());
      pack_queries(g.read, p, t, p.value_channels, a.data());
      score(t, a.data(), p.value_channels, pack.value_rows + segment.plane * l.key_rows(p.value_channels),
            relative_rows, ds.data());
      for (int r = 0; r < t.rows; ++r) {
        const int64_t first =
            ((plane.batch * p.heads + head) * p.height + plane.first_row + (t.y + r) * p.dilation) * p.width +
            plane.first_column;
        for (int x = 0; x < t.columns; ++x) {
          const int64_t at = first + (t.x + x) * p.dilation;
          differentiate(t, offset, s.data(), ds.data(), x, r, g.lse[at], g.delta[at], segment.weight_offset);
        }
      }
      if (g.bias) write_bias(p, t, ds.data(), g.bias);
      read_cells(t, ds.data(), pack.key_cells + segment.plane * l.cells(l.key_chunks, l.key_width),
                 weight_cells, l.key_chunks, l.key_width, acc.data(), [&](int chunk) {
                   for (int r = 0; r < t.rows; ++r)
                     write_cells(p, plane, p.channels, chunk, l.key_width,
                                 &acc[int64_t(r) * t.columns * l.key_width], t.y + r, t.x, t.columns,
                                 g.query);
                 });
      pack_rows_of(p.query, p, t, p.channels, l.key_chunks, l.key_width, query_rows.data());
      scatter_cells(t, segment, ds.data(), query_rows.data(), l.key_chunks, l.key_width, segment.key_cells,
                    segment.weight_cells);
      pack_rows_of(g.read, p, t, p.value_channels, l.value_chunks, l.value_width, read_rows.data());
      scatter_cells(t, segment, s.data(), read_rows.data(), l.value_chunks, l.value_width,
                    segment.value_cells, segment.relative_cells);
    }
}

// Row y of the keys and values of a plane: the sum of its segments, in order, written to the gradients.
inline void local_collect(const LocalProblem& p, const LocalLayout& l, const LocalSegment* segments,
                          int count, int64_t y, float* grad_key, float* grad_value) {
  const Plane plane = plane_of(p, l, segments[0].plane);
  if (y >= plane.rows) return;
  const auto collect = [&](auto member, int channels, int chunks, int width, float factor, float* out) {
    Buffer<float> sum(round_up(plane.columns, 16) * width, 0.f);
    for (int chunk = 0; chunk < chunks; ++chunk) {
      fill(sum.data(), plane.columns * width, 0.f);
      for (int i = 0; i < count; ++i) {
        const LocalSegment& one = segments[i];
        if (y < one.first_row || y >= one.last_row) continue;
        const int64_t rows = one.last_row - one.first_row;
        const float* from = one.*member + (chunk * rows + y - one.first_row) * l.columns * width;
        for (int64_t j = 0; j < plane.columns * width; ++j) sum[j] += from[j] * factor;
      }
      write_cells(p, plane, channels, chunk, width, sum.data(), y, 0, int(plane.columns), out);
    }
  };
  collect(&LocalSegment::key_cells, p.channels, l.key_chunks, l.key_width, p.scale, grad_key);
  collect(&LocalSegment::value_cells, p.value_channels, l.value_chunks, l.value_width, 1.f, grad_value);
}

// Adds a segment's tables to the parameters' gradients.
inline void local_add_tables(const LocalProblem& p, const LocalLayout& l, const LocalSegment& segment,
                             float* weight, float* weight_offset, float* relative_value) {
  const int64_t head = plane_of(p, l, segment.plane).head, offsets = int64_t(p.window) * p.window;
  for (int dy = 0; dy < p.window; ++dy)
    for (int dx = 0; dx < p.window; ++dx) {
      const int64_t offset = dy * p.window + dx, row = int64_t(dy) * l.window_row + dx;
      const auto at = [&](const float* table, int c, int width) {
        return table[(int64_t(c / width) * p.window * l.window_row + row) * width + c % width];
      };
      if (segment.weight_cells)
        for (int c = 0; c < p.channels; ++c)
          weight[(head * offsets + offset) * p.channels + c] += at(segment.weight_cells, c, l.key_width);
      if (segment.weight_offset) weight_offset[head * offsets + offset] += segment.weight_offset[row];
      if (segment.relative_cells)
        for (int c = 0; c < p.value_channels; ++c)
          relative_value[(head * p.value_channels + c) * offsets + offset] +=
              at(segment.relative_cells, c, l.value_width);
    }
}

}  // namespace vosops::VOSOPS_ISA
