// SPDX-License-Identifier: Apache-2.0
// Exact selection by a warp: of the entries (score, index) of a row in shared memory keep the k best.
#pragma once
#include "cuda_problem.cuh"

namespace vosops::gpu {

// How many of the warp's entries satisfy `test`; entries n and up are not looked at.
template <class F>
VOSOPS_DEVICE int count_entries(int n, const F& test) {
  int count = 0;
#pragma unroll
  for (int i = 0; i < kSlots; ++i)
    if (i * 32 < n) count += count_bits(ballot(test(i)));
  return count;
}

// Moves the k best of n <= kMaxCapacity different entries to the front, in any order, and returns the key of
// the worst of them; with n <= k nothing moves and the answer is kNothing. All lanes of the warp call it.
// Bisection on the key counts by ballot, and stops as soon as exactly k entries lie above.
VOSOPS_DEVICE uint32_t keep_best(uint64_t* entries, int n, int k) {
  sync_warp();
  if (n <= k) return kNothing;
  uint32_t key[kSlots], rest[kSlots];  // the two halves of an entry; 0 is below every entry
  uint32_t low = kNan, high = 0;
#pragma unroll
  for (int i = 0; i < kSlots; ++i) {
    const int at = i * 32 + lane();
    const uint64_t entry = at < n ? entries[at] : 0;
    key[i] = key_of(entry);
    rest[i] = uint32_t(entry);
    if (at < n) {
      low = key[i] < low ? key[i] : low;
      high = key[i] > high ? key[i] : high;
    }
  }
  low = least_of_warp(low);
  high = largest_of_warp(high);
  int above = n;  // entries with a key >= low; never below k
  while (low < high && above != k) {
    const uint32_t middle = low + (high - low) / 2 + 1;
    const int count = count_entries(n, [&](int i) { return key[i] >= middle; });
    if (count >= k) {
      low = middle;
      above = count;
    } else {
      high = middle - 1;
    }
  }
  // Equal scores at the boundary: the lowest indices, which are the largest `rest`.
  uint32_t rest_low = 0;
  if (above != k) {
    const uint32_t tie = low;
    const int wanted = k - count_entries(n, [&](int i) { return key[i] > tie; });
    uint32_t rest_high = kNan;
    int ties = -1;
    while (rest_low < rest_high && ties != wanted) {
      const uint32_t middle = rest_low + (rest_high - rest_low) / 2 + 1;
      const int count = count_entries(n, [&](int i) { return key[i] == tie && rest[i] >= middle; });
      if (count >= wanted) {
        rest_low = middle;
        ties = count;
      } else {
        rest_high = middle - 1;
      }
    }
  }
  int kept = 0;
  uint32_t worst = kNan;
#pragma unroll
  for (int i = 0; i < kSlots; ++i) {
    if (i * 32 >= n) break;
    const bool keep = key[i] > low || (key[i] == low && rest[i] >= rest_low && i * 32 + lane() < n);
    const uint32_t bits = ballot(keep);
    if (keep) {
      entries[kept + count_bits(bits & ((1u << lane()) - 1))] = uint64_t(key[i]) << 32 | rest[i];
      worst = key[i] < worst ? key[i] : worst;
    }
    kept += count_bits(bits);
  }
  sync_warp();
  return least_of_warp(worst);
}

}  // namespace vosops::gpu
