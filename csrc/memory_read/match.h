// SPDX-License-Identifier: Apache-2.0
// Top-k of the scores in one pass: a row keeps the few scores that beat its running k-th best in a small
// buffer and cuts the buffer back to k when it is full. About k ln(M / k) scores of a row ever get there.
#pragma once

#include "score.h"

namespace vosops::VOSOPS_ISA {

// The k-th largest of n scores (k <= n, no NaN); reorders them.
inline float kth_largest(float* x, int n, int k) {
  int low = 0, high = n - 1;
  const int target = k - 1;
  while (low < high) {
    const float a = x[low], b = x[(low + high) / 2], c = x[high];
    const float pivot = a > b ? (b > c ? b : (a > c ? c : a)) : (a > c ? a : (b > c ? c : b));
    int i = low, j = high;
    while (i <= j) {
      while (x[i] > pivot) ++i;
      while (x[j] < pivot) --j;
      if (i <= j) {
        const float t = x[i];
        x[i++] = x[j];
        x[j--] = t;
      }
    }
    if (target <= j)
      high = j;
    else if (target >= i)
      low = i;
    else
      break;
  }
  return x[target];
}

// Keeps the k best of n entries in order of index, the lowest index first among equals; returns how many
// are left and tightens `threshold`. NaN entries are dropped and reported in `poisoned`.
inline int shrink(float* scores, int32_t* indices, int n, int k, float* work, float& threshold,
                  bool& poisoned) {
  int kept = 0;
  for (int i = 0; i < n; ++i) {
    if (scores[i] != scores[i]) {
      poisoned = true;
      continue;
    }
    scores[kept] = scores[i];
    indices[kept++] = indices[i];
  }
  if (kept < k) return kept;
  std::memcpy(work, scores, sizeof(float) * kept);
  const float kth = kth_largest(work, kept, k);
  threshold = kth;
  int above = 0;
  for (int i = 0; i < kept; ++i) above += scores[i] > kth;
  int ties = k - above, out = 0;
  for (int i = 0; i < kept; ++i) {
    const bool tie = scores[i] == kth && ties > 0;
    scores[out] = scores[i];
    indices[out] = indices[i];
    out += (scores[i] > kth) | tie;
    ties -= tie;
  }
  return out;
}

template <bool Pairs>
inline void match_blocks(const Problem& p, const PackedQueries& packed, int64_t batch, int64_t b0, int64_t b1,
                         int64_t m0, int64_t m1, int k, float* out_scores, int32_t* out_indices) {
  const int64_t rows = (b1 - b0) * kRows;
  const int64_t wanted = most<int64_t>(3 * int64_t(k), 64);
  const int capacity = int(least(wanted, m1 - m0)) + kCols + kLanes;
  Buffer<float> scores(rows * capacity), work(capacity), threshold(rows, -kInf);
  Buffer<int32_t> indices(rows * capacity), used(rows, 0);
  Buffer<uint8_t> poisoned(rows, 0);
  const auto cut = [&](int64_t row) {
    bool nan = poisoned[row];
    used[row] = shrink(&scores[row * capacity], &indices[row * capacity], used[row], k, work.data(),
                       threshold[row], nan);
    poisoned[row] = nan;
  };

  Panel panel(packed);
  for (int64_t m = m0; m < m1; m += kCols) {
    panel.pack(p, batch, m, m1, Pairs);
    const PanelBound bound = p.precision ? PanelBound(panel, packed) : PanelBound();
    for (int64_t block = b0; block < b1; ++block) {
      const int64_t first_row = (block - b0) * kRows;
      if (p.precision) {
        float lowest = threshold[first_row];
        const int64_t real = least<int64_t>(kRows, p.queries - block * kRows);
        for (int r = 1; r < real; ++r) lowest = least(lowest, threshold[first_row + r]);
        const float norm = packed.norms[batch * packed.blocks + block];
        if (bound.below(lowest, BlockCells(p, block), norm)) continue;
      }
      Tile s;
      score_tile<Pairs>(p, packed, batch, block, panel, s);
      for (int r = 0; r < kRows; ++r) {
        const int64_t row = first_row + r;
        const Vec bar = set1(threshold[row]);
        uint32_t bits[kVecs], any = 0;
        for (int v = 0; v < kVecs; ++v) any |= bits[v] = not_below(s[r][v], bar);
        if (!any) continue;
        float* to = &scores[row * capacity];
        int32_t* to_index = &indices[row * capacity];
        int n = used[row];
        for (int v = 0; v < kVecs; ++v)
          if (bits[v]) n += append(s[r][v], bits[v], int32_t(m) + v * kLanes, to + n, to_index + n);
        used[row] = n;
        if (n > capacity - kCols - kLanes) cut(row);
      }
    }
  }
  for (int64_t row = 0; row < rows; ++row) {
    if (b0 * kRows + row >= p.queries) break;
    cut(row);
    float* to = out_scores + row * k;
    fill(to, k, -kInf);
    std::memcpy(to, &scores[row * capacity], sizeof(float) * used[row]);
    std::memcpy(out_indices + row * k, &indices[row * capacity], sizeof(int32_t) * used[row]);
    if (poisoned[row]) to[0] = std::numeric_limits<float>::quiet_NaN();
  }
}

inline void match(const Problem& p, const PackedQueries& packed, int64_t batch, int64_t b0, int64_t b1,
                  int64_t m0, int64_t m1, int k, float* scores, int32_t* indices) {
  if (kPairs && packed.pairs)
    match_blocks<kPairs>(p, packed, batch, b0, b1, m0, m1, k, scores, indices);
  else
    match_blocks<false>(p, packed, batch, b0, b1, m0, m1, k, scores, indices);
}

// Whether entry i is to come before entry j: the higher score, the lower index among equals.
inline bool better(const float* s, const int32_t* at, int i, int j) {
  return s[i] > s[j] || (s[i] == s[j] && at[i] < at[j]);
}

inline void swap_entries(float* s, int32_t* at, int i, int j) {
  const float score = s[i];
  const int32_t index = at[i];
  s[i] = s[j], at[i] = at[j];
  s[j] = score, at[j] = index;
}

// Heap with the worst entry at the root: moves entry `root` down to its place among `n`.
inline void sift(float* s, int32_t* at, int root, int n) {
  for (int child = 2 * root + 1; child < n; root = child, child = 2 * root + 1) {
    if (child + 1 < n && better(s, at, child, child + 1)) ++child;
    if (!better(s, at, root, child)) return;
    swap_entries(s, at, root, child);
  }
}

// Best first. Entries come in order of index.
inline void sort_entries(float* s, int32_t* at, int n) {
  if (n <= 64) {
    for (int i = 1; i < n; ++i)
      for (int j = i; j > 0 && better(s, at, j, j - 1); --j) swap_entries(s, at, j, j - 1);
    return;
  }
  for (int i = n / 2 - 1; i >= 0; --i) sift(s, at, i, n);
  for (int end = n - 1; end > 0; --end) {
    swap_entries(s, at, 0, end);
    sift(s, at, 0, end);
  }
}

// Candidates of split s of query q: scores[s * split_stride + q * k ...]. Best first, then softmax.
inline void finish(const float* scores, const int32_t* indices, int64_t splits, int64_t split_stride,
                   int64_t q0, int64_t q1, int k, int64_t* out_indices, float* out_weights) {
  Buffer<float> s(splits * k), work(splits * k);
  Buffer<int32_t> at(splits * k);
  for (int64_t q = q0; q < q1; ++q) {
    int n = 0;
    bool poisoned = false;
    for (int64_t split = 0; split < splits; ++split) {
      const int64_t from = split * split_stride + q * k;
      for (int i = 0; i < k; ++i) {
        const float score = scores[from + i];
        poisoned |= score != score;
        if (!(score > -kInf)) continue;
        s[n] = score;
        at[n++] = indices[from + i];
      }
    }
    float threshold = -kInf;
    if (n > k) n = shrink(s.data(), at.data(), n, k, work.data(), threshold, poisoned);
    sort_entries(s.data(), at.data(), n);
    float total = 0;
    float* weights = out_weights + q * k;
    for (int i = 0; i < k; i += kLanes) {
      float lane[kLanes] = {};
      for (int l = 0; l < kLanes && i + l < n; ++l) lane[l] = s[i + l] - s[0];
      store(lane, exp(load(lane)));
      for (int l = 0; l < kLanes && i + l < k; ++l) {
        weights[i + l] = i + l < n ? lane[l] : 0.f;
        total += weights[i + l];
      }
    }
    for (int i = 0; i < k; ++i) {
      weights[i] = poisoned ? std::numeric_limits<float>::quiet_NaN() : (n ? weights[i] / total : 0.f);
      out_indices[q * k + i] = i < n ? at[i] : -1;
    }
    if (poisoned && n == 0) out_indices[q * k] = 0;
  }
}

}  // namespace vosops::VOSOPS_ISA
