// SPDX-License-Identifier: Apache-2.0
// The end of the match: the k best of what the shares of the memory kept, in order, and their softmax.
#pragma once
#include "cuda_select.cuh"

namespace vosops::gpu {

constexpr int kMergeWarps = 4;
constexpr int kMergeEntries = kMaxCapacity + kMaxTopK;  // shared, per warp

// One warp per query: the k best of all shares, best first, and their softmax. The sums run in order of rank,
// so that they do not depend on how the memory was cut.
VOSOPS_DEVICE void merge_warp(const Match& p, uint64_t* memory) {
  uint64_t* const list = memory + warp() * kMergeEntries;
  uint64_t* const sorted = list + kMaxCapacity;
  const int64_t query = int64_t(block_x()) * kMergeWarps + warp();
  if (query >= int64_t(p.batch) * p.queries) return;
  const int64_t total = int64_t(p.splits) * p.k;
  const uint64_t* from = p.kept + query * total;
  uint32_t threshold = kNothing;
  int n = 0;
  for (int64_t at = 0; at < total; at += 128) {
    uint64_t entry[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) entry[i] = at + i * 32 + lane() < total ? from[at + i * 32 + lane()] : 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (n + 32 > kMaxCapacity) {
        threshold = keep_best(list, n, p.k);
        n = p.k;
      }
      // Equal keys get in: shares come in any order here, and the index decides.
      const bool enters = key_of(entry[i]) >= threshold && key_of(entry[i]) > kNothing;
      const uint32_t bits = ballot(enters);
      if (enters) list[n + count_bits(bits & ((1u << lane()) - 1))] = entry[i];
      n += count_bits(bits);
    }
  }
  keep_best(list, n, p.k);
  n = n < p.k ? n : p.k;
  for (int i = lane(); i < n; i += 32) {
    const uint64_t mine = list[i];
    int rank = 0;
    for (int j = 0; j < n; ++j) rank += list[j] > mine;
    sorted[rank] = mine;
  }
  sync_warp();
  const float best = n ? score_of(key_of(sorted[0])) : 0;
  float weight[kMaxTopK / 32], sum = 0;
#pragma unroll
  for (int i = 0; i < kMaxTopK / 32; ++i) {
    const int at = i * 32 + lane();
    weight[i] = at < n ? expf(score_of(key_of(sorted[at])) - best) : 0;
    sum += weight[i];
  }
  for (int mask = 16; mask; mask /= 2) sum += shuffle_xor(sum, mask);
#pragma unroll
  for (int i = 0; i < kMaxTopK / 32; ++i) {
    const int at = i * 32 + lane();
    if (at >= p.k) break;
    p.indices[query * p.k + at] = at < n ? int64_t(index_of(sorted[at])) : -1;
    p.weights[query * p.k + at] = n ? weight[i] / sum : 0;
  }
}

}  // namespace vosops::gpu
