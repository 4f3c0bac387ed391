// SPDX-License-Identifier: Apache-2.0
// What a warp keeps of the scores it sees: the best of every query, or, for the first threshold, maxima.
#pragma once
#include "cuda_select.cuh"

namespace vosops::gpu {

// The lists of the 16 queries of a warp. A lane sees two of them, rows lane / 4 and lane / 4 + 8 (`half`),
// together with the three other lanes of its quad, which hold the same values here.
struct Lists {
  uint64_t* entries;   // of the warp's first row
  float threshold[2];  // only what is strictly above gets in: equal scores come later, and lose
  bool open[2];        // nothing gets in past the last query, nor where NaN fills the list
  int count[2];

  VOSOPS_DEVICE uint64_t* row(const Match& p, int row) const { return entries + row * p.capacity; }

  // Of one row, at all its lanes.
  VOSOPS_DEVICE void raise(int row, uint32_t key) {
    const bool first = lane() / 4 == row, second = lane() / 4 + 8 == row;
    // Spelled out: an index that is not constant would put the arrays into local memory.
    threshold[0] = first ? score_of(key) : threshold[0];
    threshold[1] = second ? score_of(key) : threshold[1];
    open[0] = open[0] && !(first && key == kNan);
    open[1] = open[1] && !(second && key == kNan);
  }

  VOSOPS_DEVICE void cut(const Match& p, int row, int n) {
    const uint32_t worst = keep_best(this->row(p, row), n, p.k);
    if (n <= p.k) return;
    raise(row, worst);
    count[0] = lane() / 4 == row ? p.k : count[0];
    count[1] = lane() / 4 + 8 == row ? p.k : count[1];
  }
};

// Adds what beats the threshold to the lists. `position` is that of the tile's first column.
VOSOPS_DEVICE void keep(const Match& p, const Columns& columns, Lists& lists, int position,
                        const float (&s)[32]) {
  const int l = lane();
#pragma unroll
  for (int group = 0; group < 8; group += 4) {
    float best[2];
    bool beats[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      best[half] = s[group * 4 + half * 2];
#pragma unroll
      for (int j = group; j < group + 4; ++j)
        best[half] = largest(best[half], largest(s[j * 4 + half * 2], s[j * 4 + half * 2 + 1]));
      beats[half] = any(lists.open[half] && !(best[half] <= lists.threshold[half]));
    }
    if (!beats[0] && !beats[1]) continue;
    // Bits 4 r are rows r, bits 4 r + 1 are rows r + 8.
    const uint32_t first_full = ballot(lists.count[0] + kSpare > p.capacity) & 0x11111111u;
    const uint32_t second_full = ballot(lists.count[1] + kSpare > p.capacity) & 0x11111111u;
    uint32_t full = first_full | second_full << 1;
#pragma unroll 1
    while (full) {
      const int bit = lowest_bit(full), half = bit & 1;
      full &= full - 1;
      lists.cut(p, bit / 4 + half * 8, shuffle(half ? lists.count[1] : lists.count[0], bit & ~3));
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (!beats[half]) continue;
      float value[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) value[i] = s[(group + i / 2) * 4 + half * 2 + i % 2];
      if (any(best[half] != best[half])) {  // keys that never match may be NaN
#pragma unroll
        for (int i = 0; i < 8; ++i)
          if (value[i] != value[i] && columns.state[(group + i / 2) * 8 + l % 4 * 2 + i % 2] == kSkipped)
            value[i] = -infinity();
      }
      // The lanes of a quad write one after the other; the order within a list has no meaning.
      int mine = 0;
#pragma unroll
      for (int i = 0; i < 8; ++i) mine += lists.open[half] && !(value[i] <= lists.threshold[half]);
      const int beside = shuffle_xor(mine, 1), across = shuffle_xor(mine + beside, 2);
      uint64_t* to =
          lists.row(p, l / 4 + half * 8) + lists.count[half] + (l & 1 ? beside : 0) + (l & 2 ? across : 0);
#pragma unroll
      for (int i = 0; i < 8; ++i)
        if (lists.open[half] && !(value[i] <= lists.threshold[half]))
          *to++ = entry_of(ordered(value[i]), uint32_t(position + (group + i / 2) * 8 + l % 4 * 2 + i % 2));
      lists.count[half] += mine + beside + across;
    }
  }
}

// The maxima of 64 groups of scores of each row of a warp, a group for each column of the tile, kept where
// the lists would be. With k of them at least t, k scores are, and the k-th best score is.
struct Maxima {
  static constexpr int kStride = kCols + 8;  // no bank conflicts
  float* rows;

  VOSOPS_DEVICE explicit Maxima(const Match& p, uint64_t* entries)
      : rows(reinterpret_cast<float*>(entries + warp() * 16 * p.capacity)) {}

  VOSOPS_DEVICE void clear() {
    for (int i = lane(); i < 16 * kStride; i += 32) rows[i] = -infinity();
    sync_warp();
  }

  // NaN is left out: it may belong to a key that never matches, and the bound holds without.
  VOSOPS_DEVICE void add(const float (&s)[32]) {
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      auto* at =
          reinterpret_cast<float2*>(rows + (lane() / 4 + i % 2 * 8) * kStride + i / 2 * 8 + lane() % 4 * 2);
      const float a = s[i * 2], b = s[i * 2 + 1];
      const float2 before = *at;
      *at = float2{a > before.x ? a : before.x, b > before.y ? b : before.y};
    }
  }

  // Into `groups` of the whole call, where other blocks add theirs.
  VOSOPS_DEVICE void publish(const Match& p, int batch, int first) {
    sync_warp();
    for (int r = 0; r < 16 && first + r < p.queries; ++r)
      for (int c = lane(); c < kCols; c += 32)
        raise_to(p.groups + (int64_t(batch) * p.queries + first + r) * kCols + c,
                 ordered(rows[r * kStride + c]));
  }
};

// Thresholds from the maxima: a key that at least k of a row's groups reach, found by bisection like
// keep_best's but not to the last bit.
VOSOPS_DEVICE void start_lists(const Match& p, Lists& lists, int batch, int first) {
#pragma unroll 1
  for (int r = 0; r < 16 && first + r < p.queries; ++r) {
    const uint32_t* groups = p.groups + (int64_t(batch) * p.queries + first + r) * kCols;
    const uint32_t a = groups[lane()], b = groups[lane() + 32];
    uint32_t low = least_of_warp(a < b ? a : b), high = largest_of_warp(a > b ? a : b);
    int above = kCols;
    while (high > low && high - low > 1u << 10 && above != p.k) {
      const uint32_t middle = low + (high - low) / 2 + 1;
      const int count = count_bits(ballot(a >= middle)) + count_bits(ballot(b >= middle));
      if (count >= p.k) {
        low = middle;
        above = count;
      } else {
        high = middle - 1;
      }
    }
    // A score that equals the bound must get in; below +0 comes -0, which is no less.
    const uint32_t below = low == 0x80000000u ? low - 2 : low - 1;
    if (low > kNothing) lists.raise(r, below);
  }
}

}  // namespace vosops::gpu
