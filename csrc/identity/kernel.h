// SPDX-License-Identifier: Apache-2.0
// The convolution of a one-hot mask as a sum of rows of the weights: for every tap of the kernel one row,
// that of the label under it. A block of channels is repacked as [class][tap][channel], which stays in cache.
#pragma once
#include "../common/buffer.h"
#include "../common/load.h"
#include "problem.h"

namespace vosops::VOSOPS_ISA {

constexpr int kIdentityChannels = 64;  // of a block: 11 classes of 17 x 17 taps take 800 KiB
constexpr int kIdentityRun = 64;       // output cells of a row taken together

// Calls f(batch, y, x, count) for runs of output cells in rows [first, last) of the flattened batch.
template <class F>
inline void for_runs(const IdentityProblem& p, int64_t first, int64_t last, const F& f) {
  for (int64_t row = first; row < last; ++row)
    for (int64_t x = 0; x < p.out_width; x += kIdentityRun)
      f(row / p.out_height, row % p.out_height, x, int(least<int64_t>(kIdentityRun, p.out_width - x)));
}

// Calls f(cell of the run, weights' rows) for every run and row of the kernel; the latter yields, in turn,
// the row of the weights of every tap that lies on a label. Rows of the kernel are outside: theirs of the
// weights then stay in the first cache.
template <class F>
inline void for_kernel_rows(const IdentityProblem& p, int64_t batch, int64_t y, int64_t x, int count,
                            const F& f) {
  const int64_t top = y * p.stride - p.padding;
  const int64_t dy0 = most<int64_t>(0, -top), dy1 = least(p.kernel_height, p.height - top);
  for (int64_t dy = dy0; dy < dy1; ++dy) {
    const int32_t* labels = p.first_row + (batch * p.height + top + dy) * p.width;
    for (int i = 0; i < count; ++i) {
      const int64_t left = (x + i) * p.stride - p.padding;
      const int64_t dx0 = most<int64_t>(0, -left), dx1 = least(p.kernel_width, p.width - left);
      f(i, [&](const auto& add) {
        for (int64_t dx = dx0; dx < dx1; ++dx)
          if (const int32_t label = labels[left + dx]; label >= 0) add(label + dy * p.kernel_width + dx);
      });
    }
  }
}

// Channels [c0, c0 + kIdentityChannels) of output rows [first, last) of the flattened batch:
// embedding [B][channels][cells]. `bias` may be null.
inline void identity(const IdentityProblem& p, const Operand& weight, const float* bias, int64_t c0,
                     int64_t first, int64_t last, float* embedding) {
  constexpr int kBlockVecs = kIdentityChannels / kLanes;
  const int channels = int(least<int64_t>(kIdentityChannels, p.channels - c0));
  const int64_t rows = p.classes * p.taps();
  Buffer<float> block(rows * kIdentityChannels, 0.f);
  int64_t where[kMaxRun];
  for (int64_t row = 0; row < rows; row += kMaxRun) {
    const int count = int(least<int64_t>(kMaxRun, rows - row));
    const bool consecutive = offsets_of(weight.positions, row, count, where);
    for (int i = 0; i < count; ++i) where[i] += c0 * weight.channel_stride;
    load_position_major(weight, base_of(weight, 0), channels, where, count, consecutive,
                        &block[row * kIdentityChannels], kIdentityChannels);
  }
  float start[kIdentityChannels] = {};
  if (bias) std::memcpy(start, bias + c0, sizeof(float) * channels);
  Buffer<float> run(kIdentityRun * kIdentityChannels);
  for_runs(p, first, last, [&](int64_t batch, int64_t y, int64_t x, int count) {
    for (int i = 0; i < count; ++i) std::memcpy(&run[i * kIdentityChannels], start, sizeof start);
    for_kernel_rows(p, batch, y, x, count, [&](int i, const auto& rows) {
      float* to = &run[i * kIdentityChannels];
      Vec sum[kBlockVecs];
      for (int v = 0; v < kBlockVecs; ++v) sum[v] = load(to + v * kLanes);
      rows([&](int64_t row) {
        for (int v = 0; v < kBlockVecs; ++v) sum[v] += load(&block[row * kIdentityChannels + v * kLanes]);
      });
      for (int v = 0; v < kBlockVecs; ++v) store(to + v * kLanes, sum[v]);
    });
    transpose(run.data(), kIdentityChannels, count, channels,
              embedding + (batch * p.channels + c0) * p.positions() + y * p.out_width + x, p.positions());
  });
}

// Gradient of the weights [channels][class][tap] from grad [B][channels][cells], for the same channels.
inline void identity_backward(const IdentityProblem& p, int64_t c0, const float* grad, float* grad_weight) {
  constexpr int kBlockVecs = kIdentityChannels / kLanes;
  const int channels = int(least<int64_t>(kIdentityChannels, p.channels - c0));
  const int64_t rows = p.classes * p.taps();
  Buffer<float> block(rows * kIdentityChannels, 0.f);
  Buffer<float> run(kIdentityRun * kIdentityChannels, 0.f);
  for_runs(p, 0, p.batch * p.out_height, [&](int64_t batch, int64_t y, int64_t x, int count) {
    transpose(grad + (batch * p.channels + c0) * p.positions() + y * p.out_width + x, p.positions(), channels,
              count, run.data(), kIdentityChannels);
    for_kernel_rows(p, batch, y, x, count, [&](int i, const auto& rows) {
      Vec g[kBlockVecs];
      for (int v = 0; v < kBlockVecs; ++v) g[v] = load(&run[i * kIdentityChannels + v * kLanes]);
      rows([&](int64_t row) {
        for (int v = 0; v < kBlockVecs; ++v) {
          float* to = &block[row * kIdentityChannels + v * kLanes];
          store(to, load(to) + g[v]);
        }
      });
    });
  });
  transpose(block.data(), kIdentityChannels, int(rows), channels, grad_weight + c0 * rows, rows);
}

}  // namespace vosops::VOSOPS_ISA
