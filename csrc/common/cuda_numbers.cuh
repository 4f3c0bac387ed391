// SPDX-License-Identifier: Apache-2.0
// Elements of the operands as float, and scores as sortable keys.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda_lanes.cuh"
#include "operand.h"

namespace vosops::gpu {

// A pair of 16-bit elements in one word, the first in the low half.
struct Pair {
  float first, second;
};

struct BFloat16 {
  static constexpr bool kHalf = false;
  static constexpr DType kType = DType::kBFloat16;
  static VOSOPS_DEVICE Pair unpack(uint32_t w) { return {float_of(w << 16), float_of(w & 0xffff0000u)}; }
  static VOSOPS_DEVICE uint32_t pack(float first, float second) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
    return uint32_t(__bfloat16_as_ushort(pair.x)) | uint32_t(__bfloat16_as_ushort(pair.y)) << 16;
  }
};

struct Half {
  static constexpr bool kHalf = true;
  static constexpr DType kType = DType::kHalf;
  static VOSOPS_DEVICE Pair unpack(uint32_t w) {
    return {__half2float(__ushort_as_half(uint16_t(w))), __half2float(__ushort_as_half(uint16_t(w >> 16)))};
  }
  static VOSOPS_DEVICE uint32_t pack(float first, float second) {
    const __half2 pair = __floats2half2_rn(first, second);
    return uint32_t(__half_as_ushort(pair.x)) | uint32_t(__half_as_ushort(pair.y)) << 16;
  }
};

VOSOPS_DEVICE float infinity() { return float_of(0x7f800000u); }
VOSOPS_DEVICE float not_a_number() { return float_of(0x7fffffffu); }

// Positions are below 2^31, offsets are not.
VOSOPS_DEVICE int64_t offset_of(const Positions& positions, int position) {
  if (positions.dims == 1) return position * positions.stride[0];
  int64_t sum = 0;
  uint32_t rest = uint32_t(position);
#pragma unroll 1
  for (int d = positions.dims - 1; d >= 0; --d) {
    const uint32_t size = uint32_t(positions.size[d]);
    sum += int64_t(rest % size) * positions.stride[d];
    rest /= size;
  }
  return sum;
}

// Element `at` of a tensor of type `type`.
VOSOPS_DEVICE float element(const void* data, DType type, int64_t at) {
  if (type == DType::kFloat) return static_cast<const float*>(data)[at];
  const uint32_t bits = static_cast<const uint16_t*>(data)[at];
  return type == DType::kHalf ? Half::unpack(bits).first : BFloat16::unpack(bits).first;
}

// Orders as the scores do; NaN is above everything, +-0 are one. A score of -inf gives kNothing.
constexpr uint32_t kNothing = 0x007fffffu;
constexpr uint32_t kNan = 0xffffffffu;

VOSOPS_DEVICE uint32_t ordered(float score) {
  if (score != score) return kNan;
  const uint32_t bits = bits_of(score + 0.f);
  return bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
}

VOSOPS_DEVICE float score_of(uint32_t key) {
  if (key == kNan) return not_a_number();
  return float_of(key ^ (key >> 31 ? 0x80000000u : 0xffffffffu));
}

// The larger entry comes first: by score, among equal scores by the lower index. 0 is no entry.
VOSOPS_DEVICE uint64_t entry_of(uint32_t key, uint32_t index) { return uint64_t(key) << 32 | ~index; }
VOSOPS_DEVICE uint32_t key_of(uint64_t entry) { return uint32_t(entry >> 32); }
VOSOPS_DEVICE uint32_t index_of(uint64_t entry) { return ~uint32_t(entry); }

}  // namespace vosops::gpu
