// SPDX-License-Identifier: Apache-2.0
// One call of the memory read, as the kernels see it.
#pragma once
#include "../common/operand.h"

namespace vosops {

// s_ij = <a_i, b_j> + bias_j - precision_j |x_i - c_j|^2 over `depth` channels, where a and b
// are built from the keys when they are packed (pack.h). Attention's heads are batch entries.
struct Problem {
  int64_t batch = 0, queries = 0, memory = 0;
  int channels = 0;
  bool l2 = false;
  float scale = 1, norm_scale = 1;  // norm_scale: of |k|^2
  Operand query, key, shrinkage, selection;
  Operand gate;                      // of the key, its norm included; positions only
  Operand mask;                      // bool; positions only
  const float* centers = nullptr;    // [B, M, 2] row, column
  const float* precision = nullptr;  // [B, M]
  int64_t grid_width = 1;            // of the queries
  const float* log_prior = nullptr;  // [B, Q], with gain: for the argmax over queries
  const float* gain = nullptr;       // [B, M]
  int64_t window = 0;                // of the argmax over queries; 0: none
};

// Packed queries: blocks of kRows rows, [depth][kRows] each, and the largest norm in each block.
struct PackedQueries {
  float* data = nullptr;
  float* norms = nullptr;
  int64_t blocks = 0;  // per batch entry
  int depth = 0;       // packed channels, or pairs of them
  bool pairs = false;  // bfloat16 keys stay as they are; set to allow it, then `layout` decides
};

struct Values {
  Operand value;     // [B, O, Cv, position]
  Operand identity;  // likewise, added to it; only dense_backward knows it
  int64_t objects = 0, channels = 0;
};

// Channels of a block of gather_channels and gather_backward.
constexpr int kChannelBlock = 32;

}  // namespace vosops
