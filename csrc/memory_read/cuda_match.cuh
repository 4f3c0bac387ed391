// SPDX-License-Identifier: Apache-2.0
// Top-k of the scores in one pass. A block walks its share of the memory tile by tile; each warp owns 16
// queries and keeps, per query, the scores that beat the running k-th best in a small list, which it cuts
// back to k when it is full: about k ln(M / k) scores of a query ever get there. A second kernel merges the
// shares.
#pragma once
#include "cuda_lists.cuh"
#include "cuda_product.cuh"
#include "cuda_tile.cuh"

namespace vosops::gpu {

// The score of one pair in float32, for keys that the split of k^2 cannot hold. Selection only.
VOSOPS_DEVICE float score_alone(const Match& p, int64_t batch, int query, int position, float row,
                                float column) {
  const int64_t q = batch * p.query.batch_stride + offset_of(p.query.positions, query);
  const int64_t e = batch * p.selection.batch_stride + offset_of(p.selection.positions, query);
  const int64_t k = batch * p.key.batch_stride + offset_of(p.key.positions, position);
  float sum = 0, constant = 0;
  for (int64_t c = 0; c < p.channels; ++c) {
    const float x = element(p.query.data, p.query.dtype, q + c * p.query.channel_stride);
    const float s = element(p.selection.data, p.selection.dtype, e + c * p.selection.channel_stride);
    const float y = element(p.key.data, p.key.dtype, k + c * p.key.channel_stride);
    sum += 2 * s * x * y - s * (y * y);
    constant += s * x * x;
  }
  float factor = p.scale;
  if (p.shrinkage.data)
    factor *= element(p.shrinkage.data, p.shrinkage.dtype,
                      batch * p.shrinkage.batch_stride + offset_of(p.shrinkage.positions, position));
  float score = (sum - constant) * factor;
  if (p.precision) {
    const int64_t at = batch * p.memory + position;
    const float dy = row - p.centers[2 * at], dx = column - p.centers[2 * at + 1];
    score -= p.precision[at] * (dy * dy + dx * dx);
  }
  return score;
}

// Turns sums into scores, in place; see `store_columns` for the factors.
template <bool Selection>
VOSOPS_DEVICE void score(const Match& p, const Columns& columns, const float (&constant)[2],
                         const float (&row)[2], const float (&column)[2], float (&s)[32]) {
  const float twice = p.l2 ? 2.f : 1.f;
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const int c = j * 8 + lane() % 4 * 2;
    const float2 factor = *reinterpret_cast<const float2*>(columns.factor + c);
    const float2 bias = *reinterpret_cast<const float2*>(columns.bias + c);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float& a = s[j * 4 + half * 2];
      float& b = s[j * 4 + half * 2 + 1];
      if constexpr (Selection) {
        a = (a - constant[half]) * factor.x + bias.x;
        b = (b - constant[half]) * factor.y + bias.y;
      } else {
        a = (twice * a + bias.x) * factor.x;
        b = (twice * b + bias.y) * factor.y;
      }
    }
  }
  if (!p.precision) return;
#pragma unroll
  for (int j = 0; j < 8; ++j)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int c = j * 8 + lane() % 4 * 2 + i;
      const float precision = columns.precision[c], y = columns.row[c], x = columns.column[c];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float dy = row[half] - y, dx = column[half] - x;
        s[j * 4 + half * 2 + i] -= precision * (dy * dy + dx * dx);
      }
    }
}

// Scores of the wide columns of the tile that starts at `position`, which the split of k^2 cannot give.
VOSOPS_DEVICE void rescore(const Match& p, const Columns& columns, int batch, int query, int position,
                           const float (&row)[2], const float (&column)[2], float (&s)[32]) {
#pragma unroll 1
  for (int c = lane() % 4 * 2; c < kCols; c += c % 2 ? 7 : 1) {
    if (columns.state[c] != kWide) continue;
#pragma unroll 1
    for (int half = 0; half < 2; ++half) {
      if (query + half * 8 >= p.queries) continue;
      const float value = score_alone(p, batch, query + half * 8, position + c, half ? row[1] : row[0],
                                      half ? column[1] : column[0]);
#pragma unroll
      for (int i = 0; i < 32; ++i)
        if (i / 4 == c / 8 && i / 2 % 2 == half && i % 2 == c % 2) s[i] = value;
    }
  }
}

