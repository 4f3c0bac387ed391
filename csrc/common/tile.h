// SPDX-License-Identifier: Apache-2.0
// The register tile that every product of the library is made of.
#pragma once
#include "vec.h"

namespace vosops::VOSOPS_ISA {

using Tile = Vec[kRows][kVecs];

// acc[r] += sum_k a[r * row_step + k * depth_step] * b[k][0 .. kCols), for a Tile or for fewer rows.
template <bool Pairs = false, int Rows>
inline __attribute__((always_inline)) void multiply(const float* __restrict a, int64_t row_step,
                                                    int64_t depth_step, const float* __restrict b,
                                                    int64_t depth, Vec (&acc)[Rows][kVecs]) {
  // A copy that nothing else can point to: the compiler would store `acc` in every turn of the loop.
  Vec sum[Rows][kVecs];
  for (int r = 0; r < Rows; ++r)
    for (int v = 0; v < kVecs; ++v) sum[r][v] = acc[r][v];
  for (int64_t k = 0; k < depth; ++k) {
    Vec column[kVecs];
    for (int v = 0; v < kVecs; ++v) column[v] = load(b + k * kCols + v * kLanes);
    for (int r = 0; r < Rows; ++r) {
      const Vec x = set1(a[r * row_step + k * depth_step]);
      for (int v = 0; v < kVecs; ++v) {
        if constexpr (Pairs)
          sum[r][v] = dot_pairs(sum[r][v], x, column[v]);
        else
          sum[r][v] += x * column[v];
      }
    }
  }
  for (int r = 0; r < Rows; ++r)
    for (int v = 0; v < kVecs; ++v) acc[r][v] = sum[r][v];
}

template <int N>
struct Count {
  static constexpr int kCount = N;
};

// Calls f with the Count of `rows`, 1 to kRows, so that a product of fewer rows than a tile has its own code.
template <class F>
inline void with_rows(int rows, const F& f) {
  static_assert(kRows == 6);
  switch (rows) {
    case 1: return f(Count<1>{});
    case 2: return f(Count<2>{});
    case 3: return f(Count<3>{});
    case 4: return f(Count<4>{});
    case 5: return f(Count<5>{});
    default: return f(Count<6>{});
  }
}

}  // namespace vosops::VOSOPS_ISA
