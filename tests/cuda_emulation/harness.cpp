// SPDX-License-Identifier: Apache-2.0
// The device code of the top-k match and of the read, run on the host block by block.
#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>

#include "memory_read/cuda_gather_backward.cuh"
#include "memory_read/cuda_match.cuh"
#include "memory_read/cuda_merge.cuh"

namespace {

using namespace vosops::gpu;

// What emulation.py passes: the kernels' own structures may change without it.
struct View {
  const void* data;
  int32_t dtype;
  int64_t batch_stride, object_stride, channel_stride;
  int32_t dims;
  int64_t size[6], stride[6];

  vosops::Operand operand() const {
    vosops::Operand out;
    out.data = data;
    out.dtype = static_cast<vosops::DType>(dtype);
    out.batch_stride = batch_stride;
    out.object_stride = object_stride;
    out.channel_stride = channel_stride;
    out.positions.dims = dims;
    std::copy(size, size + dims, out.positions.size);
    std::copy(stride, stride + dims, out.positions.stride);
    return out;
  }
};

struct MatchCall {
  View query, key, shrinkage, selection, mask;
  const float *centers, *precision;
  int32_t batch, channels, queries, memory, grid_width, l2;
  float scale;
  int32_t k, capacity;
  int64_t* indices;
  float* weights;
};

struct GatherCall {
  View value;
  int32_t batch, objects, channels, queries, memory, k;
  const int64_t* indices;
  const float* weights;
  float* read;

  Gather arguments() const {
    Gather p;
    p.value = value.operand();
    p.batch = batch, p.objects = objects, p.channels = channels;
    p.queries = queries, p.memory = memory, p.k = k;
    p.indices = indices, p.weights = weights, p.read = read;
    return p;
  }
};

template <class T, bool Selection>
void launch(Emulator& emulator, const Match& p) {
  const size_t bytes = shared_bytes(Selection, p.channels, p.capacity);
  std::unique_ptr<uint8_t[]> memory(new uint8_t[bytes + 1024]);
  auto* shared =
      reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(memory.get()) + 1023) & ~uintptr_t(1023));
  for (int z = 0; z < p.batch; ++z)
    for (int y = 0; y < p.splits; ++y)
      for (int x = 0; x < (p.queries + kRows - 1) / kRows; ++x) {
        std::memset(shared, 0xff, bytes);  // NaN
        emulator.run(kThreads, x, y, z, [&] { match_block<T, Selection, false>(p, shared); });
      }
}

template <class T, bool Selection>
void match(const Match& p, int sample_tiles, int seed) {
  Emulator emulator;
  emulator.random.seed(seed);
  if (sample_tiles) launch<T, Selection>(emulator, sample_of(p, sample_tiles, 2));
  launch<T, Selection>(emulator, p);
  const int blocks = (p.batch * p.queries + kMergeWarps - 1) / kMergeWarps;
  std::vector<uint64_t> lists(kMergeWarps * kMergeEntries);
  for (int x = 0; x < blocks; ++x) {
    std::fill(lists.begin(), lists.end(), ~uint64_t(0));
    emulator.run(kMergeWarps * 32, x, 0, 0, [&] { merge_warp(p, lists.data()); });
  }
}

int blocks_for(int64_t count, int64_t each) { return int((count + each - 1) / each); }

// Calls f() as every block of a grid of gather blocks.
template <class F>
void for_grid(Emulator& emulator, int x, int y, int z, const F& f) {
  for (int k = 0; k < z; ++k)
    for (int j = 0; j < y; ++j)
      for (int i = 0; i < x; ++i) emulator.run(kGatherThreads, i, j, k, f);
}

template <class F>
void with_type(vosops::DType type, const F& f) {
  if (type == vosops::DType::kFloat)
    f(float());
  else if (type == vosops::DType::kHalf)
    f(Half());
  else
    f(BFloat16());
}

}  // namespace

