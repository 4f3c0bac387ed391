// SPDX-License-Identifier: Apache-2.0
// The two products of a tile of positions and the map around it: scores from two maps, and a map read by
// weights. Keys come in strips of rows, one being loaded while the block computes on the one before.
#pragma once
#include "cuda_problem.cuh"

namespace vosops::gpu::local {

// load(strip, buffer) starts copies, compute(strip, buffer) runs when all of the block's are there.
template <class Load, class Compute>
VOSOPS_DEVICE void for_strips(int count, uint8_t* buffers, int bytes, const Load& load,
                              const Compute& compute) {
  if (count == 0) return;
  load(0, buffers);
  commit_copies();
#pragma unroll 1
  for (int strip = 0; strip < count; ++strip) {
    if (strip + 1 < count) load(strip + 1, buffers + (strip + 1) % 2 * bytes);
    commit_copies();
    await_copies<1>();
    sync_block();
    compute(strip, buffers + strip % 2 * bytes);
    sync_block();
  }
}

// Copies `channels` of `count` positions, each where at(position) says, or zeros where that is null. `any` is
// an address in global memory.
template <class At>
VOSOPS_DEVICE void load_positions(int count, int channels, const uint16_t* any, uint8_t* to, const At& at) {
  const int chunks = round_up(channels, 16) / 8, bytes = row_bytes(channels);
  const Divider by_chunks(chunks);
#pragma unroll 2
  for (int unit = thread_index(); unit < count * chunks; unit += kThreads) {
    const int position = by_chunks(unit), chunk = unit - position * chunks;
    const uint16_t* from = chunk * 8 < channels ? at(position) : nullptr;
    start_copy(to + position * bytes + chunk * 16, from ? from + chunk * 8 : any, from != nullptr);
  }
}

VOSOPS_DEVICE const uint16_t* head_of(const Cells& cells, const Tile& t) {
  return cells.data + t.batch * cells.batch_stride + int64_t(t.head) * cells.channels;
}

// The tile's own positions.
VOSOPS_DEVICE void load_tile(const Local& p, const Tile& t, const Cells& cells, int channel, int channels,
                             uint8_t* to) {
  const uint16_t* base = head_of(cells, t) + channel;
  load_positions(kRows, channels, base, to, [&](int row) {
    return t.inside(p, row)
               ? base + (t.y + row / kSide) * cells.row_stride + (t.x + row % kSide) * cells.column_stride
               : nullptr;
  });
}

// A strip of what the tile meets, from row `first` of the halo on.
VOSOPS_DEVICE void load_halo(const Local& p, const Tile& t, const Cells& cells, int channel, int channels,
                             int first, uint8_t* to) {
  const uint16_t* base = head_of(cells, t) + channel;
  const Divider by_columns(p.columns());
  load_positions(p.strip_positions(), channels, base, to, [&](int position) {
    const int row = by_columns(position), column = position - row * p.columns();
    const int y = t.y - p.reach() + first + row, x = t.x - p.reach() + column;
    const bool inside = uint32_t(y) < uint32_t(p.height) && uint32_t(x) < uint32_t(p.width);
    return inside && column < p.halo() ? base + y * cells.row_stride + x * cells.column_stride : nullptr;
  });
}

// Rows of the halo that are on the map.
struct HaloRows {
  int first, last, strips;
  VOSOPS_DEVICE HaloRows(const Local& p, const Tile& t) {
    first = p.reach() > t.y ? p.reach() - t.y : 0;
    last = p.height - t.y + p.reach() < p.halo() ? p.height - t.y + p.reach() : p.halo();
    strips = (last - first + p.strip_rows - 1) / p.strip_rows;
  }
};

// Positions of a strip that this warp's two rows of queries meet, in whole steps of 16; the strip is one of
// whole steps too. A position may be outside of a window.
struct WarpPositions {
  int first, last;
  VOSOPS_DEVICE WarpPositions(const Local& p, const HaloRows& rows, int first_row) {
    const auto within = [&](int row) { return row < 0 ? 0 : row > p.strip_rows ? p.strip_rows : row; };
    const int low = within(2 * warp() - first_row);
    const int end = 2 * warp() + p.window + 1 < rows.last ? 2 * warp() + p.window + 1 : rows.last;
    first = low * p.columns() / 16 * 16;
    last = round_up(within(end - first_row) * p.columns(), 16);
  }
};

// A table goes through the strips in pieces; first all high terms, then the low ones if there are any.
struct TablePieces {
  int count, all;
  VOSOPS_DEVICE TablePieces(const Local& p, const Table& table, int head) {
    count = (p.offsets() + p.strip_positions() - 1) / p.strip_positions();
    all = table ? (table.has_low[head] ? 2 * count : count) : 0;
  }
};

VOSOPS_DEVICE void load_table(const Local& p, const Table& table, int head, int channel, int channels,
                              const TablePieces& pieces, int piece, uint8_t* to) {
  const uint16_t* base = (piece < pieces.count ? table.high : table.low) + channel;
  const int first = piece % pieces.count * p.strip_positions();
  load_positions(p.strip_positions(), channels, base, to, [&](int position) {
    const int offset = first + position;
    return offset < p.offsets() ? base + (int64_t(head) * p.offsets() + offset) * table.channels : nullptr;
  });
}

// add(position, sum) for every eight positions in [first, last) of a strip: their products with this warp's
// 16 queries, as a fragment (PTX ISA, the accumulator of mma.m16n8k16).
template <class T, class Add>
VOSOPS_DEVICE void multiply_strip(const uint8_t* queries, const uint8_t* strip, int channels, int first,
                                  int last, const Add& add) {
  const int l = lane(), bytes = row_bytes(channels), steps = round_up(channels, 16) / 16;
  const uint8_t* a_at = queries + (warp() * 16 + l % 16) * bytes + l / 16 * 16;
  const uint8_t* b_at = strip + (l % 8 + l / 16 * 8) * bytes + l / 8 % 2 * 16;
#pragma unroll 1
  for (int at = first; at < last; at += 64) {
    float sum[8][4] = {};
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      uint32_t a[4];
      load_matrices(a, a_at + step * 32);
#pragma unroll
      for (int pair = 0; pair < 4; ++pair) {
        if (at + pair * 16 >= last) break;
        uint32_t b[4];
        load_matrices(b, b_at + (at + pair * 16) * bytes + step * 32);
        multiply<T>(sum[2 * pair], a, b[0], b[1]);
        multiply<T>(sum[2 * pair + 1], a, b[2], b[3]);
      }
    }
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (at + i * 8 < last) add(at + i * 8, sum[i]);
  }
}

