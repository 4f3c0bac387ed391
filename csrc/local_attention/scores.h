// SPDX-License-Identifier: Apache-2.0
// A tile of queries: up to kRows above one another times a strip beside one another. Its scores are
// [column][query][slot][window_row]: slot j of query r is the key row dy = j - r of its window, so that the
// queries of a column meet the same keys in the same slots.
#pragma once
#include "pack.h"
#include "tile.h"

namespace vosops::VOSOPS_ISA {

constexpr float kLowest = -__builtin_inff();
constexpr int kDepth = 32;  // channels at a time, so that a tile's keys stay in the first cache

inline int64_t blocks_of(const Plane& plane) { return (plane.rows + kRows - 1) / kRows; }

struct LocalTile {
  Plane plane;
  int64_t y, x;  // first query
  int rows, columns;
  int low, high;      // slots inside the frame
  int64_t row, cell;  // floats between queries and columns of the scores
  const LocalLayout* l;

  LocalTile(const LocalLayout& l, const Plane& plane, int64_t block, int64_t strip)
      : plane(plane), row(int64_t(l.slots) * l.window_row), cell(kRows * row), l(&l) {
    // Even shares: a last tile of one query would waste the registers.
    const int64_t blocks = blocks_of(plane);
    rows = columns = 0;
    y = x = low = high = 0;
    if (block >= blocks) return;
    y = block * plane.rows / blocks;
    rows = int((block + 1) * plane.rows / blocks - y);
    x = strip * plane.columns / l.strips;
    columns = int((strip + 1) * plane.columns / l.strips - x);
    low = int(most<int64_t>(0, l.reach - y));
    high = int(least<int64_t>(rows + 2 * l.reach, plane.rows + l.reach - y));
  }
  explicit operator bool() const { return rows > 0 && columns > 0; }
  // Offsets dx of column `at` that are inside the frame: [first_dx, last_dx).
  int first_dx(int at) const { return int(most<int64_t>(0, l->reach - x - at)); }
  int last_dx(int at) const {
    return int(least<int64_t>(2 * l->reach + 1, plane.columns + l->reach - x - at));
  }
};

// Queries as [column][channel][kRows].
inline void pack_queries(const Map& map, const LocalProblem& p, const LocalTile& t, int channels, float* a) {
  Buffer<float> block(int64_t(channels) * kStripLength);
  for (int r = 0; r < t.rows; ++r) {
    Run(map, p, t.plane, t.plane.head * channels, t.y + r, t.x, t.columns)
        .channel_major(channels, block.data(), kStripLength);
    for (int c = 0; c < channels; ++c)
      for (int x = 0; x < t.columns; ++x)
        a[(int64_t(x) * channels + c) * kRows + r] = block[c * kStripLength + x];
  }
}

// s = <a, rows of the keys> + <a, table>; slots outside the frame are left alone.
inline void score(const LocalTile& t, const float* a, int channels, const float* rows, const float* table,
                  float* s) {
  const LocalLayout& l = *t.l;
  const int per_row = l.window_row / kLanes, window = l.window();
  const auto run = [&](int first, int count, int vecs, const float* const* b, int64_t b_x, int64_t step,
                       int c0, float* to, int64_t row, bool add) {
    const int depth = least(kDepth, channels - c0);
    const auto tile = score_tile_of(count, vecs);
    for (int x = 0; x < t.columns; ++x)
      tile(a + (int64_t(x) * channels + c0) * kRows + first, b, x * b_x, step, depth, to + x * t.cell, row,
           add);
  };
  const float* b[kVecs];
  for (int c0 = 0; c0 < channels; c0 += kDepth)
    for (int u = t.low * per_row; u < t.high * per_row; u += kVecs) {
      const int vecs = least(kVecs, t.high * per_row - u), last = (u + vecs - 1) / per_row;
      for (int v = 0; v < vecs; ++v) {
        const int64_t key_row = t.y - l.reach + (u + v) / per_row;
        b[v] = rows + (key_row * channels + c0) * l.border_row + t.x + (u + v) % per_row * kLanes;
      }
      const int first = most(0, u / per_row - window + 1), count = least(t.rows - 1, last) - first + 1;
      run(first, count, vecs, b, 1, l.border_row, c0, s + first * t.row + int64_t(u) * kLanes, t.row, c0 > 0);
    }
  if (!table) return;
  for (int c0 = 0; c0 < channels; c0 += kDepth)
    for (int u = 0; u < window * per_row; u += kVecs) {
      const int vecs = least(kVecs, window * per_row - u);
      for (int v = 0; v < vecs; ++v)
        b[v] =
            table + (int64_t((u + v) / per_row) * channels + c0) * l.window_row + (u + v) % per_row * kLanes;
      run(0, t.rows, vecs, b, 0, l.window_row, c0, s + int64_t(u) * kLanes, t.row + l.window_row, true);
    }
}

// Adds relative_bias [.., offset, y, x] of the tile's queries.
inline void add_bias(const LocalProblem& p, const LocalTile& t, float* s) {
  const LocalLayout& l = *t.l;
  Buffer<float> block(int64_t(kStripLength) * l.window_row, 0.f);
  Map bias = p.bias;
  bias.data = static_cast<const char*>(bias.data) +
              t.plane.head * p.bias_head_stride * (bias.dtype == DType::kFloat ? 4 : 2);
  for (int r = 0; r < t.rows; ++r)
    for (int dy = 0; dy < p.window; ++dy) {
      if (r + dy < t.low || r + dy >= t.high) continue;
      Run(bias, p, t.plane, dy * p.window, t.y + r, t.x, t.columns)
          .position_major(p.window, block.data(), l.window_row);
      for (int x = 0; x < t.columns; ++x) {
        float* to = s + x * t.cell + r * t.row + int64_t(r + dy) * l.window_row;
        for (int i = 0; i < l.window_row; i += kLanes)
          store(to + i, load(to + i) + load(&block[int64_t(x) * l.window_row + i]));
      }
    }
}

inline float tree_add(Vec v) {
  float all[kLanes];
  store(all, v);
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) all[i] += all[i + half];
  return all[0];
}
inline float tree_max(Vec v) {
  float all[kLanes];
  store(all, v);
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) all[i] = all[i] > all[i + half] ? all[i] : all[i + half];
  return all[0];
}

