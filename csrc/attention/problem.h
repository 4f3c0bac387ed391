// SPDX-License-Identifier: Apache-2.0
// What dense attention reads with one match, as the kernels see it.
#pragma once
#include "../common/operand.h"

namespace vosops {

// One value tensor, and what is added to it; a head's channels.
struct Bank {
  Operand value, identity;  // [B, channel, position], heads as batch entries
  int64_t channels = 0;
  int64_t column = 0;  // of the read that the first head's first channel goes to
};

struct Banks {
  const Bank* bank = nullptr;
  int count = 0;
  int64_t channels = 0;  // of a head, over all banks
  int64_t heads = 1;
  int64_t columns = 0;  // of the read
};

}  // namespace vosops
