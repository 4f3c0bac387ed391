// SPDX-License-Identifier: Apache-2.0
// The kernels of one instruction set.
#pragma once
#include "../attention/problem.h"
#include "../identity/problem.h"
#include "../local_attention/problem.h"
#include "../memory_read/problem.h"

namespace vosops {

struct Kernels {
  const char* name;
  int rows;  // of the register tile
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
  // Gradient of the dense read: see dense_backward.h. Panels have `cols` columns, queries are padded to
  // `chunk`.
  int cols, chunk;
  void (*pack_grad)(const float* grad, int64_t columns, int64_t queries, int64_t first, int64_t last,
                    float* out);
  void (*unpack_queries)(const PackedQueries&, int64_t batch, int64_t queries, float* out);
  void (*dense_backward)(const Problem&, const PackedQueries&, const Values&, int64_t batch, int64_t m0,
                         int64_t m1, const float* lse, const float* delta, const float* grad,
                         const float* left, float* grad_left, float* grad_right, float* grad_bias,
                         float* grad_value);
  // usage_j of memory positions [m0, m1) from the log-sum-exp of every query.
  void (*usage)(const Problem&, const PackedQueries&, int64_t batch, int64_t m0, int64_t m1, const float* lse,
                float* usage);
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

  // Soft aggregation of positions [s0, s1) of a batch entry, and its gradient.
  void (*aggregate)(const Operand& probabilities, int64_t batch, int64_t objects, int64_t positions,
                    int64_t s0, int64_t s1, float* logits);
  void (*aggregate_backward)(const Operand& probabilities, int64_t batch, int64_t objects, int64_t positions,
                             int64_t s0, int64_t s1, const float* grad, float* grad_probabilities);

  // Dense attention of query panels [first, last) of `cols` queries: see attention/dense.h.
  void (*attention)(const Problem&, const Banks&, int64_t batch, int64_t first, int64_t last, float* read,
                    float* lse);

  // Identity embedding of a block of `identity_channels` from c0 on, output rows [first, last), and the
  // gradient of its weights.
  int identity_channels;
  void (*identity)(const IdentityProblem&, const Operand& weight, const float* bias, int64_t c0,
                   int64_t first, int64_t last, float* embedding);
  void (*identity_backward)(const IdentityProblem&, int64_t c0, const float* grad, float* grad_weight);

  // Local attention: rows [first, last) of all planes packed, the tables of a head, and tiles of queries.
  void (*local_layout)(const LocalProblem&, LocalLayout&);
  void (*local_pack)(const LocalProblem&, const LocalLayout&, const LocalPack&, int64_t first, int64_t last);
  void (*local_pack_tables)(const LocalProblem&, const LocalLayout&, const LocalPack&, int64_t head);
  void (*local_forward)(const LocalProblem&, const LocalLayout&, const LocalPack&, int64_t begin, int64_t end,
                        float* read, float* lse);
  // Its gradients: part `part` of a plane, run on its own; then row y of the keys and values, and the tables.
  void (*local_segment)(const LocalProblem&, const LocalLayout&, int64_t plane, int64_t part, int64_t parts,
                        LocalSegment&);
  void (*local_backward)(const LocalProblem&, const LocalLayout&, const LocalPack&, const LocalGradients&,
                         const LocalSegment&);
  void (*local_collect)(const LocalProblem&, const LocalLayout&, const LocalSegment*, int count, int64_t y,
                        float* grad_key, float* grad_value);
  void (*local_add_tables)(const LocalProblem&, const LocalLayout&, const LocalSegment&, float* weight,
                           float* weight_offset, float* relative_value);
};

namespace avx512_bf16 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
namespace avx2 {
extern const Kernels kernels;
}
namespace portable {
extern const Kernels kernels;
}

}  // namespace vosops