// Adds factor <a_row, b_(row + offset)> + <a_row, table_offset> of channels [channel, channel + channels) to
// the scores, for every row of the tile and offset; the first channels set them. Off the map they are
// undefined.
template <class T>
VOSOPS_DEVICE void add_scores(const Local& p, const Tile& t, const Shared& shared, const Cells& a,
                              const Cells& b, const Table& table, int channel, int channels, float factor,
                              float* scores) {
  const int l = lane(), stride = p.score_stride(), columns = p.columns(), window = p.window;
  const HaloRows rows(p, t);
  const Divider by_columns(columns);
  const auto set = [&](float& score, float x) { score = channel == 0 ? x : score + x; };
  load_tile(p, t, a, channel, channels, shared.queries);  // of the group of the first strip
  for_strips(
      rows.strips, shared.strips, p.strip_bytes(),
      [&](int strip, uint8_t* to) {
        load_halo(p, t, b, channel, channels, rows.first + strip * p.strip_rows, to);
      },
      [&](int strip, uint8_t* from) {
        const int first_row = rows.first + strip * p.strip_rows;
        const WarpPositions mine(p, rows, first_row);
        multiply_strip<T>(
            shared.queries, from, channels, mine.first, mine.last, [&](int at, const float (&sum)[4]) {
              const int row = by_columns(at), column = at - row * columns + l % 4 * 2;
              const int dy = first_row + row - 2 * warp(), dx = column - l / 4;
              float* to = scores + (warp() * 16 + l / 4) * stride + dy * window + dx;
#pragma unroll
              for (int half = 0; half < 2; ++half)  // the second row of queries meets the window one row up
#pragma unroll
                for (int i = 0; i < 2; ++i)
                  if (uint32_t(dy - half) < uint32_t(window) && uint32_t(dx + i) < uint32_t(window))
                    set(to[half * (8 * stride - window) + i], factor * sum[half * 2 + i]);
            });
      });
  sync_warp();
  const TablePieces pieces(p, table, t.head);
  for_strips(
      pieces.all, shared.strips, p.strip_bytes(),
      [&](int piece, uint8_t* to) { load_table(p, table, t.head, channel, channels, pieces, piece, to); },
      [&](int piece, uint8_t* from) {
        const int first = piece % pieces.count * p.strip_positions();
        const int left = round_up(p.offsets() - first, 16);
        multiply_strip<T>(shared.queries, from, channels, 0,
                          left < p.strip_positions() ? left : p.strip_positions(),
                          [&](int at, const float (&sum)[4]) {
                            const int offset = first + at + l % 4 * 2;
                            float* to = scores + (warp() * 16 + l / 4) * stride + offset;
#pragma unroll
                            for (int i = 0; i < 4; ++i)
                              if (offset + i % 2 < p.offsets()) to[i / 2 * 8 * stride + i % 2] += sum[i];
                          });
      });
  sync_warp();
}

