// SPDX-License-Identifier: Apache-2.0
// Dense attention with queries as columns. A head has few channels (32 in AOT), fewer than a vector tile has
// columns, so the tile's columns are queries in both products: S' = K' Q', then O' += V'' P', with the
// channels of the values as rows. The online softmax runs down the columns, a query in each lane.
#pragma once
#include <cmath>
#include <limits>

#include "../common/buffer.h"
#include "../common/load.h"
#include "../common/tile.h"
#include "../memory_read/problem.h"
#include "problem.h"

namespace vosops::VOSOPS_ISA {

constexpr int kPositions = 10 * kRows;  // memory positions of a tile: whole row groups
constexpr int kValueStrip = 48;         // value channels packed side by side, whole vectors of every kind
static_assert(kPositions <= kMaxRun && kRows == 6);

// The scores are kept in units of log 2: 2^x is cheaper than e^x.
constexpr float kLog2E = 1.44269504f, kLn2 = 0.693147181f;

// One tile of the memory, packed: keys [position][channel], values as strips [position][strip's channels].
struct MemoryTile {
  Buffer<float> keys, values, scratch;
  float bias[kPositions];
  int rows = 0;  // positions, up to a whole row group; the bias of those past the memory is -inf

  MemoryTile(const Problem& p, const Banks& banks)
      : keys(kPositions * p.channels),
        values(kPositions * banks.channels),
        scratch(kPositions * kValueStrip) {}

  void load_keys(const Problem& p, int64_t batch, int64_t first, int count) {
    rows = (count + kRows - 1) / kRows * kRows;
    const int channels = p.channels;
    int64_t where[kPositions];
    const bool consecutive = offsets_of(p.key.positions, first, count, where);
    load_position_major(p.key, base_of(p.key, batch), channels, where, count, consecutive, keys.data(),
                        channels);
    fill(&keys[count * channels], int64_t(rows - count) * channels, 0.f);
    for (int j = 0; j < rows; ++j) bias[j] = j < count ? 0 : -std::numeric_limits<float>::infinity();
    for (int j = 0; j < count; ++j) {
      float* key = &keys[j * channels];
      if (p.gate) {
        const float g = load_one(p.gate, base_of(p.gate, batch), offset(p.gate.positions, first + j));
        for (int c = 0; c < channels; ++c) key[c] *= g;
      }
      if (!p.l2) continue;
      float square = 0;
      for (int c = 0; c < channels; ++c) square += key[c] * key[c];
      bias[j] = -p.norm_scale * kLog2E * square;
    }
  }

  void load_values(const Banks& banks, int64_t batch, int64_t first, int count) {
    float* to = values.data();
    for (int b = 0; b < banks.count; ++b) {
      const Bank& bank = banks.bank[b];
      for (int64_t c = 0; c < bank.channels; c += kValueStrip) {
        const int width = int(least<int64_t>(kValueStrip, bank.channels - c));
        load_strip(bank.value, batch, first, count, c, width, to);
        if (bank.identity) {
          load_strip(bank.identity, batch, first, count, c, width, scratch.data());
          for (int i = 0; i < count * width; ++i) to[i] += scratch[i];
        }
        fill(to + count * width, int64_t(rows - count) * width, 0.f);
        to += kPositions * width;
      }
    }
  }

