// SPDX-License-Identifier: Apache-2.0
// The score as one product: both sides of s_ij = <a_i, b_j> + bias_j, packed for the register
// tile. q, k, e, r: query key, memory key (times its gate), selection, shrinkage.
//
//   dot                  a = scale q            b = k
//   l2                   a = 2 scale q          b = r k              bias = -norm_scale r |k|^2
//   l2 with selection    a = scale (2 e q, -e, -sum e q^2)   b = (r k, r k^2, r)
//   with log_prior       one more channel:  a = log_prior, b = gain
//
// Pairs: bfloat16 keys on both sides can stay as they are, a = q, b = k, and the product is scaled after:
// their products are exact, and the hardware multiplies two at a time.
#pragma once
#include <cmath>
#include <limits>

#include "../common/buffer.h"
#include "../common/load.h"
#include "problem.h"

namespace vosops::VOSOPS_ISA {

constexpr float kInf = std::numeric_limits<float>::infinity();

inline void layout(const Problem& p, PackedQueries& packed) {
  packed.depth = p.channels;
  packed.pairs = packed.pairs && kPairs && !p.selection && !p.shrinkage && !p.gate && !p.gain &&
                 !p.precision && p.query.dtype == DType::kBFloat16 && p.key.dtype == DType::kBFloat16;
  if (packed.pairs) packed.depth = (p.channels + 1) / 2;
  if (p.selection) packed.depth = 2 * p.channels + 1;
  if (p.gain) packed.depth += 1;
  packed.blocks = (p.queries + kRows - 1) / kRows;
}

// Query blocks [first, last) of one batch entry. Rows past the last query are 0.
inline void pack_queries(const Problem& p, PackedQueries& packed, int64_t batch, int64_t first,
                         int64_t last) {
  const int channels = p.channels, depth = packed.depth;
  const void* q_base = base_of(p.query, batch);
  const void* e_base = p.selection ? base_of(p.selection, batch) : nullptr;
  for (int64_t block = first; block < last; ++block) {
    float* out = packed.data + (batch * packed.blocks + block) * int64_t(depth) * kRows;
    std::memset(out, 0, sizeof(float) * depth * kRows);
    float norm = 0;
    for (int r = 0; r < kRows && block * kRows + r < p.queries; ++r) {
      const int64_t i = block * kRows + r;
      const int64_t q_at = offset(p.query.positions, i);
      if (packed.pairs) {
        const uint16_t* q = static_cast<const uint16_t*>(q_base) + q_at;
        uint16_t* words = reinterpret_cast<uint16_t*>(out);
        for (int c = 0; c < channels; ++c)
          words[(c / 2 * kRows + r) * 2 + c % 2] = q[c * p.query.channel_stride];
        continue;
      }
      const int64_t e_at = p.selection ? offset(p.selection.positions, i) : 0;
      double rest = 0;
      for (int c = 0; c < channels; ++c) {
        const float q = load_one(p.query, q_base, q_at + c * p.query.channel_stride);
        if (p.selection) {
          const float e = load_one(p.selection, e_base, e_at + c * p.selection.channel_stride);
          out[c * kRows + r] = 2 * p.scale * e * q;
          out[(channels + c) * kRows + r] = -p.scale * e;
          rest -= double(e) * q * q;
        } else {
          out[c * kRows + r] = (p.l2 ? 2 * p.scale : p.scale) * q;
        }
      }
      if (p.selection) out[2 * channels * kRows + r] = float(p.scale * rest);
      if (p.gain) out[(depth - 1) * kRows + r] = p.log_prior[batch * p.queries + i];
      float sum = 0;
      for (int c = 0; c < depth; ++c) sum += out[c * kRows + r] * out[c * kRows + r];
      norm = std::fmax(norm, std::sqrt(sum));
    }
    packed.norms[batch * packed.blocks + block] = norm;
  }
}

// kCols memory positions packed as [depth][kCols].
struct Panel {
  Buffer<float> data;
  float bias[kCols];
  float row[kCols], column[kCols], precision[kCols];  // centre and 1 / (2 sigma^2)
  int64_t first = 0;
  int count = 0;

  explicit Panel(const PackedQueries& packed) : data(int64_t(packed.depth) * kCols, 0.f) {}

  void pack(const Problem& p, int64_t batch, int64_t start, int64_t end, bool pairs = false) {
    first = start;
    count = int(end - start < kCols ? end - start : kCols);
    int64_t where[kCols];
    const bool consecutive = offsets_of(p.key.positions, start, count, where);
    if (pairs) return load_pairs(p, batch, where, consecutive);
    const int channels = p.channels;
    float* keys = data.data();
    if (count < kCols) fill(keys, int64_t(channels) * kCols, 0.f);
    load_channel_major(p.key, base_of(p.key, batch), channels, where, count, consecutive, keys, kCols);
    if (p.mask) hide_masked(p, batch, channels);
    float r[kCols];
    if (p.gate) {
      load_positions(p.gate, batch, r);
      multiply_positions(r, channels);
    }
    Vec square[kVecs] = {};
    for (int c = 0; c < channels; ++c)
      for (int v = 0; v < kVecs; ++v) {
        const Vec k = load(keys + c * kCols + v * kLanes);
        square[v] += k * k;
      }
    load_positions(p.shrinkage, batch, r);
    for (int v = 0; v < kVecs; ++v) {
      const bool with_norm = p.l2 && !p.selection;
      store(bias + v * kLanes, with_norm ? -p.norm_scale * load(r + v * kLanes) * square[v] : Vec{});
    }
    if (p.selection) {
      for (int c = 0; c < channels; ++c)
        for (int v = 0; v < kVecs; ++v) {
          float* at = keys + c * kCols + v * kLanes;
          const Vec k = load(at), rk = k * load(r + v * kLanes);
          store(at, rk);
          store(at + int64_t(channels) * kCols, rk * k);
        }
      std::memcpy(keys + int64_t(2 * channels) * kCols, r, sizeof r);
    } else if (p.shrinkage) {
      multiply_positions(r, channels);
    }
    if (p.gain) {
      float* last = data.data() + data.size() - kCols;
      for (int j = 0; j < kCols; ++j) last[j] = j < count ? p.gain[batch * p.memory + start + j] : 0;
    }
    for (int j = count; j < kCols; ++j) bias[j] = -kInf;
    if (p.mask) hide_bias(p, batch);
    if (p.precision) set_centers(p, batch);
  }

