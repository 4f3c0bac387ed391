// SPDX-License-Identifier: Apache-2.0
// The CPU operators of the correlation: how the work is cut into tasks.
#include <algorithm>
#include <cstring>
#include <memory>
#include <tuple>

#include "../common/isa.h"
#include "../common/tensors.h"
#include "problem.h"

namespace vosops {
namespace {

using torch::stable::parallel_for;

const CorrelationKernels& kernels_in_use() {
  const char* name = kernels().name;
#if defined(__x86_64__)
  for (const CorrelationKernels* one :
       {&avx512_bf16::correlation_kernels, &avx512::correlation_kernels, &avx2::correlation_kernels})
    if (std::strcmp(one->name, name) == 0) return *one;
#endif
  return portable::correlation_kernels;
}

Map map_of(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.dim() == 4, name, " must have 4 dimensions");
  return {x.const_data_ptr(), dtype_of(x, name), x.stride(0), x.stride(1), x.stride(2), x.stride(3)};
}

struct Call {
  LocalProblem p;
  LocalLayout l;
  std::unique_ptr<float[]> packed;

  Call(const Tensor& query, const Tensor& key, int64_t window, int64_t dilation) {
    p.query = map_of(query, "input1");
    p.key = map_of(key, "input2");
    for (int64_t d = 0; d < 4; ++d)
      STD_TORCH_CHECK(query.size(d) == key.size(d), "input2 must have the shape of input1");
    STD_TORCH_CHECK(
        window > 0 && window % 2 == 1 && window < (1 << 12) && dilation > 0 && dilation < (1 << 30),
        "window must be odd and positive and dilation positive");
    p.batch = query.size(0), p.height = query.size(2), p.width = query.size(3);
    p.channels = p.value_channels = int(query.size(1));
    p.window = int(window), p.dilation = int(dilation);
    if (!empty()) kernels().local_layout(p, l);
  }
  bool empty() const { return p.batch * p.height * p.width * p.channels == 0; }
  int64_t tasks() const { return l.planes * l.blocks * l.strips; }

  // The key as rows or as cells, for every tile.
  const float* pack(bool rows) {
    packed.reset(new float[l.planes * (rows ? l.key_rows(p.channels) : l.cells(l.key_chunks, l.key_width))]);
    LocalPack pack;
    (rows ? pack.key_rows : pack.key_cells) = packed.get();
    parallel_for(0, l.planes * l.rows, 4,
                 [&](int64_t first, int64_t last) { kernels().local_pack(p, l, pack, first, last); });
    return packed.get();
  }
};

Tensor correlation(Tensor input1, Tensor input2, int64_t window, int64_t dilation) {
  Call call(input1, input2, window, dilation);
  const LocalProblem& p = call.p;
  const Tensor out = make(input1, {p.batch, window * window, p.height, p.width}, ScalarType::Float);
  if (call.empty()) {
    std::fill_n(data_of<float>(out), out.numel(), 0.f);
    return out;
  }
  const float* rows = call.pack(true);
  parallel_for(0, call.tasks(), 1, [&](int64_t begin, int64_t end) {
    kernels_in_use().correlate(p, call.l, rows, begin, end, data_of<float>(out));
  });
  return out;
}

// sum_D of the gradient times `other`; every tile is summed by one thread in order, so a run repeats bit for
// bit.
Tensor spread(const Tensor& grad, const Tensor& other, bool turned, int64_t window, int64_t dilation) {
  Call call(other, other, window, dilation);
  const LocalProblem& p = call.p;
  const Tensor out = make(other, {p.batch, p.channels, p.height, p.width}, ScalarType::Float);
  if (call.empty()) return out;
  const float* cells = call.pack(false);
  const float* weights = floats_of(grad, "grad");
  parallel_for(0, call.tasks(), 1, [&](int64_t begin, int64_t end) {
    kernels_in_use().spread(p, call.l, cells, weights, turned, begin, end, data_of<float>(out));
  });
  return out;
}

std::tuple<Tensor, Tensor> correlation_backward(Tensor grad, Tensor input1, Tensor input2, int64_t window,
                                                int64_t dilation) {
  STD_TORCH_CHECK(grad.dim() == 4 && grad.size(0) == input1.size(0) && grad.size(1) == window * window &&
                      grad.size(2) == input1.size(2) && grad.size(3) == input1.size(3),
                  "grad must have the shape of the correlation");
  return {spread(grad, input2, false, window, dilation), spread(grad, input1, true, window, dilation)};
}

}  // namespace
}  // namespace vosops

STABLE_TORCH_LIBRARY_IMPL(vosops, CPU, m) {
  m.impl("correlation", TORCH_BOX(&vosops::correlation));
  m.impl("correlation_backward", TORCH_BOX(&vosops::correlation_backward));
}
