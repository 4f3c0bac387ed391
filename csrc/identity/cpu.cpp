// SPDX-License-Identifier: Apache-2.0
// The CPU operators of the identity embedding: labels checked and cut into tasks.
#include <algorithm>
#include <atomic>
#include <memory>

#include "../common/isa.h"
#include "../common/tensors.h"

namespace vosops {
namespace {

constexpr int64_t kIgnored = 255;

// One row of labels as rows of the weights; returns whether all of them are classes or ignored.
template <class T>
bool first_rows(const T* labels, int64_t stride, int64_t width, int64_t classes, int64_t taps, int32_t* out) {
  bool fine = true;
  for (int64_t x = 0; x < width; ++x) {
    const T label = labels[x * stride];
    const bool ignored = label == T(kIgnored);
    fine &= ignored | ((label >= 0) & (int64_t(label) < classes));
    out[x] = ignored ? -1 : int32_t(label) * int32_t(taps);
  }
  return fine;
}

// Before any work: a label past the classes would read foreign bytes.
template <class T>
void first_rows(const Tensor& labels, int64_t classes, int64_t taps, int32_t* out) {
  const T* base = static_cast<const T*>(labels.const_data_ptr());
  const int64_t height = labels.size(1), width = labels.size(2), stride = labels.stride(2);
  const auto row_at = [&](int64_t row) {
    return base + row / height * labels.stride(0) + row % height * labels.stride(1);
  };
  std::atomic<int64_t> wrong = -1;
  torch::stable::parallel_for(0, labels.size(0) * height, 64, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      if (!first_rows(row_at(row), stride, width, classes, taps, out + row * width)) wrong = row;
  });
  for (int64_t x = 0; wrong >= 0 && x < width; ++x) {
    const int64_t label = row_at(wrong)[x * stride];
    STD_TORCH_CHECK(label == kIgnored || (label >= 0 && label < classes),
                    "labels must be in [0, N = ", classes, ") or ", kIgnored, ", got ", label);
  }
}

struct Call {
  IdentityProblem p;
  std::unique_ptr<int32_t[]> rows;

  Call(const Tensor& labels, const Tensor& weight, int64_t stride, int64_t padding) {
    p.batch = labels.size(0), p.height = labels.size(1), p.width = labels.size(2);
    p.channels = weight.size(0), p.classes = weight.size(1);
    p.kernel_height = weight.size(2), p.kernel_width = weight.size(3);
    p.stride = stride, p.padding = padding;
    p.out_height = (p.height + 2 * padding - p.kernel_height) / stride + 1;
    p.out_width = (p.width + 2 * padding - p.kernel_width) / stride + 1;
    STD_TORCH_CHECK(p.classes * p.taps() < INT32_MAX, "weight must have fewer than 2^31 taps of all classes");
    rows.reset(new int32_t[std::max<int64_t>(1, p.batch * p.height * p.width)]);
    switch (labels.scalar_type()) {
      case ScalarType::Byte: first_rows<uint8_t>(labels, p.classes, p.taps(), rows.get()); break;
      case ScalarType::Int: first_rows<int32_t>(labels, p.classes, p.taps(), rows.get()); break;
      case ScalarType::Long: first_rows<int64_t>(labels, p.classes, p.taps(), rows.get()); break;
      default: STD_TORCH_CHECK(false, "labels: the cpu backend serves uint8, int32 and int64");
    }
    p.first_row = rows.get();
  }
};

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

Tensor identity_embedding(Tensor labels, Tensor weight, std::optional<Tensor> bias, int64_t stride,
                          int64_t padding) {
  const Kernels& k = kernels();
  const Call call(labels, weight, stride, padding);
  const IdentityProblem& p = call.p;
  Operand w;
  w.data = weight.const_data_ptr();
  w.dtype = dtype_of(weight, "weight");
  w.channel_stride = weight.stride(0);
  w.positions = positions_of(weight, 1);
  const float* start = floats_of(bias, "bias");
  const Tensor embedding = make(weight, {p.batch, p.channels, p.out_height, p.out_width}, ScalarType::Float);
  // Every task repacks its block of the weights: rows are split only as far as threads need it.
  const int64_t blocks = ceil_div(p.channels, k.identity_channels), rows = p.batch * p.out_height;
  const int64_t threads = std::max<int64_t>(1, torch::stable::get_num_threads());
  const int64_t splits =
      std::clamp<int64_t>(ceil_div(threads, std::max<int64_t>(1, blocks)), 1, 1 + rows / 8);
  const int64_t each = ceil_div(rows, splits);
  torch::stable::parallel_for(0, rows > 0 ? blocks * splits : 0, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = std::min(rows, task % splits * each);
      k.identity(p, w, start, task / splits * k.identity_channels, first, std::min(rows, first + each),
                 data_of<float>(embedding));
    }
  });
  return embedding;
}

// Every block of channels is summed by one thread in order, so a run repeats bit for bit.
Tensor identity_embedding_backward(Tensor grad, Tensor labels, Tensor weight, int64_t stride,
                                   int64_t padding) {
  const Kernels& k = kernels();
  const Call call(labels, weight, stride, padding);
  const IdentityProblem& p = call.p;
  const float* incoming = floats_of(grad, "grad");
  const Tensor grad_weight =
      make(weight, {p.channels, p.classes, p.kernel_height, p.kernel_width}, ScalarType::Float);
  torch::stable::parallel_for(
      0, ceil_div(p.channels, k.identity_channels), 1, [&](int64_t begin, int64_t end) {
        for (int64_t block = begin; block < end; ++block)
          k.identity_backward(p, block * k.identity_channels, incoming, data_of<float>(grad_weight));
      });
  return grad_weight;
}

}  // namespace
}  // namespace vosops

STABLE_TORCH_LIBRARY_IMPL(vosops, CPU, m) {
  m.impl("identity_embedding", TORCH_BOX(&vosops::identity_embedding));
  m.impl("identity_embedding_backward", TORCH_BOX(&vosops::identity_embedding_backward));
}