 private:
  // What an operand holds for the panel's positions; 1 where there is none.
  void load_positions(const Operand& x, int64_t batch, float* out) const {
    for (int j = 0; j < kCols; ++j) out[j] = 1;
    if (!x) return;
    const void* base = base_of(x, batch);
    for (int j = 0; j < count; ++j) out[j] = load_one(x, base, offset(x.positions, first + j));
  }
  void multiply_positions(const float* factor, int channels) {
    for (int c = 0; c < channels; ++c)
      for (int v = 0; v < kVecs; ++v) {
        float* at = data.data() + c * kCols + v * kLanes;
        store(at, load(at) * load(factor + v * kLanes));
      }
  }
  bool visible(const Problem& p, int64_t batch, int j) const {
    const uint8_t* mask = static_cast<const uint8_t*>(p.mask.data) + batch * p.mask.batch_stride;
    return mask[offset(p.mask.positions, first + j)] != 0;
  }
  // Two bfloat16 channels in each 32-bit word, the even one low.
  void load_pairs(const Problem& p, int64_t batch, const int64_t* where, bool consecutive) {
    const uint16_t* base = static_cast<const uint16_t*>(base_of(p.key, batch));
    const int channels = p.channels, words = (channels + 1) / 2;
    const int64_t step = count > 1 ? where[1] - where[0] : 0, stride = p.key.channel_stride;
    bool whole = stride == 1 && channels % 2 == 0 && step % 2 == 0;  // words lie whole in memory
    for (int j = 2; j < count; ++j) whole &= where[j] - where[j - 1] == step;
    if (count < kCols) fill(data.data(), int64_t(words) * kCols, 0.f);
    if (whole) {
      transpose(reinterpret_cast<const float*>(base + where[0]), step / 2, count, words, data.data(), kCols);
    } else {
      for (int c = 0; c < channels; c += 2) {
        const uint16_t* low = base + c * stride;
        const uint16_t* high = c + 1 < channels ? low + stride : nullptr;
        uint32_t word[kCols] = {};
        if (consecutive && high)
          for (int j = 0; j < count; ++j) word[j] = low[where[0] + j] | uint32_t(high[where[0] + j]) << 16;
        else
          for (int j = 0; j < count; ++j) word[j] = low[where[j]] | uint32_t(high ? high[where[j]] : 0) << 16;
        std::memcpy(data.data() + int64_t(c / 2) * kCols, word, sizeof word);
      }
    }
    if (p.mask) hide_masked(p, batch, words);
    Vec square[kVecs] = {};
    if (p.l2)
      for (int c = 0; c < words; ++c)
        for (int v = 0; v < kVecs; ++v) {
          VecI word;
          std::memcpy(&word, data.data() + c * kCols + v * kLanes, sizeof word);
          const VecI low_bits = word << 16, high_bits = word & int32_t(0xffff0000);
          Vec low, high;
          std::memcpy(&low, &low_bits, sizeof low);
          std::memcpy(&high, &high_bits, sizeof high);
          square[v] += low * low + high * high;
        }
    for (int v = 0; v < kVecs; ++v) store(bias + v * kLanes, -p.norm_scale * square[v]);
    for (int j = count; j < kCols; ++j) bias[j] = -kInf;
    if (p.mask) hide_bias(p, batch);
  }

  void hide_masked(const Problem& p, int64_t batch, int channels) {
    for (int j = 0; j < count; ++j)
      if (!visible(p, batch, j))
        for (int c = 0; c < channels; ++c) data[int64_t(c) * kCols + j] = 0;
  }
  void hide_bias(const Problem& p, int64_t batch) {
    for (int j = 0; j < count; ++j)
      if (!visible(p, batch, j)) bias[j] = -kInf;
  }
  void set_centers(const Problem& p, int64_t batch) {
    for (int j = 0; j < kCols; ++j) {
      const int64_t at = batch * p.memory + first + (j < count ? j : 0);
      row[j] = p.centers[2 * at];
      column[j] = p.centers[2 * at + 1];
      precision[j] = p.precision[at];
    }
  }
};

// Rows and columns on the query grid of one block of queries.
struct BlockCells {
  float row[kRows], column[kRows];
  BlockCells(const Problem& p, int64_t block) {
    for (int r = 0; r < kRows; ++r) {
      const int64_t i = block * kRows + r;
      row[r] = float(i / p.grid_width);
      column[r] = float(i % p.grid_width);
    }
  }
};

}  // namespace vosops::VOSOPS_ISA
