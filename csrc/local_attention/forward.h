// SPDX-License-Identifier: Apache-2.0
// Local attention of tiles of queries: scores, softmax, read.
#pragma once
#include "scores.h"

namespace vosops::VOSOPS_ISA {

// For every chunk of channels f(chunk, sum_D s[D] (cells[p + D] + table[D]) as [query][column][width]).
// `cells` are a plane's, [chunk][row][column][width]; `table` is null or a head's.
template <class F>
inline void read_cells(const LocalTile& t, const float* s, const float* cells, const float* table, int chunks,
                       int width, float* acc, const F& f) {
  const LocalLayout& l = *t.l;
  const int vecs = width / kLanes;
  const int64_t acc_row = int64_t(t.columns) * width, b_row = l.columns * width;
  for (int chunk = 0; chunk < chunks; ++chunk) {
    const float* b = cells + chunk * l.rows * b_row;
    fill(acc, t.rows * acc_row, 0.f);
    for_runs(t.rows, l.window(), t.low, t.high, [&](int first, int count, int j, int end) {
      const auto tile = read_tile_of(count, vecs);
      for (int x = 0; x < t.columns; ++x) {
        const int dx = t.first_dx(x);
        tile(s + x * t.cell + first * t.row + int64_t(j) * l.window_row + dx, t.row, end - j, l.window_row,
             b + (t.y - l.reach + j) * b_row + (t.x + x - l.reach + dx) * width, b_row, t.last_dx(x) - dx,
             acc + first * acc_row + int64_t(x) * width, acc_row);
      }
    });
    if (table) {
      const auto tile = read_tile_of(t.rows, vecs);
      const float* relative = table + chunk * l.table(1, width);
      for (int x = 0; x < t.columns; ++x) {
        const int dx = t.first_dx(x);
        tile(s + x * t.cell + dx, t.row + l.window_row, l.window(), l.window_row,
             relative + int64_t(dx) * width, int64_t(l.window_row) * width, t.last_dx(x) - dx,
             acc + int64_t(x) * width, acc_row);
      }
    }
    f(chunk);
  }
}

// Scores to exp(score - largest); returns 1 / their sum and the log-sum-exp. Without any match 0 and inf.
inline float soften(const LocalTile& t, const float* offset, float* s, int x, int r, float& lse) {
  Vec best = set1(kLowest), sum = {};
  for_window(t, s, x, r, [&](float* at, int64_t i, VecI inside) {
    Vec v = load(at);
    if (offset) v += load(offset + i);
    v = inside ? v : set1(kLowest);
    store(at, v);
    best = vmax(v, best);
  });
  const float top = tree_max(best), shift = top == kLowest ? 0 : top;
  for_window(t, s, x, r, [&](float* at, int64_t, VecI) {
    const Vec w = exp(load(at) - shift);
    store(at, w);
    sum += w;
  });
  clear_outside(t, s, x, r);
  const float total = tree_add(sum);
  lse = total == 0 ? -kLowest : shift + __builtin_logf(total);
  return total == 0 ? 0 : 1 / total;
}

// Tasks [begin, end) of planes * blocks * strips.
inline void local_forward(const LocalProblem& p, const LocalLayout& l, const LocalPack& pack, int64_t begin,
                          int64_t end, float* out, float* lse) {
  const int64_t cell = int64_t(kRows) * l.slots * l.window_row;
  Buffer<float> s(l.strip * cell, 0.f), a(l.strip * p.channels * kRows, 0.f);
  Buffer<float> acc((kRows + 1) * kStripLength * int64_t(l.value_width), 0.f);
  float inverse[kRows * kStripLength];
  for (int64_t task = begin; task < end; ++task) {
    const int64_t which = task / (l.blocks * l.strips);
    const LocalTile t(l, plane_of(p, l, which), task / l.strips % l.blocks, task % l.strips);
    if (!t) continue;
    const int64_t head = t.plane.head, table_row = int64_t(p.window) * l.window_row;
    pack_queries(p.query, p, t, p.channels, a.data());
    score(t, a.data(), p.channels, pack.key_rows + which * l.key_rows(p.channels),
          pack.weight_rows ? pack.weight_rows + head * table_row * p.channels : nullptr, s.data());
    if (p.bias.data) add_bias(p, t, s.data());
    const float* offset = pack.weight_offset ? pack.weight_offset + head * table_row : nullptr;
    for (int r = 0; r < t.rows; ++r) {
      float* norms =
          lse +
          ((t.plane.batch * p.heads + head) * p.height + t.plane.first_row + (t.y + r) * p.dilation) *
              p.width +
          t.plane.first_column;
      for (int x = 0; x < t.columns; ++x)
        inverse[r * t.columns + x] = soften(t, offset, s.data(), x, r, norms[(t.x + x) * p.dilation]);
    }
    read_cells(
        t, s.data(), pack.value_cells + which * l.cells(l.value_chunks, l.value_width),
        pack.relative_cells ? pack.relative_cells + head * l.table(l.value_chunks, l.value_width) : nullptr,
        l.value_chunks, l.value_width, acc.data(), [&](int chunk) {
          for (int i = 0; i < t.rows * t.columns; ++i)
            scale_all(&acc[int64_t(i) * l.value_width], l.value_width, inverse[i]);
          for (int r = 0; r < t.rows; ++r)
            write_cells(p, t.plane, p.value_channels, chunk, l.value_width,
                        &acc[int64_t(r) * t.columns * l.value_width], t.y + r, t.x, t.columns, out);
        });
  }
}

}  // namespace vosops::VOSOPS_ISA
