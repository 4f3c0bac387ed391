// SPDX-License-Identifier: Apache-2.0
// One call of the memory read on tensors, and how its work is cut into tasks.
#pragma once
#include <algorithm>
#include <cstring>
#include <memory>
#include <tuple>
#include <vector>

#include "../common/isa.h"
#include "../common/tensors.h"

namespace vosops {

using torch::stable::get_num_threads;
using torch::stable::parallel_for;

constexpr int64_t kCacheBytes = 512 * 1024;  // of one core's L2, for what a task reuses

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Memory that a kernel fills completely.
inline std::unique_ptr<float[]> uninitialised(int64_t count) {
  return std::unique_ptr<float[]>(new float[std::max<int64_t>(count, 1)]);
}

struct Call {
  const Kernels& k = kernels();
  Problem p;
  PackedQueries packed;
  std::unique_ptr<float[]> data, norms;

  // Packs all queries: O(Q Ck) floats, read by every task.
  void pack() {
    k.layout(p, packed);
    data = uninitialised(p.batch * packed.blocks * packed.depth * k.rows);
    norms = uninitialised(p.batch * packed.blocks);
    packed.data = data.get();
    packed.norms = norms.get();
    parallel_for(0, p.batch * packed.blocks, 16, [&](int64_t begin, int64_t end) {
      while (begin < end) {
        const int64_t batch = begin / packed.blocks, first = begin % packed.blocks;
        const int64_t last = std::min(packed.blocks, first + end - begin);
        k.pack_queries(p, packed, batch, first, last);
        begin += last - first;
      }
    });
  }

  // Calls f(batch, first, last) over ranges of [0, count) of every batch entry, `chunk` long at most.
  template <class F>
  void for_ranges(int64_t count, int64_t chunk, const F& f) const {
    const int64_t each = ceil_div(count, chunk);
    parallel_for(0, p.batch * each, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t first = task % each * chunk;
        f(task / each, first, std::min(count, first + chunk));
      }
    });
  }

  // Ranges of `count` for every thread, but no longer than `longest`, in multiples of `unit`.
  int64_t chunk(int64_t count, int64_t longest, int64_t unit) const {
    const int64_t threads = std::max<int64_t>(1, get_num_threads());
    const int64_t parts =
        std::max(ceil_div(count, std::max(longest, unit)), ceil_div(threads, std::max<int64_t>(1, p.batch)));
    const int64_t rounds = ceil_div(parts * p.batch, threads) * threads / std::max<int64_t>(1, p.batch);
    return ceil_div(ceil_div(count, std::max<int64_t>(1, std::max(parts, rounds))), unit) * unit;
  }
};

inline Call make_call(const Tensor& query_key, const Tensor& memory_key,
                      const std::optional<Tensor>& shrinkage, const std::optional<Tensor>& selection,
                      const std::optional<Tensor>& memory_mask, const std::optional<Tensor>& centers,
                      const std::optional<Tensor>& precision, bool l2, double scale) {
  Call call;
  Problem& p = call.p;
  p.batch = query_key.size(0);
  p.channels = int(query_key.size(1));
  p.queries = count_of(query_key, 2);
  p.memory = count_of(memory_key, 2);
  STD_TORCH_CHECK(memory_key.size(0) == p.batch && memory_key.size(1) == p.channels,
                  "memory_key must have the batch and channels of query_key");
  STD_TORCH_CHECK(p.memory > 0 && p.memory < INT32_MAX - 1024 && p.queries < INT32_MAX - 1024,
                  "between 1 and 2^31 memory positions and queries, got ", p.memory, " and ", p.queries);
  p.l2 = l2;
  p.scale = p.norm_scale = float(scale);
  p.query = operand_of(query_key, "query_key");
  p.key = operand_of(memory_key, "memory_key");
  p.shrinkage = operand_of(shrinkage, "shrinkage");
  p.selection = operand_of(selection, "selection");
  if (memory_mask) {
    STD_TORCH_CHECK(memory_mask->scalar_type() == ScalarType::Bool && count_of(*memory_mask, 1) == p.memory,
                    "memory_mask must be bool, one per memory position");
    p.mask.data = memory_mask->const_data_ptr();
    p.mask.batch_stride = memory_mask->stride(0);
    p.mask.positions = positions_of(*memory_mask, 1);
  }
  p.centers = floats_of(centers, "centers");
  p.precision = floats_of(precision, "precision");
  STD_TORCH_CHECK(!p.centers || (centers->numel() == p.batch * p.memory * 2 && precision &&
                                 precision->numel() == p.batch * p.memory),
                  "centers and precision must hold one entry per memory position");
  p.grid_width = std::max<int64_t>(1, query_key.size(query_key.dim() - 1));
  return call;
}

inline Values values_of(const Tensor& memory_value) {
  Values v;
  v.objects = memory_value.size(1);
  v.channels = memory_value.size(2);
  v.value.data = memory_value.const_data_ptr();
  v.value.dtype = dtype_of(memory_value, "memory_value");
  v.value.batch_stride = memory_value.stride(0);
  v.value.object_stride = memory_value.stride(1);
  v.value.channel_stride = memory_value.stride(2);
  v.value.positions = positions_of(memory_value, 3);
  return v;
}

}  // namespace vosops