// Weights of this warp's 16 queries for the 16 positions of the halo at (first_row, at): the operand a of
// mma.m16n8k16, 0 where a position is not in a window.
VOSOPS_DEVICE void band_of(uint32_t (&a)[4], const uint16_t* weights, int stride, int window, int columns,
                           const Divider& by_columns, int first_row, int at) {
  const int l = lane();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = by_columns(at + half * 8), column = at + half * 8 - row * columns + l % 4 * 2;
    const int dy = first_row + row - 2 * warp(), dx = column - l / 4;
    const uint16_t* from = weights + (warp() * 16 + l / 4) * stride + dy * window + dx;
    const bool low = uint32_t(dx) < uint32_t(window), high = uint32_t(dx + 1) < uint32_t(window);
#pragma unroll
    for (int below = 0; below < 2; ++below) {
      const bool there = uint32_t(dy - below) < uint32_t(window);
      const uint16_t* x = from + below * (8 * stride - window);
      const uint32_t first = there && low ? x[0] : 0, second = there && high ? x[1] : 0;
      a[half * 2 + below] = first | second << 16;
    }
  }
}

// sum += weights times the positions [first, last) of a strip; fragment(a, at) is the operand of 16 of them.
template <class T, class Fragment>
VOSOPS_DEVICE void read_strip(float (&sum)[kChunk / 8][4], const uint8_t* strip, int channels, int first,
                              int last, const Fragment& fragment) {
  const int l = lane(), bytes = row_bytes(channels);
  const uint8_t* b_at = strip + (l % 8 + l / 8 % 2 * 8) * bytes + l / 16 * 16;
#pragma unroll 1
  for (int at = first; at < last; at += 16) {
    uint32_t a[4];
    fragment(a, at);
#pragma unroll
    for (int pair = 0; pair < kChunk / 16; ++pair) {
      if (pair * 16 >= channels) break;
      uint32_t b[4];
      load_matrices_transposed(b, b_at + at * bytes + pair * 32);
      multiply<T>(sum[2 * pair], a, b[0], b[1]);
      multiply<T>(sum[2 * pair + 1], a, b[2], b[3]);
    }
  }
}

template <class T>
VOSOPS_DEVICE bool is_number(uint32_t bits) {
  constexpr uint32_t kExponent = T::kHalf ? 0x7c00 : 0x7f80;
  return (bits & kExponent) != kExponent;
}

// Sets what is not a number in a strip to 0.
template <class T>
VOSOPS_DEVICE void clean_strip(const Local& p, uint8_t* strip, int channels) {
  auto* elements = reinterpret_cast<uint16_t*>(strip);
  for (int i = thread_index(); i < p.strip_positions() * row_bytes(channels) / 2; i += kThreads)
    if (!is_number<T>(elements[i])) elements[i] = 0;
  sync_block();
}

