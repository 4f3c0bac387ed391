// SPDX-License-Identifier: Apache-2.0
// Compiled once per instruction set; VOSOPS_ISA names it.
#include "kernels.h"

#include "../aggregate/kernel.h"
#include "../attention/dense.h"
#include "../identity/kernel.h"
#include "../local_attention/backward.h"
#include "../memory_read/dense_backward.h"
#include "../memory_read/gather.h"
#include "../memory_read/match.h"

#define VOSOPS_TEXT2(x) #x
#define VOSOPS_TEXT(x) VOSOPS_TEXT2(x)

namespace vosops::VOSOPS_ISA {

extern const Kernels kernels;
const Kernels kernels = {
    VOSOPS_TEXT(VOSOPS_ISA),
    kRows,
    layout,
    pack_queries,
    match,
    finish,
    dense,
    kCols,
    kChunk,
    pack_grad,
    unpack_queries,
    dense_backward,
    usage,
    best_query,
    gather_rows,
    gather_channels,
    gather_backward,
    aggregate,
    aggregate_backward,
    attention,
    kIdentityChannels,
    identity,
    identity_backward,
    local_layout,
    local_pack,
    local_pack_tables,
    local_forward,
    local_segment,
    local_backward,
    local_collect,
    local_add_tables,
};

}  // namespace vosops::VOSOPS_ISA