 private:
  static void load_strip(const Operand& x, int64_t batch, int64_t first, int count, int64_t channel,
                         int width, float* out) {
    int64_t where[kPositions];
    const bool consecutive = offsets_of(x.positions, first, count, where);
    for (int j = 0; j < count; ++j) where[j] += channel * x.channel_stride;
    load_position_major(x, base_of(x, batch), width, where, count, consecutive, out, width);
  }
};

// Scores of a tile against one panel of queries become weights 2^(s - top); `factor` is what the sums so far
// have to be multiplied by. Returns whether any factor is not 1.
inline bool weigh_tile(const MemoryTile& tile, const float* queries, int channels, float* weights, float* top,
                       float* total, Vec (&factor)[kVecs]) {
  Vec best[kVecs];
  for (int v = 0; v < kVecs; ++v) best[v] = load(top + v * kLanes);
  for (int row = 0; row < tile.rows; row += kRows) {
    Tile s;
    for (int r = 0; r < kRows; ++r)
      for (int v = 0; v < kVecs; ++v) s[r][v] = set1(tile.bias[row + r]);
    multiply(&tile.keys[int64_t(row) * channels], channels, 1, queries, channels, s);
    for (int r = 0; r < kRows; ++r)
      for (int v = 0; v < kVecs; ++v) {
        store(weights + (row + r) * kCols + v * kLanes, s[r][v]);
        best[v] = vmax(s[r][v], best[v]);
      }
  }
  Vec shift[kVecs], sum[kVecs] = {};
  uint32_t changed = 0;
  for (int v = 0; v < kVecs; ++v) {
    const Vec infinity = set1(std::numeric_limits<float>::infinity()), old = load(top + v * kLanes);
    shift[v] = best[v] == -infinity ? Vec{} : best[v];  // nothing matched yet: 2^-inf = 0
    factor[v] = exp2(old - shift[v]);
    changed |= not_below(best[v], old);
    store(top + v * kLanes, best[v]);
  }
  for (int row = 0; row < tile.rows; ++row)
    for (int v = 0; v < kVecs; ++v) {
      float* at = weights + row * kCols + v * kLanes;
      const Vec w = exp2(load(at) - shift[v]);
      store(at, w);
      sum[v] += w;
    }
  for (int v = 0; v < kVecs; ++v) {
    float* at = total + v * kLanes;
    store(at, (changed ? load(at) * factor[v] : load(at)) + sum[v]);
  }
  return changed != 0;
}

// Rows channels of a strip: to[channel][kCols] = to factor + values' weights.
template <int Rows>
inline void add_channels(const float* values, int width, const float* weights, int positions, bool changed,
                         const Vec (&factor)[kVecs], float* to) {
  Vec sum[Rows][kVecs];
  for (int r = 0; r < Rows; ++r)
    for (int v = 0; v < kVecs; ++v) {
      sum[r][v] = load(to + r * kCols + v * kLanes);
      if (changed) sum[r][v] *= factor[v];
    }
  multiply(values, 1, width, weights, positions, sum);
  for (int r = 0; r < Rows; ++r)
    for (int v = 0; v < kVecs; ++v) store(to + r * kCols + v * kLanes, sum[r][v]);
}

inline void add_values(const MemoryTile& tile, const Banks& banks, const float* weights, bool changed,
                       const Vec (&factor)[kVecs], float* acc) {
  const float* from = tile.values.data();
  for (int b = 0; b < banks.count; ++b)
    for (int64_t c = 0; c < banks.bank[b].channels; c += kValueStrip) {
      const int width = int(least<int64_t>(kValueStrip, banks.bank[b].channels - c));
      for (int at = 0; at < width; at += kRows)
        with_rows(least(kRows, width - at), [&](auto rows) {
          add_channels<decltype(rows)::kCount>(from + at, width, weights, tile.rows, changed, factor,
                                               acc + at * kCols);
        });
      from += kPositions * width;
      acc += width * kCols;
    }
}

// Query panels [first, last) of kCols queries of one batch entry (a head): read [Q][columns] of the tensor's
// batch entry, and the log-sum-exp [Q].
inline void attention(const Problem& p, const Banks& banks, int64_t batch, int64_t first, int64_t last,
                      float* read, float* lse) {
  const int64_t panels = last - first, width = banks.channels;
  const int channels = p.channels;
  const float infinity = std::numeric_limits<float>::infinity();
  Buffer<float> queries(panels * channels * kCols, 0.f), weights(kPositions * kCols);
  Buffer<float> acc(panels * width * kCols, 0.f), top(panels * kCols, -infinity), total(panels * kCols, 0.f);
  const float scale = (p.l2 ? 2 * p.scale : p.scale) * kLog2E;
  for (int64_t i = 0; i < panels; ++i) {
    const int64_t q = (first + i) * kCols;
    int64_t where[kCols];
    const int count = int(least<int64_t>(kCols, p.queries - q));
    const bool consecutive = offsets_of(p.query.positions, q, count, where);
    float* to = &queries[i * channels * kCols];
    load_channel_major(p.query, base_of(p.query, batch), channels, where, count, consecutive, to, kCols);
    for (int64_t c = 0; c < int64_t(channels) * kCols; ++c) to[c] *= scale;
  }
  MemoryTile tile(p, banks);
  for (int64_t m = 0; m < p.memory; m += kPositions) {
    const int count = int(least<int64_t>(kPositions, p.memory - m));
    tile.load_keys(p, batch, m, count);
    tile.load_values(banks, batch, m, count);
    for (int64_t i = 0; i < panels; ++i) {
      Vec factor[kVecs];
      const bool changed = weigh_tile(tile, &queries[i * channels * kCols], channels, weights.data(),
                                      &top[i * kCols], &total[i * kCols], factor);
      add_values(tile, banks, weights.data(), changed, factor, &acc[i * width * kCols]);
    }
  }
  const int64_t head = batch % banks.heads;
  float* out = read + batch / banks.heads * p.queries * banks.columns;
  for (int64_t i = 0; i < panels; ++i) {
    const int64_t q = (first + i) * kCols;
    const int count = int(least<int64_t>(kCols, p.queries - q));
    float inverse[kCols];
    for (int j = 0; j < kCols; ++j) {
      const float sum = total[i * kCols + j];
      inverse[j] = sum == 0 ? 0 : 1 / sum;
      if (j < count)
        lse[batch * p.queries + q + j] = sum == 0 ? infinity : top[i * kCols + j] * kLn2 + std::log(sum);
    }
    float* from = &acc[i * width * kCols];
    for (int64_t c = 0; c < width; ++c)
      for (int v = 0; v < kVecs; ++v) {
        float* at = from + c * kCols + v * kLanes;
        store(at, load(at) * load(inverse + v * kLanes));
      }
    for (int b = 0; b < banks.count; ++b) {
      const Bank& bank = banks.bank[b];
      transpose(from, kCols, int(bank.channels), count,
                out + q * banks.columns + bank.column + head * bank.channels, banks.columns);
      from += bank.channels * kCols;
    }
  }
}

}  // namespace vosops::VOSOPS_ISA
