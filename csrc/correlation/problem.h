// SPDX-License-Identifier: Apache-2.0
// The correlation of two maps over a window, as one head of local attention's scores. No torch here.
#pragma once
#include "../local_attention/problem.h"

namespace vosops {

// The kernels of one instruction set; tasks are tiles: planes * blocks * strips of the layout.
struct CorrelationKernels {
  const char* name;
  // out [batch][offset][row][column] = <query_p, key_(p+D)>, 0 where p + D is outside the frame.
  void (*correlate)(const LocalProblem&, const LocalLayout&, const float* key_rows, int64_t begin,
                    int64_t end, float* out);
  // out [batch][channel][row][column] = sum_D w_pD key_(p+D) with w_pD = grad[D, p], the gradient of the
  // query, or, turned, grad[-D, p + D], that of the key if `key_cells` are the query's.
  void (*spread)(const LocalProblem&, const LocalLayout&, const float* key_cells, const float* grad,
                 bool turned, int64_t begin, int64_t end, float* out);
};

namespace avx512_bf16 {
extern const CorrelationKernels correlation_kernels;
}
namespace avx512 {
extern const CorrelationKernels correlation_kernels;
}
namespace avx2 {
extern const CorrelationKernels correlation_kernels;
}
namespace portable {
extern const CorrelationKernels correlation_kernels;
}

}  // namespace vosops
