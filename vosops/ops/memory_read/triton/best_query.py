# SPDX-License-Identifier: Apache-2.0
"""The query that matches each memory position best, as KernelPrior and MaskPrior need it: one pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...launch import launch, on_device
from ..problem import Scores
from .operands import Operands, column_tile
from .scores import entry, load_memory, load_query, score


@triton.jit
def best_query_kernel(
    heads, p_query, sq_batch, sq_head, sq_channel, sq_position,
    p_selection, se_batch, se_channel, se_position,
    p_key, sk_batch, sk_head, sk_channel, middle, inner, s_outer, s_middle, s_inner,
    p_mask, p_shrinkage, p_centers, p_precision, width, scale,
    queries, memory, p_log_prior, p_position_gain, reach, p_best,
    channels: tl.constexpr, BLOCK_C: tl.constexpr, FLAT: tl.constexpr, FORM: tl.constexpr,
    SELECTION: tl.constexpr, SHRINKAGE: tl.constexpr, MASK: tl.constexpr, PRIOR: tl.constexpr,
    SPLIT: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr, INDEX: tl.constexpr,
    LOG_PRIOR: tl.constexpr, WINDOW: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """best [B, M]: the lowest of the queries with the largest score; NaN never wins."""
    i_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    i_b = tl.program_id(1).to(tl.int64)
    p_query += entry(i_b, heads, sq_batch, sq_head)
    p_key += entry(i_b, heads, sk_batch, sk_head)
    b_key, b_gain, b_bias, valid = load_memory(
        p_key, sk_channel, middle, inner, s_outer, s_middle, s_inner,
        p_mask + i_b * memory, p_shrinkage + i_b * memory,
        i_m, memory, scale, channels, BLOCK_C, FLAT, FORM, SELECTION, MASK, SHRINKAGE, INDEX,
    )  # fmt: skip
    if LOG_PRIOR:
        b_position_gain = tl.load(p_position_gain + i_b * memory + i_m, mask=valid, other=0.0)
    i_cell = i_m % queries  # with a window the memory lies on the queries' grid
    b_top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    b_best = tl.zeros((BLOCK_M,), tl.int32)
    for i_q0 in range(0, queries, BLOCK_Q):
        i_q = i_q0 + tl.arange(0, BLOCK_Q)
        b_x, b_low, b_e, b_rest = load_query(
            p_query, sq_channel, sq_position,
            p_selection + i_b * se_batch, se_channel, se_position,
            i_q, queries, channels, BLOCK_C, SELECTION, SPLIT, DTYPE, INDEX,
        )  # fmt: skip
        b_score = score(
            b_x, b_low, b_e, b_rest, b_key, b_gain, b_bias, valid,
            p_centers + i_b * memory * 2, p_precision + i_b * memory, i_q, i_m, width,
            FORM, SELECTION, PRIOR, SPLIT, DTYPE, PRECISION,
        )  # fmt: skip
        if LOG_PRIOR:
            b_log_prior = tl.load(p_log_prior + i_b * queries + i_q, mask=i_q < queries, other=0.0)
            b_score = b_score + b_log_prior[:, None] * b_position_gain[None, :]
        allowed = (i_q < queries)[:, None] & (b_score == b_score)
        if WINDOW:
            b_down = i_q[:, None] // width - (i_cell // width)[None, :]
            b_across = i_q[:, None] % width - (i_cell % width)[None, :]
            allowed = allowed & (tl.abs(b_down) <= reach) & (tl.abs(b_across) <= reach)
        b_score = tl.where(allowed, b_score, float("-inf"))
        b_max = tl.max(b_score, 0)
        b_row = tl.where(b_score == b_max[None, :], i_q[:, None], queries)
        b_first = tl.min(b_row, 0)
        better = b_max > b_top
        b_best = tl.where(better, b_first, b_best)
        b_top = tl.where(better, b_max, b_top)
    tl.store(p_best + i_b * memory + i_m, b_best.to(tl.int64), mask=i_m < memory)


def best_query(p: Scores, log_prior: Tensor | None, gain: Tensor | None, window: int) -> Tensor:
    """(B, M) int64."""
    o, device = Operands.of(p), p.memory_key.device
    best = torch.zeros(o.entries, o.memory, dtype=torch.int64, device=device)
    if o.queries == 0 or best.numel() == 0:
        return best
    weighted = log_prior is not None and gain is not None
    block_q, block_m, warps = column_tile(o)
    options = {**o.options, "FORM": "dot"} if weighted and o.form == "plain" else o.options
    with on_device(device):
        launch(
            best_query_kernel,
            (triton.cdiv(o.memory, block_m), o.entries),
            *o.query, *o.memory_side, o.queries, o.memory,
            log_prior.float().contiguous() if log_prior is not None else best,
            gain.float().contiguous() if gain is not None else best,
            window // 2, best,
            **options, LOG_PRIOR=weighted, WINDOW=window > 0, BLOCK_Q=block_q, BLOCK_M=block_m,
            num_warps=warps, num_stages=2,
        )  # fmt: skip
    return best
