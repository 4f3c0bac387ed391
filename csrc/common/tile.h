// SPDX-License-Identifier: Apache-2.0
// The register tile that every product of the library is made of.
#pragma once
#include "vec.h"

namespace vosops::VOSOPS_ISA {

using Tile = Vec[kRows][kVecs];

// acc[r] += sum_k a[r * row_step + k * depth_step] * b[k][0 .. kCols).
template <bool Pairs = false>
inline __attribute__((always_inline)) void multiply(const float* __restrict a, int64_t row_step,
                                                    int64_t depth_step, const float* __restrict b,
                                                    int64_t depth, Tile& acc) {
  // A copy that nothing else can point to: the compiler would store `acc` in every turn of the loop.
  Tile sum;
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVecs; ++v) sum[r][v] = acc[r][v];
  for (int64_t k = 0; k < depth; ++k) {
    Vec column[kVecs];
    for (int v = 0; v < kVecs; ++v) column[v] = load(b + k * kCols + v * kLanes);
    for (int r = 0; r < kRows; ++r) {
      const Vec x = set1(a[r * row_step + k * depth_step]);
      for (int v = 0; v < kVecs; ++v) {
        if constexpr (Pairs)
          sum[r][v] = dot_pairs(sum[r][v], x, column[v]);
        else
          sum[r][v] += x * column[v];
      }
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVecs; ++v) acc[r][v] = sum[r][v];
}

}  // namespace vosops::VOSOPS_ISA
