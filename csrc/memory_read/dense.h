// SPDX-License-Identifier: Apache-2.0
// Passes over all scores: the dense read (online softmax), its usage counts, and the argmax over queries.
#pragma once

#include "score.h"

namespace vosops::VOSOPS_ISA {

constexpr int kTile = 128;  // memory positions whose weights are held at a time
static_assert(kTile % kCols == 0, "a tile is made of whole panels");

// Values of positions [m0, m0 + count) and channels [c0, c0 + channels) of an object as [kTile][kCols].
inline void pack_values(const Problem& p, const Values& values, int64_t batch, int64_t object, int64_t c0,
                        int channels, int64_t m0, int count, float* out) {
  int64_t where[kTile];
  const bool consecutive = offsets_of(values.value.positions, m0, count, where);
  if (channels < kCols || count < kTile) fill(out, kTile * kCols, 0.f);
  for (int i = 0; i < count; ++i) where[i] += c0 * values.value.channel_stride;
  load_position_major(values.value, base_of(values.value, batch, object), channels, where, count, consecutive,
                      out, kCols);
  if (!p.mask) return;
  const uint8_t* mask = static_cast<const uint8_t*>(p.mask.data) + batch * p.mask.batch_stride;
  for (int i = 0; i < count; ++i)
    if (!mask[offset(p.mask.positions, m0 + i)]) fill(out + i * kCols, kCols, 0.f);
}

// Turns a row of scores into weights exp(s - top); returns exp(old top - new top).
inline float weigh(float* s, int count, float& top, float& total) {
  Vec best = set1(-kInf);
  for (int i = 0; i < count; i += kLanes) best = vmax(load(s + i), best);
  const float new_top = std::fmax(top, reduce_max(best));
  const float shift = new_top == -kInf ? 0 : new_top;  // a row without any match yet: exp(-inf) = 0
  const float factor = top == new_top ? 1 : std::exp(top - shift);
  Vec sum = {};
  for (int i = 0; i < count; i += kLanes) {
    const Vec w = exp(load(s + i) - shift);
    store(s + i, w);
    sum += w;
  }
  total = total * factor + reduce_add(sum);
  top = new_top;
  return factor;
}

inline void dense(const Problem& p, const PackedQueries& packed, const Values& values, int64_t batch,
                  int64_t b0, int64_t b1, float* read, float* lse) {
  const int64_t rows = (b1 - b0) * kRows;
  const int64_t panels_each = (values.channels + kCols - 1) / kCols, panels = values.objects * panels_each;
  Buffer<float> acc(panels * rows * kCols, 0.f), weights(rows * kTile), block_values(kTile * kCols);
  Buffer<float> top(rows, -kInf), total(rows, 0.f);
  Panel panel(packed);
  for (int64_t m = 0; m < p.memory; m += kTile) {
    const int count = int(least<int64_t>(kTile, p.memory - m));
    const int depth = (count + kCols - 1) / kCols * kCols;
    for (int sub = 0; sub < depth; sub += kCols) {
      panel.pack(p, batch, m + sub, p.memory);
      for (int64_t block = b0; block < b1; ++block) {
        Tile s;
        score_tile(p, packed, batch, block, panel, s);
        float* to = &weights[(block - b0) * kRows * kTile + sub];
        for (int r = 0; r < kRows; ++r)
          for (int v = 0; v < kVecs; ++v) store(to + r * kTile + v * kLanes, s[r][v]);
      }
    }
    for (int64_t row = 0; row < rows; ++row) {
      const float factor = weigh(&weights[row * kTile], depth, top[row], total[row]);
      if (factor == 1) continue;
      for (int64_t i = 0; i < panels; ++i) {
        float* at = &acc[(i * rows + row) * kCols];
        for (int v = 0; v < kVecs; ++v) store(at + v * kLanes, load(at + v * kLanes) * factor);
      }
    }
    for (int64_t i = 0; i < panels; ++i) {
      const int64_t object = i / panels_each, c0 = i % panels_each * kCols;
      pack_values(p, values, batch, object, c0, int(least<int64_t>(kCols, values.channels - c0)), m, count,
                  block_values.data());
      for (int64_t block = 0; block < b1 - b0; ++block) {
        float* at = &acc[(i * rows + block * kRows) * kCols];
        Tile sum;
        for (int r = 0; r < kRows; ++r)
          for (int v = 0; v < kVecs; ++v) sum[r][v] = load(at + r * kCols + v * kLanes);
        multiply(&weights[block * kRows * kTile], kTile, 1, block_values.data(), depth, sum);
        for (int r = 0; r < kRows; ++r)
          for (int v = 0; v < kVecs; ++v) store(at + r * kCols + v * kLanes, sum[r][v]);
      }
    }
  }
  const int64_t q0 = b0 * kRows, real = least<int64_t>(rows, p.queries - q0);
  for (int64_t row = 0; row < real; ++row) {
    lse[batch * p.queries + q0 + row] = total[row] == 0 ? kInf : top[row] + std::log(total[row]);
    const float inverse = total[row] == 0 ? 0 : 1 / total[row];
    for (int64_t i = 0; i < panels; ++i) {
      float* at = &acc[(i * rows + row) * kCols];
      for (int v = 0; v < kVecs; ++v) store(at + v * kLanes, load(at + v * kLanes) * inverse);
    }
  }
  for (int64_t i = 0; i < panels; ++i) {
    const int64_t object = i / panels_each, c0 = i % panels_each * kCols;
    const int64_t channel = (batch * values.objects + object) * values.channels + c0;
    transpose(&acc[i * rows * kCols], kCols, int(real), int(least<int64_t>(kCols, values.channels - c0)),
              read + channel * p.queries + q0, p.queries);
  }
}

inline void usage(const Problem& p, const PackedQueries& packed, int64_t batch, int64_t m0, int64_t m1,
                  const float* lse, float* usage) {
  Panel panel(packed);
  for (int64_t m = m0; m < m1; m += kCols) {
    panel.pack(p, batch, m, m1);
    Vec sum[kVecs] = {};
    for (int64_t block = 0; block < packed.blocks; ++block) {
      Tile s;
      score_tile(p, packed, batch, block, panel, s);
      for (int r = 0; r < kRows && block * kRows + r < p.queries; ++r) {
        const float norm = lse[batch * p.queries + block * kRows + r];
        for (int v = 0; v < kVecs; ++v) sum[v] += exp(s[r][v] - norm);
      }
    }
    float all[kCols];
    for (int v = 0; v < kVecs; ++v) store(all + v * kLanes, sum[v]);
    std::memcpy(usage + batch * p.memory + m, all, sizeof(float) * panel.count);
  }
}

inline void best_query(const Problem& p, const PackedQueries& packed, int64_t batch, int64_t m0, int64_t m1,
                       int64_t* best) {
  Panel panel(packed);
  const int64_t reach = p.window / 2, width = p.grid_width, height = p.queries / width;
  for (int64_t m = m0; m < m1; m += kCols) {
    panel.pack(p, batch, m, m1);
    int64_t b0 = 0, b1 = packed.blocks;
    float row[kCols] = {}, column[kCols] = {};  // own cells
    if (p.window) {
      int64_t low = height, high = 0;
      for (int j = 0; j < panel.count; ++j) {
        const int64_t cell = (m + j) % p.queries;
        row[j] = float(cell / width);
        column[j] = float(cell % width);
        low = least(low, cell / width);
        high = most(high, cell / width);
      }
      b0 = most<int64_t>(0, low - reach) * width / kRows;
      b1 = (least(height, high + reach + 1) * width + kRows - 1) / kRows;
    }
    Vec top[kVecs];
    VecI at[kVecs] = {};
    for (int v = 0; v < kVecs; ++v) top[v] = set1(-kInf);
    for (int64_t block = b0; block < b1; ++block) {
      Tile s;
      score_tile(p, packed, batch, block, panel, s);
      const BlockCells cells(p, block);
      for (int r = 0; r < kRows && block * kRows + r < p.queries; ++r) {
        const VecI index = VecI{} + int32_t(block * kRows + r);
        for (int v = 0; v < kVecs; ++v) {
          VecI better = s[r][v] > top[v];
          if (p.window) {
            const Vec dy = load(row + v * kLanes) - cells.row[r],
                      dx = load(column + v * kLanes) - cells.column[r];
            const float far = float(reach);
            better = better & (dy <= far) & (dy >= -far) & (dx <= far) & (dx >= -far);
          }
          top[v] = better ? s[r][v] : top[v];
          at[v] = better ? index : at[v];
        }
      }
    }
    for (int j = 0; j < panel.count; ++j) best[batch * p.memory + m + j] = at[j / kLanes][j % kLanes];
  }
}

}  // namespace vosops::VOSOPS_ISA
