// SPDX-License-Identifier: Apache-2.0
// Whole passes over a call, cut into tasks: what the memory read and attention have in common.
#pragma once
#include "call.h"

namespace vosops {

// The k best of every query, best first: indices and weights [B, Q, k].
inline void match_all(Call& call, int k, int64_t* indices, float* weights) {
  const Problem& p = call.p;
  call.packed.pairs = true;
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
    call.k.finish(scores.get(), candidates.get(), splits, split_stride, q0, q1, k, indices, weights);
  });
}

// usage [B, M] from the log-sum-exp of every query.
inline void usage_all(Call& call, const float* norms, float* usage) {
  const Problem& p = call.p;
  call.pack();
  call.for_ranges(p.memory, call.chunk(p.memory, 4096, 64), [&](int64_t batch, int64_t m0, int64_t m1) {
    call.k.usage(p, call.packed, batch, m0, m1, norms, usage);
  });
}

// Gradients to the packed operands a [B, Q, depth] and b [B, M, depth], the bias [B, M] and the values
// [B, O, Cv, M], from that of the read [B, O, Cv, Q], delta and lse [B, Q]. Every task adds to queries of its
// own; their sums are added in order, so a run repeats bit for bit.
inline std::tuple<Tensor, Tensor, Tensor, Tensor> dense_backward_all(Call& call, const Values& values,
                                                                     const float* grad, const float* shift,
                                                                     const float* norms, const Tensor& like) {
  const Problem& p = call.p;
  const Kernels& k = call.k;
  call.pack();
  const int64_t depth = call.packed.depth, columns = values.objects * values.channels;
  const Tensor grad_left = make(like, {p.batch, p.queries, depth}, ScalarType::Float);
  const Tensor grad_right = make(like, {p.batch, p.memory, depth}, ScalarType::Float);
  const Tensor grad_bias = make(like, {p.batch, p.memory}, ScalarType::Float);
  const Tensor grad_value =
      make(like, {p.batch, values.objects, values.channels, p.memory}, ScalarType::Float);
  const int64_t rows = ceil_div(p.queries, k.chunk) * k.chunk, panel = rows * k.cols;
  const int64_t value_panels = ceil_div(columns, k.cols), key_panels = ceil_div(depth, k.cols);
  const int64_t chunk =
      ceil_div(ceil_div(p.memory, std::max<int64_t>(1, get_num_threads())), k.cols) * k.cols;
  const int64_t tasks = ceil_div(p.memory, chunk);
  auto grad_rows = uninitialised(value_panels * panel), left = uninitialised(key_panels * panel);
  std::vector<float> partial(tasks * key_panels * panel);
  for (int64_t batch = 0; batch < p.batch && p.queries > 0; ++batch) {
    parallel_for(0, value_panels, 1, [&](int64_t first, int64_t last) {
      k.pack_grad(grad + batch * columns * p.queries, columns, p.queries, first, last, grad_rows.get());
    });
    k.unpack_queries(call.packed, batch, p.queries, left.get());
    std::fill(partial.begin(), partial.end(), 0.f);
    parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task)
        k.dense_backward(p, call.packed, values, batch, task * chunk, std::min(p.memory, (task + 1) * chunk),
                         norms, shift, grad_rows.get(), left.get(),
                         partial.data() + task * key_panels * panel, data_of<float>(grad_right),
                         data_of<float>(grad_bias), data_of<float>(grad_value));
    });
    float* out = data_of<float>(grad_left) + batch * p.queries * depth;
    parallel_for(0, p.queries, 64, [&](int64_t q0, int64_t q1) {
      for (int64_t q = q0; q < q1; ++q)
        for (int64_t c = 0; c < depth; ++c) {
          float sum = 0;
          for (int64_t task = 0; task < tasks; ++task)
            sum += partial[((task * key_panels + c / k.cols) * rows + q) * k.cols + c % k.cols];
          out[q * depth + c] = sum;
        }
    });
  }
  if (p.queries == 0)
    for (const Tensor& x : {grad_right, grad_bias, grad_value})
      std::memset(x.mutable_data_ptr(), 0, sizeof(float) * x.numel());
  return {grad_left, grad_right, grad_bias, grad_value};
}

}  // namespace vosops