// Products with weights 0 spread NaN and infinity beyond their windows, so clean_strip took them out: here
// they come back where they belong, one lane per element. Arguments as of read_cells.
template <class T>
VOSOPS_DEVICE void add_broken(const Local& p, const Tile& t, const uint16_t* weights, int stride,
                              const Cells& cells, int channel, int channels, float factor, float* to) {
  const uint16_t* base = head_of(cells, t) + channel;
#pragma unroll 1
  for (int unit = lane(); unit < 16 * channels; unit += 32) {
    const int c = unit / 16, row = warp() * 16 + unit % 16;
    if (!t.inside(p, row)) continue;
    float sum = 0;
#pragma unroll 1
    for (int offset = 0; offset < p.offsets(); ++offset) {
      const int dy = offset / p.window, dx = offset - dy * p.window;
      if (!t.meets(p, row, dy, dx)) continue;
      const int64_t y = t.y + row / kSide + dy - p.reach(), x = t.x + row % kSide + dx - p.reach();
      const uint32_t bits = base[y * cells.row_stride + x * cells.column_stride + c];
      if (is_number<T>(bits)) continue;
      sum += T::unpack(weights[row * stride + offset]).first * factor * T::unpack(bits).first;
    }
    if (sum != 0) to[c * p.area() + t.position(p, row)] += sum;
  }
}

// to[c][position] = row_factor sum_offset weights[row][offset] (factor cells[row + offset] + table[offset])
// for the rows of the tile that are on the map and channels channel + c; without row_factors they are 1.
template <class T>
VOSOPS_DEVICE void read_cells(const Local& p, const Tile& t, uint8_t* strips, const uint16_t* weights,
                              int stride, const Cells& cells, const Table& table, int channel, int channels,
                              float factor, const float* row_factors, float* to) {
  const int l = lane(), columns = p.columns();
  const HaloRows rows(p, t);
  const Divider by_columns(columns);
  const TablePieces pieces(p, table, t.head);
  float sum[kChunk / 8][4];
  bool clean = false;
#pragma unroll 1
  for (;; clean = true) {
#pragma unroll
    for (int i = 0; i < kChunk / 8; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) sum[i][j] = 0;
    for_strips(
        rows.strips, strips, p.strip_bytes(),
        [&](int strip, uint8_t* to) {
          load_halo(p, t, cells, channel, channels, rows.first + strip * p.strip_rows, to);
        },
        [&](int strip, uint8_t* from) {
          if (clean) clean_strip<T>(p, from, channels);
          const int first_row = rows.first + strip * p.strip_rows;
          const WarpPositions mine(p, rows, first_row);
          read_strip<T>(sum, from, channels, mine.first, mine.last, [&](uint32_t (&a)[4], int at) {
            band_of(a, weights, stride, p.window, columns, by_columns, first_row, at);
          });
        });
#pragma unroll
    for (int i = 0; i < kChunk / 8; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) sum[i][j] *= factor;
    for_strips(
        pieces.all, strips, p.strip_bytes(),
        [&](int piece, uint8_t* to) { load_table(p, table, t.head, channel, channels, pieces, piece, to); },
        [&](int piece, uint8_t* from) {
          const int first = piece % pieces.count * p.strip_positions();
          const int left = p.padded_offsets() - first;
          const uint16_t* mine = weights + (warp() * 16 + l % 16) * stride + first + l / 16 * 8;
          read_strip<T>(sum, from, channels, 0, left < p.strip_positions() ? left : p.strip_positions(),
                        [&](uint32_t (&a)[4], int at) { load_matrices(a, mine + at); });
        });
    bool numbers = true;
#pragma unroll
    for (int i = 0; i < kChunk / 8; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) numbers = numbers && sum[i][j] - sum[i][j] == 0;
    if (clean || !any_of_block(!numbers)) break;
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = warp() * 16 + half * 8 + l / 4;
    if (!t.inside(p, row)) continue;
    const float row_factor = row_factors ? row_factors[row] : 1;
    float* at = to + t.position(p, row) + l % 4 * 2 * p.area();
#pragma unroll
    for (int i = 0; i < kChunk / 8; ++i) {
      if (i * 8 >= channels) break;
      at[0] = sum[i][half * 2] * row_factor;
      at[p.area()] = sum[i][half * 2 + 1] * row_factor;
      at += 8 * p.area();
    }
  }
  if (!clean) return;
  sync_warp();
  add_broken<T>(p, t, weights, stride, cells, channel, channels, factor, to);
}

}  // namespace vosops::gpu::local
