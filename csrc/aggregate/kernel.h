// SPDX-License-Identifier: Apache-2.0
// Soft aggregation: bg = prod_o (1 - p_o), logits log(c / (1 - c)) of the clamped probabilities.
#pragma once
#include "../common/buffer.h"
#include "../common/load.h"

namespace vosops::VOSOPS_ISA {

constexpr float kLow = 1e-7f, kHigh = 1 - 1e-7f;

inline Vec clamp(Vec x) {
  const Vec above = x < kLow ? set1(kLow) : x;
  return above > kHigh ? set1(kHigh) : above;
}

inline Vec logit(Vec x) {
  const Vec c = clamp(x);
  return log(c / (1.f - c));
}

// d logit / dx: 0 outside the clamp.
inline Vec logit_slope(Vec x) {
  const Vec slope = 1.f / (x * (1.f - x));
  return x < kLow ? Vec{} : (x > kHigh ? Vec{} : slope);
}

// Probabilities of one object at positions [s, s + count) of a batch entry, padded to whole vectors.
inline void load_probabilities(const Operand& p, int64_t batch, int64_t object, int64_t s, int count,
                               float* out) {
  int64_t where[kMaxRun];
  const bool consecutive = offsets_of(p.positions, s, count, where);
  const void* base = base_of(p, batch);
  for (int i = 0; i < count; ++i) where[i] += object * p.channel_stride;
  fill(out, kMaxRun, 0.5f);
  with_loader(p.dtype, [&](auto loader) {
    if (consecutive) return copy_run<decltype(loader)::kType>(base, where[0], count, out);
    for (int i = 0; i < count; ++i) out[i] = loader.at(base, where[i]);
  });
}

inline void store_run(float* to, const float* from, int count) {
  std::memcpy(to, from, sizeof(float) * count);
}

// logits [objects + 1][positions] of one batch entry, positions [s0, s1).
inline void aggregate(const Operand& p, int64_t batch, int64_t objects, int64_t positions, int64_t s0,
                      int64_t s1, float* logits) {
  float x[kMaxRun], y[kMaxRun], background[kMaxRun];
  float* out = logits + batch * (objects + 1) * positions;
  for (int64_t s = s0; s < s1; s += kMaxRun) {
    const int count = int(least<int64_t>(kMaxRun, s1 - s));
    fill(background, kMaxRun, 1);
    for (int64_t o = 0; o < objects; ++o) {
      load_probabilities(p, batch, o, s, count, x);
      for (int i = 0; i < kMaxRun; i += kLanes) {
        const Vec v = load(x + i);
        store(background + i, load(background + i) * (1.f - v));
        store(y + i, logit(v));
      }
      store_run(out + (o + 1) * positions + s, y, count);
    }
    for (int i = 0; i < kMaxRun; i += kLanes) store(y + i, logit(load(background + i)));
    store_run(out + s, y, count);
  }
}

// Gradient [objects][positions] to the probabilities from grad [objects + 1][positions].
inline void aggregate_backward(const Operand& p, int64_t batch, int64_t objects, int64_t positions,
                               int64_t s0, int64_t s1, const float* grad, float* grad_p) {
  Buffer<float> x(objects * kMaxRun), before((objects + 1) * kMaxRun);  // before: prod over earlier objects
  float g[kMaxRun], after[kMaxRun], y[kMaxRun];
  const float* in = grad + batch * (objects + 1) * positions;
  float* out = grad_p + batch * objects * positions;
  for (int64_t s = s0; s < s1; s += kMaxRun) {
    const int count = int(least<int64_t>(kMaxRun, s1 - s));
    fill(&before[0], kMaxRun, 1);
    for (int64_t o = 0; o < objects; ++o) {
      load_probabilities(p, batch, o, s, count, &x[o * kMaxRun]);
      for (int i = 0; i < kMaxRun; i += kLanes)
        store(&before[(o + 1) * kMaxRun + i],
              load(&before[o * kMaxRun + i]) * (1.f - load(&x[o * kMaxRun + i])));
    }
    fill(g, kMaxRun, 0);
    store_run(g, in + s, count);
    for (int i = 0; i < kMaxRun; i += kLanes)  // gradient of the background's logit to the background
      store(g + i, load(g + i) * logit_slope(load(&before[objects * kMaxRun + i])));
    fill(after, kMaxRun, 1);
    for (int64_t o = objects - 1; o >= 0; --o) {
      fill(y, kMaxRun, 0);
      store_run(y, in + (o + 1) * positions + s, count);
      for (int i = 0; i < kMaxRun; i += kLanes) {
        const Vec v = load(&x[o * kMaxRun + i]), others = load(&before[o * kMaxRun + i]) * load(after + i);
        store(y + i, load(y + i) * logit_slope(v) - load(g + i) * others);
        store(after + i, load(after + i) * (1.f - v));
      }
      store_run(out + o * positions + s, y, count);
    }
  }
}

}  // namespace vosops::VOSOPS_ISA
