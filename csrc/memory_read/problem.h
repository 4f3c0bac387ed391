// SPDX-License-Identifier: Apache-2.0
// One call of the memory read for the kernels, and the table of kernels of one instruction set.
#pragma once
#include "../common/operand.h"

namespace vosops {

// s_ij = <a_i, b_j> * alpha + bias_j - precision_j |x_i - c_j|^2 over `depth` channels, where a and b
// are built from the keys when they are packed (pack.h).
struct Problem {
  int64_t batch = 0, queries = 0, memory = 0;
  int channels = 0;
  bool l2 = false;
  float scale = 1;
  Operand query, key, shrinkage, selection;
  Operand mask;                       // bool; positions only
  const float* centers = nullptr;     // [B, M, 2] row, column
  const float* precision = nullptr;   // [B, M]
  int64_t grid_width = 1;             // of the queries
  const float* log_prior = nullptr;   // [B, Q], with gain: for the argmax over queries
  const float* gain = nullptr;        // [B, M]
  int64_t window = 0;                 // of the argmax over queries; 0: none
};

// Packed queries: blocks of kRows rows, [depth][kRows] each, and the largest norm in each block.
struct PackedQueries {
  float* data = nullptr;
  float* norms = nullptr;
  int64_t blocks = 0;  // per batch entry
  int depth = 0;       // 32-bit channels: pairs of bfloat16, or floats
  bool pairs = false;
};

struct Values {
  Operand value;  // [B, O, Cv, position]
  int64_t objects = 0, channels = 0;
};

struct Kernels {
  const char* name;
  int rows;  // of the register tile
  // Whether this call can use pairs of bfloat16, and the packed depth.
  void (*layout)(const Problem&, PackedQueries&);
  void (*pack_queries)(const Problem&, PackedQueries&, int64_t batch, int64_t first, int64_t last);
  // The k best of memory positions [m0, m1) for query blocks [b0, b1): [rows][k], filled with -inf;
  // a NaN score in a row makes its first score NaN.
  void (*match)(const Problem&, const PackedQueries&, int64_t batch, int64_t b0, int64_t b1, int64_t m0,
                int64_t m1, int k, float* scores, int32_t* indices);
  // Merges the candidates of all splits of queries [q0, q1) and weighs them.
  void (*finish)(const float* scores, const int32_t* indices, int64_t splits, int64_t split_stride,
                 int64_t q0, int64_t q1, int k, int64_t* out_indices, float* out_weights);
  // Dense: read[(object, channel)][queries] and log-sum-exp of query blocks [b0, b1).
  void (*dense)(const Problem&, const PackedQueries&, const Values&, int64_t batch, int64_t b0, int64_t b1,
                float* read, float* lse);
  // usage_j of memory positions [m0, m1) from the log-sum-exp of every query.
  void (*usage)(const Problem&, const PackedQueries&, int64_t batch, int64_t m0, int64_t m1,
                const float* lse, float* usage);
  // argmax over queries of memory positions [m0, m1).
  void (*best_query)(const Problem&, const PackedQueries&, int64_t batch, int64_t m0, int64_t m1,
                     int64_t* best);
  // sum_k w v of queries [q0, q1) where an object's channels are innermost and contiguous.
  void (*gather_rows)(const Values&, int64_t batch, const int64_t* indices, const float* weights, int k,
                      int64_t queries, int64_t q0, int64_t q1, float* read);
  // The same for channels [c0, c1) of the flattened (object, channel), any strides.
  void (*gather_channels)(const Values&, int64_t batch, int64_t memory, const int64_t* indices,
                          const float* weights, int k, int64_t queries, int64_t c0, int64_t c1, float* read);
  // Gradients of channels [c0, c1): adds to grad_weights [Q, k]; fills grad_value [c][M] unless null.
  void (*gather_backward)(const Values&, int64_t batch, int64_t memory, const int64_t* indices,
                          const float* weights, int k, int64_t queries, int64_t c0, int64_t c1,
                          const float* grad_read, float* grad_weights, float* grad_value);
};

// Channels of a block of gather_channels and gather_backward.
constexpr int kChannelBlock = 32;

namespace avx512_bf16 { extern const Kernels kernels; }
namespace avx512 { extern const Kernels kernels; }
namespace avx2 { extern const Kernels kernels; }
namespace portable { extern const Kernels kernels; }

}  // namespace vosops
