// SPDX-License-Identifier: Apache-2.0
// One identity embedding of label maps, as the kernels see it.
#pragma once
#include "../common/operand.h"

namespace vosops {

struct IdentityProblem {
  const int32_t* first_row = nullptr;  // [B, H, W]: label * taps, negative where nothing is added
  int64_t batch = 0, height = 0, width = 0, out_height = 0, out_width = 0;
  int64_t channels = 0, classes = 0, kernel_height = 0, kernel_width = 0, stride = 1, padding = 0;

  int64_t taps() const { return kernel_height * kernel_width; }
  int64_t positions() const { return out_height * out_width; }
};

}  // namespace vosops
