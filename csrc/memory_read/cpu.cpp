// SPDX-License-Identifier: Apache-2.0
// The CPU operators of the memory read: how the work is cut into tasks. The kernels do the rest.
#include <algorithm>
#include <cstring>
#include <memory>
#include <tuple>
#include <vector>

#include "../common/isa.h"
#include "../common/tensors.h"

namespace vosops {
namespace {

using torch::stable::get_num_threads;
using torch::stable::parallel_for;

constexpr int64_t kCacheBytes = 512 * 1024;  // of one core's L2, for what a task reuses

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Memory that a kernel fills completely.
std::unique_ptr<float[]> uninitialised(int64_t count) {
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

Call make_call(const Tensor& query_key, const Tensor& memory_key, const std::optional<Tensor>& shrinkage,
               const std::optional<Tensor>& selection, const std::optional<Tensor>& memory_mask,
               const std::optional<Tensor>& centers, const std::optional<Tensor>& precision, bool l2,
               double scale) {
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
  p.scale = float(scale);
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

Values values_of(const Tensor& memory_value) {
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

std::tuple<Tensor, Tensor> memory_match(Tensor query_key, Tensor memory_key, std::optional<Tensor> shrinkage,
                                        std::optional<Tensor> selection, std::optional<Tensor> memory_mask,
                                        std::optional<Tensor> centers, std::optional<Tensor> precision,
                                        bool l2, double scale, int64_t top_k) {
  Call call =
      make_call(query_key, memory_key, shrinkage, selection, memory_mask, centers, precision, l2, scale);
  const Problem& p = call.p;
  const int k = int(std::min(top_k, p.memory));
  const Tensor indices = make(query_key, {p.batch, p.queries, k}, ScalarType::Long);
  const Tensor weights = make(query_key, {p.batch, p.queries, k}, ScalarType::Float);
  if (p.batch * p.queries == 0) return {indices, weights};
  call.pack();
  const PackedQueries& packed = call.packed;
  // A task's packed queries should stay in cache while it walks the memory. With too few queries for all
  // threads the memory is split too, and the candidates of the splits are merged.
  const int64_t longest = std::max<int64_t>(8, kCacheBytes / (int64_t(packed.depth) * call.k.rows * 4));
  const int64_t blocks = call.chunk(packed.blocks, longest, 1);
  const int64_t block_ranges = ceil_div(packed.blocks, blocks), threads = get_num_threads();
  int64_t splits = 1;
  if (blocks <= 4)
    splits = std::clamp<int64_t>(threads / (p.batch * block_ranges), 1, ceil_div(p.memory, 2048));
  const int64_t split = ceil_div(ceil_div(p.memory, splits), 64) * 64;
  splits = ceil_div(p.memory, split);
  const int64_t split_stride = p.batch * p.queries * k;
  auto scores = uninitialised(splits * split_stride);
  std::unique_ptr<int32_t[]> candidates(new int32_t[splits * split_stride]);
  call.for_ranges(block_ranges * splits, 1, [&](int64_t batch, int64_t task, int64_t) {
    const int64_t b0 = task / splits * blocks, s = task % splits;
    const int64_t at = s * split_stride + (batch * p.queries + b0 * call.k.rows) * k;
    call.k.match(p, packed, batch, b0, std::min(packed.blocks, b0 + blocks), s * split,
                 std::min(p.memory, (s + 1) * split), k, scores.get() + at, candidates.get() + at);
  });
  parallel_for(0, p.batch * p.queries, 64, [&](int64_t q0, int64_t q1) {
    call.k.finish(scores.get(), candidates.get(), splits, split_stride, q0, q1, k, data_of<int64_t>(indices),
                  data_of<float>(weights));
  });
  return {indices, weights};
}

std::tuple<Tensor, Tensor> memory_read_dense(Tensor query_key, Tensor memory_key,
                                             std::optional<Tensor> shrinkage, std::optional<Tensor> selection,
                                             std::optional<Tensor> memory_mask, std::optional<Tensor> centers,
                                             std::optional<Tensor> precision, bool l2, double scale,
                                             Tensor memory_value) {
  Call call =
      make_call(query_key, memory_key, shrinkage, selection, memory_mask, centers, precision, l2, scale);
  const Problem& p = call.p;
  const Values values = values_of(memory_value);
  STD_TORCH_CHECK(count_of(memory_value, 3) == p.memory,
                  "memory_value must hold one entry per memory position");
  const Tensor read =
      make(query_key, {p.batch, values.objects, values.channels, p.queries}, ScalarType::Float);
  const Tensor lse = make(query_key, {p.batch, p.queries}, ScalarType::Float);
  if (p.batch * p.queries == 0) return {read, lse};
  call.pack();
  // The accumulators of a task's queries should stay in cache.
  const int64_t row_bytes = std::max<int64_t>(1, values.objects * values.channels) * 4 * call.k.rows;
  const int64_t blocks = call.chunk(call.packed.blocks, std::max<int64_t>(4, kCacheBytes / row_bytes), 1);
  call.for_ranges(call.packed.blocks, blocks, [&](int64_t batch, int64_t b0, int64_t b1) {
    call.k.dense(p, call.packed, values, batch, b0, b1, data_of<float>(read), data_of<float>(lse));
  });
  return {read, lse};
}

Tensor memory_usage(Tensor query_key, Tensor memory_key, std::optional<Tensor> shrinkage,
                    std::optional<Tensor> selection, std::optional<Tensor> memory_mask,
                    std::optional<Tensor> centers, std::optional<Tensor> precision, bool l2, double scale,
                    Tensor lse) {
  Call call =
      make_call(query_key, memory_key, shrinkage, selection, memory_mask, centers, precision, l2, scale);
  const Problem& p = call.p;
  const float* norms = floats_of(lse, "lse");
  const Tensor usage = make(query_key, {p.batch, p.memory}, ScalarType::Float);
  call.pack();
  call.for_ranges(p.memory, call.chunk(p.memory, 4096, 64), [&](int64_t batch, int64_t m0, int64_t m1) {
    call.k.usage(p, call.packed, batch, m0, m1, norms, data_of<float>(usage));
  });
  return usage;
}

Tensor memory_best_query(Tensor query_key, Tensor memory_key, std::optional<Tensor> shrinkage,
                         std::optional<Tensor> selection, std::optional<Tensor> memory_mask, bool l2,
                         double scale, std::optional<Tensor> log_prior, std::optional<Tensor> gain,
                         int64_t window) {
  Call call = make_call(query_key, memory_key, shrinkage, selection, memory_mask, {}, {}, l2, scale);
  Problem& p = call.p;
  p.log_prior = floats_of(log_prior, "log_prior");
  p.gain = floats_of(gain, "gain");
  p.window = window;
  const Tensor best = make(query_key, {p.batch, p.memory}, ScalarType::Long);
  call.pack();
  call.for_ranges(p.memory, call.chunk(p.memory, 4096, 64), [&](int64_t batch, int64_t m0, int64_t m1) {
    call.k.best_query(p, call.packed, batch, m0, m1, data_of<int64_t>(best));
  });
  return best;
}

struct MatchTensors {
  const int64_t* indices;
  const float* weights;
  int64_t batch, queries;
  int k;

  MatchTensors(const Tensor& i, const Tensor& w)
      : indices(static_cast<const int64_t*>(i.const_data_ptr())),
        weights(static_cast<const float*>(w.const_data_ptr())),
        batch(i.size(0)),
        queries(i.size(1)),
        k(int(i.size(2))) {
    STD_TORCH_CHECK(i.scalar_type() == ScalarType::Long && w.scalar_type() == ScalarType::Float &&
                        i.is_contiguous() && w.is_contiguous() && w.numel() == i.numel(),
                    "indices and weights must be contiguous int64 and float32 of one shape");
  }
};

// Channels of a task: whole blocks, one for each thread or more.
int64_t channel_chunk(int64_t channels) {
  const int64_t blocks = ceil_div(channels, kChannelBlock), threads = get_num_threads();
  return ceil_div(blocks, ceil_div(blocks, ceil_div(blocks, std::max<int64_t>(1, threads)))) * kChannelBlock;
}

Tensor memory_gather(Tensor indices, Tensor weights, Tensor memory_value) {
  const Kernels& k = kernels();
  const MatchTensors m(indices, weights);
  const Values values = values_of(memory_value);
  const int64_t memory = count_of(memory_value, 3), channels = values.objects * values.channels;
  const Tensor read =
      make(memory_value, {m.batch, values.objects, values.channels, m.queries}, ScalarType::Float);
  if (read.numel() == 0) return read;
  if (values.value.channel_stride == 1) {
    for (int64_t batch = 0; batch < m.batch; ++batch)
      parallel_for(0, ceil_div(m.queries, 16), 1, [&](int64_t b, int64_t e) {
        k.gather_rows(values, batch, m.indices, m.weights, m.k, m.queries, b * 16,
                      std::min(m.queries, e * 16), data_of<float>(read));
      });
    return read;
  }
  const int64_t chunk = channel_chunk(channels), each = ceil_div(channels, chunk);
  parallel_for(0, m.batch * each, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t c0 = task % each * chunk;
      k.gather_channels(values, task / each, memory, m.indices, m.weights, m.k, m.queries, c0,
                        std::min(channels, c0 + chunk), data_of<float>(read));
    }
  });
  return read;
}

// Deterministic: every channel block is summed by one thread in order, and the partial gradients of the
// weights are added in order of the blocks.
std::tuple<Tensor, Tensor> memory_gather_backward(Tensor grad_read, Tensor indices, Tensor weights,
                                                  Tensor memory_value, bool need_value) {
  const Kernels& k = kernels();
  const MatchTensors m(indices, weights);
  const Values values = values_of(memory_value);
  const int64_t memory = count_of(memory_value, 3), channels = values.objects * values.channels;
  const float* grad = floats_of(grad_read, "grad_read");
  const Tensor grad_weights = make(memory_value, {m.batch, m.queries, m.k}, ScalarType::Float);
  const Tensor grad_value = make(
      memory_value, {m.batch, values.objects, values.channels, need_value ? memory : 0}, ScalarType::Float);
  const int64_t size = m.queries * m.k;
  std::memset(grad_weights.mutable_data_ptr(), 0, sizeof(float) * m.batch * size);
  if (m.batch * channels == 0 || size == 0) {
    std::memset(grad_value.mutable_data_ptr(), 0, sizeof(float) * grad_value.numel());
    return {grad_weights, grad_value};
  }
  const int64_t chunk = channel_chunk(channels), each = ceil_div(channels, chunk);
  std::vector<float> partial(each * size);
  for (int64_t batch = 0; batch < m.batch; ++batch) {
    std::fill(partial.begin(), partial.end(), 0.f);
    parallel_for(0, each, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t c0 = task * chunk;
        k.gather_backward(values, batch, memory, m.indices, m.weights, m.k, m.queries, c0,
                          std::min(channels, c0 + chunk), grad, partial.data() + task * size,
                          need_value ? data_of<float>(grad_value) : nullptr);
      }
    });
    float* sum = data_of<float>(grad_weights) + batch * size;
    for (int64_t task = 0; task < each; ++task)
      for (int64_t i = 0; i < size; ++i) sum[i] += partial[task * size + i];
  }
  return {grad_weights, grad_value};
}

}  // namespace
}  // namespace vosops

STABLE_TORCH_LIBRARY_IMPL(vosops, CPU, m) {
  m.impl("memory_match", TORCH_BOX(&vosops::memory_match));
  m.impl("memory_gather", TORCH_BOX(&vosops::memory_gather));
  m.impl("memory_gather_backward", TORCH_BOX(&vosops::memory_gather_backward));
  m.impl("memory_read_dense", TORCH_BOX(&vosops::memory_read_dense));
  m.impl("memory_usage", TORCH_BOX(&vosops::memory_usage));
  m.impl("memory_best_query", TORCH_BOX(&vosops::memory_best_query));
}
