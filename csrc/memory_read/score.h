// SPDX-License-Identifier: Apache-2.0
// Score tiles: kRows queries x kCols memory positions, in registers.
#pragma once
#include "../common/tile.h"
#include "pack.h"

namespace vosops::VOSOPS_ISA {

// Scores of query block `block` against `panel`, prior included.
template <bool Pairs = false>
inline __attribute__((always_inline)) void score_tile(const Problem& p, const PackedQueries& packed,
                                                      int64_t batch, int64_t block, const Panel& panel,
                                                      Tile& s) {
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVecs; ++v) s[r][v] = Vec{};
  const float* a = packed.data + (batch * packed.blocks + block) * int64_t(packed.depth) * kRows;
  multiply<Pairs>(a, 1, kRows, panel.data.data(), packed.depth, s);
  const float factor = Pairs ? (p.l2 ? 2 * p.scale : p.scale) : 1;
  for (int v = 0; v < kVecs; ++v) {
    const Vec bias = load(panel.bias + v * kLanes);
    for (int r = 0; r < kRows; ++r) s[r][v] = Pairs ? s[r][v] * factor + bias : s[r][v] + bias;
  }
  if (p.precision) {
    const BlockCells cells(p, block);
    for (int v = 0; v < kVecs; ++v) {
      const Vec y = load(panel.row + v * kLanes), x = load(panel.column + v * kLanes);
      const Vec precision = load(panel.precision + v * kLanes);
      for (int r = 0; r < kRows; ++r) {
        const Vec dy = y - cells.row[r], dx = x - cells.column[r];
        s[r][v] -= precision * (dy * dy + dx * dx);
      }
    }
  }
}

// An upper bound of every score that a block of queries can have with a panel, from |<a, b>| <= |a| |b|
// and the distance between the block's cells and the panel's centres. Lets a narrow prior skip tiles.
struct PanelBound {
  float norm = 0, bias = -kInf, precision = kInf;
  float row_low = kInf, row_high = -kInf, column_low = kInf, column_high = -kInf;

  PanelBound() = default;
  PanelBound(const Panel& panel, const PackedQueries& packed) {
    Vec square[kVecs] = {};
    for (int c = 0; c < packed.depth; ++c)
      for (int v = 0; v < kVecs; ++v) {
        const Vec b = load(panel.data.data() + c * kCols + v * kLanes);
        square[v] += b * b;
      }
    for (int v = 0; v < kVecs; ++v)
      for (int l = 0; l < kLanes; ++l)
        norm = square[v][l] > norm || square[v][l] != square[v][l] ? square[v][l] : norm;
    norm = std::sqrt(norm);
    for (int j = 0; j < panel.count; ++j) {
      bias = std::fmax(bias, panel.bias[j]);
      precision = std::fmin(precision, panel.precision[j]);
      row_low = std::fmin(row_low, panel.row[j]);
      row_high = std::fmax(row_high, panel.row[j]);
      column_low = std::fmin(column_low, panel.column[j]);
      column_high = std::fmax(column_high, panel.column[j]);
    }
  }

  // Strictly below `threshold` with a margin for rounding; false if anything is NaN.
  bool below(float threshold, const BlockCells& cells, float query_norm) const {
    float y0 = cells.row[0], y1 = y0, x0 = cells.column[0], x1 = x0;
    for (int r = 1; r < kRows; ++r) {
      y0 = std::fmin(y0, cells.row[r]), y1 = std::fmax(y1, cells.row[r]);
      x0 = std::fmin(x0, cells.column[r]), x1 = std::fmax(x1, cells.column[r]);
    }
    const float dy = std::fmax(0.f, std::fmax(row_low - y1, y0 - row_high));
    const float dx = std::fmax(0.f, std::fmax(column_low - x1, x0 - column_high));
    const float dot = query_norm * norm;
    const float bound = dot + bias - precision * (dy * dy + dx * dx);
    return bound + 1e-4f * (dot + std::fabs(bias) + 1) < threshold;
  }
};

}  // namespace vosops::VOSOPS_ISA
