// SPDX-License-Identifier: Apache-2.0
// The three register tiles of local attention. Rows are up to kRows queries, one above the other; their
// windows overlap in all but a few rows, so that a vector of keys or values is loaded once for all of them.
#pragma once
#include "../common/buffer.h"
#include "../common/load.h"

namespace vosops::VOSOPS_ISA {

// s[r][v] = (add ? s[r][v] : 0) + sum_c a[c][r] b[v][c]: V vectors of offsets.
template <int R, int V>
inline void score_tile(const float* __restrict a, const float* const* starts, int64_t at, int64_t step,
                       int depth, float* __restrict s, int64_t row, bool add) {
  const float* b[V];
  for (int v = 0; v < V; ++v) b[v] = starts[v] + at;
  Vec sum[R][V];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) sum[r][v] = add ? load(s + r * row + v * kLanes) : Vec{};
  for (int c = 0; c < depth; ++c) {
    Vec column[V];
    for (int v = 0; v < V; ++v) column[v] = load(b[v] + c * step);
    for (int r = 0; r < R; ++r) {
      const Vec x = set1(a[c * kRows + r]);
      for (int v = 0; v < V; ++v) sum[r][v] += x * column[v];
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) store(s + r * row + v * kLanes, sum[r][v]);
}

// acc[r] += sum_jd a[r][j][d] b[j][d]: V vectors of channels, `depth` neighbours in each of `count` rows.
template <int R, int V>
inline void read_tile(const float* __restrict a, int64_t row, int count, int64_t a_step,
                      const float* __restrict b, int64_t b_step, int depth, float* __restrict acc,
                      int64_t acc_row) {
  Vec sum[R][V];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) sum[r][v] = load(acc + r * acc_row + v * kLanes);
  for (int j = 0; j < count; ++j)
    for (int d = 0; d < depth; ++d) {
      Vec cell[V];
      for (int v = 0; v < V; ++v) cell[v] = load(b + j * b_step + (d * V + v) * kLanes);
      for (int r = 0; r < R; ++r) {
        const Vec x = set1(a[r * row + j * a_step + d]);
        for (int v = 0; v < V; ++v) sum[r][v] += x * cell[v];
      }
    }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) store(acc + r * acc_row + v * kLanes, sum[r][v]);
}

// The transpose of read_tile: b[j][d] += sum_r a[r][j][d] g[r].
template <int R, int V>
inline void scatter_tile(const float* __restrict a, int64_t row, int count, int64_t a_step,
                         const float* __restrict g, int64_t g_row, float* __restrict b, int64_t b_step,
                         int depth) {
  Vec rows[R][V];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) rows[r][v] = load(g + r * g_row + v * kLanes);
  for (int j = 0; j < count; ++j)
    for (int d = 0; d < depth; ++d) {
      float* to = b + j * b_step + d * V * kLanes;
      Vec sum[V];
      for (int v = 0; v < V; ++v) sum[v] = load(to + v * kLanes);
      for (int r = 0; r < R; ++r) {
        const Vec x = set1(a[r * row + j * a_step + d]);
        for (int v = 0; v < V; ++v) sum[v] += x * rows[r][v];
      }
      for (int v = 0; v < V; ++v) store(to + v * kLanes, sum[v]);
    }
}

template <int V>
constexpr decltype(&score_tile<1, V>) kScoreTiles[kRows] = {score_tile<1, V>, score_tile<2, V>,
                                                            score_tile<3, V>, score_tile<4, V>,
                                                            score_tile<5, V>, score_tile<6, V>};
template <int V>
constexpr decltype(&read_tile<1, V>) kReadTiles[kRows] = {read_tile<1, V>, read_tile<2, V>, read_tile<3, V>,
                                                          read_tile<4, V>, read_tile<5, V>, read_tile<6, V>};
template <int V>
constexpr decltype(&scatter_tile<1, V>) kScatterTiles[kRows] = {scatter_tile<1, V>, scatter_tile<2, V>,
                                                                scatter_tile<3, V>, scatter_tile<4, V>,
                                                                scatter_tile<5, V>, scatter_tile<6, V>};

template <int N>
struct Vecs {
  static constexpr int value = N;
};

// Calls f(Vecs<vecs>) for 1 <= vecs <= kVecs.
template <class F>
inline auto with_vecs(int vecs, const F& f) {
  if constexpr (kVecs > 2) {
    if (vecs == 4) return f(Vecs<4>{});
    if (vecs == 3) return f(Vecs<3>{});
  }
  if (vecs == 2) return f(Vecs<2>{});
  return f(Vecs<1>{});
}

inline auto score_tile_of(int rows, int vecs) {
  return with_vecs(vecs, [&](auto v) { return kScoreTiles<v.value>[rows - 1]; });
}
inline auto read_tile_of(int rows, int vecs) {
  return with_vecs(vecs, [&](auto v) { return kReadTiles<v.value>[rows - 1]; });
}
inline auto scatter_tile_of(int rows, int vecs) {
  return with_vecs(vecs, [&](auto v) { return kScatterTiles<v.value>[rows - 1]; });
}

// Slot j, a key row of a tile, belongs to the queries j - window < r <= j. Calls f(first query, queries,
// first slot, last slot) for runs of the slots [low, high) that belong to the same queries: no value is
// multiplied by the weight of a query whose window it is not in, so that NaN stays where it is.
template <class F>
inline void for_runs(int rows, int window, int low, int high, const F& f) {
  for (int j = low; j < high;) {
    const int first = most(0, j - window + 1), last = least(rows - 1, j);
    int end = j + 1;
    while (end < high && most(0, end - window + 1) == first && least(rows - 1, end) == last) ++end;
    if (first <= last) f(first, last - first + 1, j, end);
    j = end;
  }
}

}  // namespace vosops::VOSOPS_ISA