// A block: 64 queries (block_x) against one share of the memory (block_y) of one batch entry (block_z).
// Without `kept` it only raises `groups`, from every tile_stride-th tile.
template <class T, bool Selection, bool Group>
VOSOPS_DEVICE void match_block(const Match& p, uint8_t* memory) {
  const Shared shared(memory, Selection, p.channels, p.capacity);
  const int batch = block_z(), split = block_y(), first = block_x() * kRows;
  const int warp_first = first + warp() * 16, query = warp_first + lane() / 4;
  const bool sampling = p.kept == nullptr;
  if (thread_index() < kCols) shared.columns->wide[thread_index()] = -1;
  if (thread_index() == 0) shared.columns->wide_tile = -1;
  const int begin = split * p.split_tiles;
  const int end = begin + p.split_tiles < p.tiles ? begin + p.split_tiles : p.tiles;
  Ahead ahead;
  load_tile(p, batch, begin * p.tile_stride * kCols, ahead);
  pack_queries<T, Selection>(p, shared, batch, first);

  Lists lists;
  lists.entries = shared.entries + warp() * 16 * p.capacity;
  float row[2], column[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    lists.open[half] = query + half * 8 < p.queries;
    lists.count[half] = 0;
    lists.threshold[half] = -infinity();
    row[half] = float((query + half * 8) / p.grid_width);
    column[half] = float((query + half * 8) % p.grid_width);
  }
  Maxima maxima(p, shared.entries);
  if (sampling)
    maxima.clear();
  else if (p.groups)
    start_lists(p, lists, batch, warp_first);
#pragma unroll 1
  for (int step = begin; step < end; ++step) {
    const int tile = step * p.tile_stride;
    float s[32];
    sync_block();  // everyone has read the tile before
    store_tile<T, Selection>(p, shared, ahead, tile);
#if VOSOPS_WGMMA
    if constexpr (Group) publish_shared();
#endif
    sync_block();
#if VOSOPS_WGMMA
    if constexpr (Group) start_group<T, Selection>(p, shared, s);
#endif
    store_columns<T, Selection>(p, shared, ahead, tile);
    if (step + 1 < end) load_tile(p, batch, (tile + p.tile_stride) * kCols, ahead);
#if VOSOPS_WGMMA
    if constexpr (Group) await_group(s);
#endif
    if constexpr (!Group) multiply_sync<T, Selection>(p, shared, s);
    sync_block();  // the columns are written
    float constant[2] = {0, 0};
    if constexpr (Selection)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int at = warp() * 16 + lane() / 4 + half * 8;
        constant[half] = shared.columns->constant[0][at] + shared.columns->constant[1][at];
      }
    score<Selection>(p, *shared.columns, constant, row, column, s);
    if (sampling) {
      maxima.add(s);
      continue;
    }
    if constexpr (Selection && T::kHalf)
      if (shared.columns->wide_tile == tile)
        rescore(p, *shared.columns, batch, query, tile * kCols, row, column, s);
    keep(p, *shared.columns, lists, tile * kCols, s);
  }
  if (sampling) {
    maxima.publish(p, batch, warp_first);
    return;
  }
#pragma unroll 1
  for (int r = 0; r < 16; ++r) {
    const int n = shuffle(r / 8 ? lists.count[1] : lists.count[0], r % 8 * 4), at = warp_first + r;
    lists.cut(p, r, n);
    if (at >= p.queries) continue;
    const uint64_t* from = lists.row(p, r);
    uint64_t* to = p.kept + ((int64_t(batch) * p.queries + at) * p.splits + split) * p.k;
    for (int i = lane(); i < p.k; i += 32) to[i] = i < n ? from[i] : 0;
  }
}

}  // namespace vosops::gpu