// All ones in the lanes of offsets [first, last), of the vector that begins at offset `at`.
inline VecI lanes_inside(int at, int first, int last) {
  VecI lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  lane += at;
  return (lane >= first) & (lane < last);
}

// Calls f(address, offset of the first lane in [dy][window_row], lanes inside the frame) for every vector of
// a query's window inside the frame.
template <class F>
inline void for_window(const LocalTile& t, float* s, int x, int r, const F& f) {
  const LocalLayout& l = *t.l;
  const int first = t.first_dx(x), last = t.last_dx(x), end = least(t.high, r + l.window());
  float* own = s + x * t.cell + r * t.row;
  for (int i = 0; i < l.window_row; i += kLanes) {
    const VecI inside = lanes_inside(i, first, last);
    for (int j = most(t.low, r); j < end; ++j)
      f(own + int64_t(j) * l.window_row + i, int64_t(j - r) * l.window_row + i, inside);
  }
}

// The window's rows above and below the frame get the weight 0.
inline void clear_outside(const LocalTile& t, float* s, int x, int r) {
  const LocalLayout& l = *t.l;
  float* own = s + x * t.cell + r * t.row;
  const int end = r + l.window();
  for (int j = r; j < t.low; ++j) fill(own + int64_t(j) * l.window_row, l.window_row, 0.f);
  for (int j = t.high; j < end; ++j) fill(own + int64_t(j) * l.window_row, l.window_row, 0.f);
}

// Writes one chunk of one query row, [column][width], to a contiguous [batch][head * channel][row][column].
inline void write_cells(const LocalProblem& p, const Plane& plane, int channels, int chunk, int width,
                        const float* from, int64_t y, int64_t x, int count, float* out) {
  float block[kCols * 16];
  const int real = least(width, channels - chunk * width);
  const int64_t area = p.height * p.width;
  float* to = out + ((plane.batch * p.heads + plane.head) * channels + int64_t(chunk) * width) * area +
              (plane.first_row + y * p.dilation) * p.width + plane.first_column;
  for (int done = 0; done < count; done += 16) {
    const int part = least(16, count - done);
    transpose(from + int64_t(done) * width, width, 16, width, block, 16);
    for (int c = 0; c < real; ++c) {
      float* at = to + c * area + (x + done) * p.dilation;
      if (p.dilation == 1)
        std::memcpy(at, block + c * 16, sizeof(float) * part);
      else
        for (int i = 0; i < part; ++i) at[i * p.dilation] = block[c * 16 + i];
    }
  }
}

}  // namespace vosops::VOSOPS_ISA
