// SPDX-License-Identifier: Apache-2.0
// Gradient of the dense read. The weights are recomputed tile by tile from the log-sum-exp:
//   P = exp(S - lse), dV = P' dR, dS = P (dR V' - delta), dA = dS B, dB = dS' A, dbias = column sums of dS.
#pragma once
#include "dense.h"

namespace vosops::VOSOPS_ISA {

constexpr int kChunk = 16 * kRows;                                // queries whose weights are held at a time
constexpr int kPaddedCols = (kCols + kRows - 1) / kRows * kRows;  // memory positions as rows of a product

constexpr int64_t panels_of(int64_t columns) { return (columns + kCols - 1) / kCols; }

// The right-hand sides that all tasks share: rows of queries as panels of kCols columns.
//   grad: [panel][chunked queries][kCols] of the read's gradient (object, channel)
//   left: the same of the packed queries a
inline int64_t chunked(int64_t queries) { return (queries + kChunk - 1) / kChunk * kChunk; }

// Panels [first, last) of the transposed gradient of the read; out holds chunked(Q) rows a panel.
inline void pack_grad(const float* grad, int64_t columns, int64_t queries, int64_t first, int64_t last,
                      float* out) {
  const int64_t rows = chunked(queries);
  for (int64_t panel = first; panel < last; ++panel) {
    float* to = out + panel * rows * kCols;
    const int width = int(least<int64_t>(kCols, columns - panel * kCols));
    fill(to, rows * kCols, 0.f);
    transpose(grad + panel * kCols * queries, queries, width, int(queries), to, kCols);
  }
}

// The packed queries of one batch entry as panels of rows.
inline void unpack_queries(const PackedQueries& packed, int64_t batch, int64_t queries, float* out) {
  const int64_t rows = chunked(queries);
  fill(out, panels_of(packed.depth) * rows * kCols, 0.f);
  for (int64_t block = 0; block < packed.blocks; ++block) {
    const float* a = packed.data + (batch * packed.blocks + block) * int64_t(packed.depth) * kRows;
    for (int c = 0; c < packed.depth; ++c)
      for (int r = 0; r < kRows; ++r)
        out[(c / kCols * rows + block * kRows + r) * kCols + c % kCols] = a[c * kRows + r];
  }
}

// to[rows][kCols] += a' b for row groups of kRows; a(row, depth) = a[row * row_step + depth * depth_step].
inline void accumulate(const float* a, int64_t row_step, int64_t depth_step, const float* b, int64_t depth,
                       int64_t rows, float* to) {
  for (int64_t row = 0; row < rows; row += kRows) {
    Tile sum;
    for (int r = 0; r < kRows; ++r)
      for (int v = 0; v < kVecs; ++v) sum[r][v] = load(to + (row + r) * kCols + v * kLanes);
    multiply(a + row * row_step, row_step, depth_step, b, depth, sum);
    for (int r = 0; r < kRows; ++r)
      for (int v = 0; v < kVecs; ++v) store(to + (row + r) * kCols + v * kLanes, sum[r][v]);
  }
}

// Memory positions [m0, m1). grad_left [panel][chunked queries][kCols] is this task's own and is added to.
inline void dense_backward(const Problem& p, const PackedQueries& packed, const Values& values, int64_t batch,
                           int64_t m0, int64_t m1, const float* lse, const float* delta, const float* grad,
                           const float* left, float* grad_left, float* grad_right, float* grad_bias,
                           float* grad_value) {
  const int64_t columns = values.objects * values.channels, value_panels = panels_of(columns);
  const int64_t depth = packed.depth, key_panels = panels_of(depth), rows = chunked(p.queries);
  Panel panel(packed);
  Buffer<float> value_rows(value_panels * kCols * kCols, 0.f);  // [channel][position]
  Buffer<float> identity_rows(values.identity ? columns * kCols : 0, 0.f);
  Buffer<float> key_rows(key_panels * kCols * kCols, 0.f);  // [panel][position][channel]
  Buffer<float> sum_value(value_panels * kPaddedCols * kCols), sum_key(key_panels * kPaddedCols * kCols);
  // A product over positions reads whole groups of kRows: a few floats past the last row.
  Buffer<float> weights(kChunk * kCols + kRows, 0.f), slopes(kChunk * kCols + kRows, 0.f);
  for (int64_t m = m0; m < m1; m += kCols) {
    panel.pack(p, batch, m, m1);
    for (int64_t i = 0; i < key_panels; ++i)
      transpose(panel.data.data() + i * kCols * kCols, kCols, int(least<int64_t>(kCols, depth - i * kCols)),
                kCols, &key_rows[i * kCols * kCols], kCols);
    int64_t where[kCols];
    const bool consecutive = offsets_of(values.value.positions, m, panel.count, where);
    for (int64_t o = 0; o < values.objects; ++o)
      load_channel_major(values.value, base_of(values.value, batch, o), int(values.channels), where,
                         panel.count, consecutive, &value_rows[o * values.channels * kCols], kCols);
    if (values.identity) {
      const bool beside = offsets_of(values.identity.positions, m, panel.count, where);
      for (int64_t o = 0; o < values.objects; ++o)
        load_channel_major(values.identity, base_of(values.identity, batch, o), int(values.channels), where,
                           panel.count, beside, &identity_rows[o * values.channels * kCols], kCols);
      for (int64_t i = 0; i < columns * kCols; i += kLanes)
        store(&value_rows[i], load(&value_rows[i]) + load(&identity_rows[i]));
    }
    for (int64_t c = 0; c < columns; ++c) {
      for (int j = panel.count; j < kCols; ++j) value_rows[c * kCols + j] = 0;
      if (!p.mask) continue;
      for (int j = 0; j < panel.count; ++j)
        if (panel.bias[j] == -kInf) value_rows[c * kCols + j] = 0;
    }
    sum_value.fill(0);
    sum_key.fill(0);
    Vec bias[kVecs] = {};
    for (int64_t q = 0; q < rows; q += kChunk) {
      const int64_t blocks = least<int64_t>(kChunk / kRows, packed.blocks - q / kRows);
      for (int64_t b = 0; b < blocks; ++b) {
        const int64_t block = q / kRows + b;
        Tile s, slope = {};
        score_tile(p, packed, batch, block, panel, s);
        for (int64_t i = 0; i < value_panels; ++i)  // dR V', over the channels of a panel at a time
          multiply(grad + (i * rows + block * kRows) * kCols, kCols, 1, &value_rows[i * kCols * kCols],
                   least<int64_t>(kCols, columns - i * kCols), slope);
        for (int r = 0; r < kRows; ++r) {
          const int64_t query = block * kRows + r;
          float* w_to = &weights[(b * kRows + r) * kCols];
          float* s_to = &slopes[(b * kRows + r) * kCols];
          if (query >= p.queries) {
            fill(w_to, kCols, 0.f);
            fill(s_to, kCols, 0.f);
            continue;
          }
          const float norm = lse[batch * p.queries + query], shift = delta[batch * p.queries + query];
          for (int v = 0; v < kVecs; ++v) {
            const Vec w = exp(s[r][v] - norm), d = w * (slope[r][v] - shift);
            store(w_to + v * kLanes, w);
            store(s_to + v * kLanes, d);
            bias[v] += d;
          }
        }
      }
      const int64_t real = blocks * kRows;
      for (int64_t i = 0; i < value_panels; ++i)
        accumulate(weights.data(), 1, kCols, grad + (i * rows + q) * kCols, real, kPaddedCols,
                   &sum_value[i * kPaddedCols * kCols]);
      for (int64_t i = 0; i < key_panels; ++i) {
        accumulate(slopes.data(), 1, kCols, left + (i * rows + q) * kCols, real, kPaddedCols,
                   &sum_key[i * kPaddedCols * kCols]);
        accumulate(slopes.data(), kCols, 1, &key_rows[i * kCols * kCols], kCols, real,
                   grad_left + (i * rows + q) * kCols);
      }
    }
    float all[kCols];
    for (int v = 0; v < kVecs; ++v) store(all + v * kLanes, bias[v]);
    std::memcpy(grad_bias + batch * p.memory + m, all, sizeof(float) * panel.count);
    for (int64_t i = 0; i < key_panels; ++i)
      for (int j = 0; j < panel.count; ++j)
        std::memcpy(grad_right + (batch * p.memory + m + j) * depth + i * kCols,
                    &sum_key[(i * kPaddedCols + j) * kCols],
                    sizeof(float) * size_t(least<int64_t>(kCols, depth - i * kCols)));
    for (int64_t i = 0; i < value_panels; ++i)
      transpose(&sum_value[i * kPaddedCols * kCols], kCols, panel.count,
                int(least<int64_t>(kCols, columns - i * kCols)),
                grad_value + (batch * columns + i * kCols) * p.memory + m, p.memory);
  }
}

}  // namespace vosops::VOSOPS_ISA