extern "C" {

int size_of_gather() { return int(sizeof(GatherCall)); }

// Returns whether the fast path ran.
int emulate_gather(const GatherCall* call, int seed) {
  const Gather p = call->arguments();
  Emulator emulator;
  emulator.random.seed(seed);
  if (!has_channel_runs(p)) {
    for_grid(emulator, blocks_for(p.queries, kGatherThreads), blocks_for(p.objects * p.channels, kGatherLane),
             p.batch, [&] { gather_any(p); });
    return 0;
  }
  alignas(16) float sums[kGatherRows * kGatherStride];
  with_type(p.value.dtype, [&](auto type) {
    for_grid(emulator, blocks_for(p.queries, kGatherRows),
             p.objects * blocks_for(p.channels, kGatherChannels), p.batch,
             [&] { gather_block<decltype(type)>(p, sums); });
  });
  return 1;
}

void emulate_gather_backward(const GatherCall* call, const float* grad, float* grad_weights,
                             float* grad_value, int seed) {
  Emulator emulator;
  emulator.random.seed(seed);
  GatherBackward p;
  p.forward = call->arguments();
  const Gather& f = p.forward;
  const int all = f.objects * f.channels, each = f.queries * f.k;
  std::vector<float> rows(size_t(f.batch) * f.queries * all + 4, NAN), sums(kGatherRows * kGatherStride + 4);
  std::vector<int32_t> keys(size_t(f.batch) * each), sorted(keys.size()), starts(f.batch * (f.memory + 1));
  std::vector<int64_t> entries(keys.size());
  const auto align = [](std::vector<float>& x) {
    return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(x.data()) + 15) & ~uintptr_t(15));
  };
  p.grad = grad, p.grad_rows = align(rows), p.grad_weights = grad_weights, p.grad_value = grad_value;
  p.keys = keys.data(), p.sorted = sorted.data(), p.entries = entries.data(), p.starts = starts.data();
  float* const memory = align(sums);
  for_grid(emulator, blocks_for(f.queries, kTurn), blocks_for(all, kTurn), f.batch,
           [&] { turn_block(p, memory); });
  const int warps = blocks_for(f.queries, kGatherThreads / 32);
  if (has_channel_runs(f))
    with_type(f.value.dtype, [&](auto type) {
      for_grid(emulator, warps, 1, f.batch, [&] { grad_weights_warp<decltype(type), true>(p); });
    });
  else
    for_grid(emulator, warps, 1, f.batch, [&] { grad_weights_warp<float, false>(p); });
  const auto thread = [] { return int64_t(block_x()) * kGatherThreads + thread_index(); };
  for_grid(emulator, blocks_for(int64_t(f.batch) * each, kGatherThreads), 1, 1,
           [&] { keys_thread(p, thread()); });
  for (int b = 0; b < f.batch; ++b) {  // torch.sort on the device
    int64_t* const to = entries.data() + b * each;
    const int32_t* const from = keys.data() + b * each;
    std::iota(to, to + each, 0);
    std::stable_sort(to, to + each, [&](int64_t i, int64_t j) { return from[i] < from[j]; });
    for (int i = 0; i < each; ++i) sorted[b * each + i] = from[to[i]];
  }
  for_grid(emulator, blocks_for(starts.size(), kGatherThreads), 1, 1, [&] { starts_thread(p, thread()); });
  for_grid(emulator, blocks_for(f.memory, kGatherRows), blocks_for(all, kGatherChannels), f.batch, [&] {
    if (all % kGatherLane == 0)
      grad_value_block<true>(p, memory);
    else
      grad_value_block<false>(p, memory);
  });
}

int size_of_match() { return int(sizeof(MatchCall)); }

// In `wanted_splits` shares; the first threshold comes from `sample_tiles` tiles, if any. Returns the Run.
int emulate_match(const MatchCall* call, int wanted_splits, int sample_tiles, int seed) {
  Match p;
  p.query = call->query.operand(), p.key = call->key.operand(), p.mask = call->mask.operand();
  p.shrinkage = call->shrinkage.operand(), p.selection = call->selection.operand();
  p.centers = call->centers, p.precision = call->precision;
  p.batch = call->batch, p.channels = call->channels, p.queries = call->queries, p.memory = call->memory;
  p.grid_width = call->grid_width, p.l2 = call->l2 != 0, p.scale = call->scale;
  p.k = call->k, p.capacity = call->capacity, p.indices = call->indices, p.weights = call->weights;
  p.key_run = run_of(p.key);
  p.tiles = (p.memory + kCols - 1) / kCols;
  cut_tiles(p, wanted_splits);
  std::vector<uint64_t> kept(size_t(p.batch) * p.queries * p.splits * p.k, ~uint64_t(0));
  std::vector<uint32_t> groups(size_t(p.batch) * p.queries * kCols, 0);
  p.kept = kept.data();
  p.groups = sample_tiles ? groups.data() : nullptr;
  const bool half = p.key.dtype == vosops::DType::kHalf, selection = bool(p.selection);
  (half        ? selection ? match<Half, true> : match<Half, false>
   : selection ? match<BFloat16, true>
               : match<BFloat16, false>)(p, sample_tiles, seed);
  return int(p.key_run);
}
}
