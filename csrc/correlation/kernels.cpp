// SPDX-License-Identifier: Apache-2.0
// Compiled once per instruction set; VOSOPS_ISA names it. The products are local attention's.
#include "../local_attention/forward.h"
#include "problem.h"

#define VOSOPS_TEXT2(x) #x
#define VOSOPS_TEXT(x) VOSOPS_TEXT2(x)

namespace vosops::VOSOPS_ISA {
namespace {

constexpr int kBlock = kStripLength;  // offsets transposed at a time

// Queries of a tile's row, counted from the tile's first, whose neighbour dx is inside the frame: [first,
// last).
struct Inside {
  int first, last;
  Inside(const LocalTile& t, int dx) {
    const int64_t shift = t.x + dx - t.l->reach;
    first = int(least<int64_t>(t.columns, most<int64_t>(0, -shift)));
    last = int(most<int64_t>(first, least<int64_t>(t.columns, t.plane.columns - shift)));
  }
};

// Address of offset (dy, dx) of the map at row y and column x of a plane.
template <class T>
T* offset_at(T* map, const LocalProblem& p, const Plane& plane, int dy, int dx, int64_t y, int64_t x) {
  const int64_t channel = plane.batch * p.window * p.window + int64_t(dy) * p.window + dx;
  return map + (channel * p.height + plane.first_row + y * p.dilation) * p.width + plane.first_column +
         x * p.dilation;
}

void write_offsets(const LocalProblem& p, const LocalTile& t, const float* s, float* out) {
  float block[kBlock * kStripLength];
  for (int r = 0; r < t.rows; ++r)
    for (int dy = 0; dy < p.window; ++dy) {
      const bool outside = r + dy < t.low || r + dy >= t.high;
      for (int dx0 = 0; dx0 < p.window; dx0 += kBlock) {
        const int count = least(kBlock, p.window - dx0);
        if (!outside)
          transpose(s + r * t.row + int64_t(r + dy) * t.l->window_row + dx0, t.cell, t.columns, count, block,
                    kStripLength);
        for (int i = 0; i < count; ++i) {
          const Inside in(t, dx0 + i);
          float* to = offset_at(out, p, t.plane, dy, dx0 + i, t.y + r, t.x);
          for (int x = 0; x < t.columns; ++x)
            to[x * p.dilation] = !outside && x >= in.first && x < in.last ? block[i * kStripLength + x] : 0;
        }
      }
    }
}

// The weights of a tile's queries, 0 outside the frame, in the layout of its scores.
void read_offsets(const LocalProblem& p, const LocalTile& t, const float* grad, bool turned, float* s) {
  float block[kBlock * kStripLength];
  const int reach = t.l->reach, last = p.window - 1;
  for (int r = 0; r < t.rows; ++r)
    for (int j = most(t.low, r); j < least(t.high, r + p.window); ++j)
      for (int dx0 = 0; dx0 < p.window; dx0 += kBlock) {
        const int count = least(kBlock, p.window - dx0), dy = j - r;
        for (int i = 0; i < count; ++i) {
          const int dx = dx0 + i;
          const Inside in(t, dx);
          float* to = block + i * kStripLength;
          fill(to, t.columns, 0.f);
          const float* from =
              turned ? offset_at(grad, p, t.plane, last - dy, last - dx, t.y + j - reach, t.x + dx - reach)
                     : offset_at(grad, p, t.plane, dy, dx, t.y + r, t.x);
          for (int x = in.first; x < in.last; ++x) to[x] = from[x * p.dilation];
        }
        transpose(block, kStripLength, count, t.columns, s + r * t.row + int64_t(j) * t.l->window_row + dx0,
                  t.cell);
      }
}

void correlate(const LocalProblem& p, const LocalLayout& l, const float* key_rows, int64_t begin, int64_t end,
               float* out) {
  Buffer<float> s(l.strip * kRows * l.slots * l.window_row, 0.f), a(l.strip * p.channels * kRows, 0.f);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t which = task / (l.blocks * l.strips);
    const LocalTile t(l, plane_of(p, l, which), task / l.strips % l.blocks, task % l.strips);
    if (!t) continue;
    pack_queries(p.query, p, t, p.channels, a.data());
    score(t, a.data(), p.channels, key_rows + which * l.key_rows(p.channels), nullptr, s.data());
    write_offsets(p, t, s.data(), out);
  }
}

void spread(const LocalProblem& p, const LocalLayout& l, const float* key_cells, const float* grad,
            bool turned, int64_t begin, int64_t end, float* out) {
  Buffer<float> s(l.strip * kRows * l.slots * l.window_row, 0.f);
  Buffer<float> acc((kRows + 1) * kStripLength * int64_t(l.key_width), 0.f);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t which = task / (l.blocks * l.strips);
    const LocalTile t(l, plane_of(p, l, which), task / l.strips % l.blocks, task % l.strips);
    if (!t) continue;
    read_offsets(p, t, grad, turned, s.data());
    read_cells(t, s.data(), key_cells + which * l.cells(l.key_chunks, l.key_width), nullptr, l.key_chunks,
               l.key_width, acc.data(), [&](int chunk) {
                 for (int r = 0; r < t.rows; ++r)
                   write_cells(p, t.plane, p.channels, chunk, l.key_width,
                               &acc[int64_t(r) * t.columns * l.key_width], t.y + r, t.x, t.columns, out);
               });
  }
}

}  // namespace

extern const CorrelationKernels correlation_kernels;
const CorrelationKernels correlation_kernels = {VOSOPS_TEXT(VOSOPS_ISA), correlate, spread};

}  // namespace vosops::VOSOPS_ISA
