// SPDX-License-Identifier: Apache-2.0
// The read of what was matched, sum_k w_k v_k. Index -1 is no entry; an index past the memory reads as NaN,
// because the device cannot raise.
#pragma once
#include "../common/cuda_numbers.cuh"

namespace vosops::gpu {

constexpr int kGatherThreads = 256;
constexpr int kGatherRows = 16;  // queries, or memory positions, of a block
constexpr int kGatherLane = 8;   // channels of a lane
constexpr int kGatherChannels = 32 * kGatherLane;
constexpr int kGatherStride =
    kGatherChannels + 4;  // of a row in shared memory: no bank conflicts to speak of

struct Gather {
  Operand value;  // [B, O, Cv, position]
  int batch = 0, objects = 0, channels = 0, queries = 0, memory = 0, k = 0;
  const int64_t* indices = nullptr;  // [B, Q, k]
  const float* weights = nullptr;    // [B, Q, k]
  float* read = nullptr;             // [B, O, Cv, Q]
};

// Whether eight channels are one aligned run in every row.
inline bool has_channel_runs(const Gather& p) {
  const int elements = 16 / (p.value.dtype == DType::kFloat ? 4 : 2);
  const auto multiple = [&](int64_t stride) { return stride % elements == 0; };
  bool yes = p.value.channel_stride == 1 && p.channels % kGatherLane == 0 &&
             reinterpret_cast<uintptr_t>(p.value.data) % 16 == 0 && multiple(p.value.batch_stride) &&
             multiple(p.value.object_stride);
  for (int d = 0; d < p.value.positions.dims; ++d) yes = yes && multiple(p.value.positions.stride[d]);
  return yes;
}

struct Eight {
  float x[kGatherLane];
};

// Eight consecutive elements of type T (float, Half, BFloat16).
template <class T>
VOSOPS_DEVICE Eight load_eight(const void* data, int64_t at) {
  Eight out;
  if constexpr (sizeof(T) == sizeof(float)) {
    const auto* from = reinterpret_cast<const float4*>(static_cast<const float*>(data) + at);
    const float4 a = from[0], b = from[1];
    out = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
  } else {
    const uint4 w = *reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(data) + at);
    const Pair a = T::unpack(w.x), b = T::unpack(w.y), c = T::unpack(w.z), d = T::unpack(w.w);
    out = {a.first, a.second, b.first, b.second, c.first, c.second, d.first, d.second};
  }
  return out;
}

// Rows of kGatherChannels sums, one per query or position, go out as [channel][row], rows `stride` apart.
VOSOPS_DEVICE void store_transposed(const float* sums, int channels, int rows, float* to, int64_t stride) {
  sync_block();
  const int row = thread_index() % kGatherRows;
  if (row < rows)
    for (int c = thread_index() / kGatherRows; c < channels; c += kGatherThreads / kGatherRows)
      to[c * stride + row] = sums[row * kGatherStride + c];
}

VOSOPS_DEVICE void store_eight(float* sums, int row, const Eight& sum) {
  auto* to = reinterpret_cast<float4*>(sums + row * kGatherStride + lane() * kGatherLane);
  to[0] = float4{sum.x[0], sum.x[1], sum.x[2], sum.x[3]};
  to[1] = float4{sum.x[4], sum.x[5], sum.x[6], sum.x[7]};
}

// A block: 16 queries (block_x) and 256 channels of one object (block_y), a warp per query. A warp reads 32
// indices at once and keeps eight rows in flight.
template <class T>
VOSOPS_DEVICE void gather_block(const Gather& p, float* sums) {
  const int parts = (p.channels + kGatherChannels - 1) / kGatherChannels;
  const int object = block_y() / parts, c0 = block_y() % parts * kGatherChannels, batch = block_z();
  const int first = block_x() * kGatherRows, channel = c0 + lane() * kGatherLane;
  const int64_t base = batch * p.value.batch_stride + object * p.value.object_stride + channel;
  for (int row = warp(); row < kGatherRows && first + row < p.queries; row += kGatherThreads / 32) {
    const int64_t entry = (int64_t(batch) * p.queries + first + row) * p.k;
    Eight sum = {};
    for (int j0 = 0; j0 < p.k; j0 += 32) {
      int64_t offset = -1;
      float weight = 0;
      if (j0 + lane() < p.k) {
        const int64_t index = p.indices[entry + j0 + lane()];
        if (index >= p.memory)
          weight = not_a_number();
        else if (index >= 0) {
          weight = p.weights[entry + j0 + lane()];
          offset = offset_of(p.value.positions, int(index));
        }
      }
      const int count = p.k - j0 < 32 ? p.k - j0 : 32;
      for (int j = 0; j < count; j += 8) {
        Eight v[8];
        float w[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const int64_t at = shuffle(offset, j + i);
          w[i] = shuffle(weight, j + i);
          v[i] = Eight{};
          if (at >= 0 && channel < p.channels) v[i] = load_eight<T>(p.value.data, base + at);
        }
#pragma unroll
        for (int i = 0; i < 8; ++i)
#pragma unroll
          for (int c = 0; c < kGatherLane; ++c) sum.x[c] += w[i] * v[i].x[c];
      }
    }
    store_eight(sums, row, sum);
  }
  const int channels = p.channels - c0 < kGatherChannels ? p.channels - c0 : kGatherChannels;
  const int rows = p.queries - first < kGatherRows ? p.queries - first : kGatherRows;
  store_transposed(sums, channels, rows,
                   p.read + ((int64_t(batch) * p.objects + object) * p.channels + c0) * p.queries + first,
                   p.queries);
}

// Any strides: a thread per query (block_x) and eight channels (block_y) of the flattened (object, channel).
VOSOPS_DEVICE void gather_any(const Gather& p) {
  const int query = block_x() * kGatherThreads + thread_index(), batch = block_z();
  const int first = block_y() * kGatherLane, all = p.objects * p.channels;
  if (query >= p.queries) return;
  int64_t base[kGatherLane];
  Eight sum = {};
#pragma unroll
  for (int i = 0; i < kGatherLane; ++i) {
    const int c = first + i < all ? first + i : all - 1;
    base[i] = batch * p.value.batch_stride + c / p.channels * p.value.object_stride +
              c % p.channels * p.value.channel_stride;
  }
  const int64_t entry = (int64_t(batch) * p.queries + query) * p.k;
  for (int j = 0; j < p.k; ++j) {
    const int64_t index = p.indices[entry + j];
    if (index < 0) continue;
    const bool outside = index >= p.memory;
    const int64_t offset = outside ? 0 : offset_of(p.value.positions, int(index));
    const float weight = outside ? not_a_number() : p.weights[entry + j];
#pragma unroll
    for (int i = 0; i < kGatherLane; ++i)
      sum.x[i] += weight * (outside ? 0 : element(p.value.data, p.value.dtype, base[i] + offset));
  }
#pragma unroll
  for (int i = 0; i < kGatherLane; ++i)
    if (first + i < all) p.read[(int64_t(batch) * all + first + i) * p.queries + query] = sum.x[i];
}

}  // namespace vosops::gpu
