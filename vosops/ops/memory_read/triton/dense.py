# SPDX-License-Identifier: Apache-2.0
"""The dense read on the GPU: online softmax over memory blocks, split over the memory when queries are few.

A program holds BLOCK_Q queries and BLOCK_V of the O * Cv value channels; the parts of a split memory are
merged by their log-sum-exp.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...launch import capability, launch, on_device, split
from ..problem import Scores
from .operands import TYPES, Operands, Positions, column_tile, value_strides
from .scores import load_memory, load_query, offset_of, score


@triton.jit
def read_kernel(
    p_query, sq_batch, sq_channel, sq_position,
    p_selection, se_batch, se_channel, se_position,
    p_key, sk_batch, sk_channel, middle, inner, s_outer, s_middle, s_inner,
    p_mask, p_shrinkage, p_centers, p_precision, width, scale,
    queries, memory,
    p_value, per_object, sv_batch, sv_object, sv_channel, v_middle, v_inner, sv_outer, sv_middle, sv_inner,
    p_read, p_lse, value_width, batch, span, so_part, so_query, so_channel,
    channels: tl.constexpr, BLOCK_C: tl.constexpr, FLAT: tl.constexpr, L2: tl.constexpr,
    SELECTION: tl.constexpr, SHRINKAGE: tl.constexpr, MASK: tl.constexpr, PRIOR: tl.constexpr,
    SPLIT: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr, INDEX: tl.constexpr,
    VALUE_FLAT: tl.constexpr, VALUE_DTYPE: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """read [part, B, ...] by strides and lse [part, B, Q]; of a part without a match lse is -inf, or,
    when it is the only part, +inf, so that exp(s - lse) is 0."""
    i_q = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    i_v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    i_b = (tl.program_id(2) % batch).to(tl.int64)
    i_part = tl.program_id(2) // batch
    start = i_part * span
    end = tl.minimum(start + span, memory)
    b_x, b_low, b_e, b_rest = load_query(
        p_query + i_b * sq_batch, sq_channel, sq_position,
        p_selection + i_b * se_batch, se_channel, se_position,
        i_q, queries, channels, BLOCK_C, SELECTION, SPLIT, DTYPE, INDEX,
    )  # fmt: skip
    at_channel = (i_v // per_object).to(INDEX) * sv_object + (i_v % per_object).to(INDEX) * sv_channel
    b_top = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    b_total = tl.zeros((BLOCK_Q,), tl.float32)
    b_read = tl.zeros((BLOCK_Q, BLOCK_V), tl.float32)
    for i_m0 in range(start, end, BLOCK_M):
        i_m = i_m0 + tl.arange(0, BLOCK_M)
        b_key, b_gain, valid = load_memory(
            p_key + i_b * sk_batch, sk_channel, middle, inner, s_outer, s_middle, s_inner,
            p_mask + i_b * memory, p_shrinkage + i_b * memory,
            i_m, memory, scale, channels, BLOCK_C, FLAT, MASK, SHRINKAGE, INDEX,
        )  # fmt: skip
        b_score = score(
            b_x, b_low, b_e, b_rest, b_key, b_gain, valid,
            p_centers + i_b * memory * 2, p_precision + i_b * memory, i_q, i_m, width,
            L2, SELECTION, PRIOR, SPLIT, DTYPE, PRECISION,
        )  # fmt: skip
        b_new = tl.maximum(b_top, tl.max(b_score, 1))
        b_shift = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_weight = tl.exp(b_score - b_shift[:, None])
        b_fade = tl.exp(b_top - b_shift)
        b_total = b_total * b_fade + tl.sum(b_weight, 1)
        b_top = b_new
        v_at = offset_of(i_m, v_middle, v_inner, sv_outer, sv_middle, sv_inner, VALUE_FLAT, INDEX)
        b_value = tl.load(
            p_value + i_b * sv_batch + (v_at[:, None] + at_channel[None, :]),
            mask=valid[:, None] & (i_v < value_width)[None, :], other=0.0,
        )  # fmt: skip
        b_read = tl.dot(
            b_weight.to(VALUE_DTYPE), b_value.to(VALUE_DTYPE), b_read * b_fade[:, None],
            input_precision=PRECISION,
        )  # fmt: skip
    empty = b_total == 0.0
    b_read = b_read / tl.where(empty, 1.0, b_total)[:, None]
    b_lse = b_top + tl.log(tl.where(empty, 1.0, b_total))
    if PARTS == 1:
        b_lse = tl.where(empty, float("inf"), b_lse)
    p_out = p_read + i_part * so_part + i_b * queries * value_width
    p_out += i_q.to(INDEX)[:, None] * so_query + i_v.to(INDEX)[None, :] * so_channel
    tl.store(p_out, b_read, mask=(i_q < queries)[:, None] & (i_v < value_width)[None, :])
    if tl.program_id(1) == 0:
        tl.store(p_lse + (i_part * batch + i_b) * queries + i_q, b_lse, mask=i_q < queries)


@triton.jit
def merge_kernel(
    p_parts, p_lses, p_read, p_lse, queries, value_width, batch, parts,
    BLOCK_Q: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """read [B, O * Cv, Q] and lse [B, Q] from parts [part, B, Q, O * Cv], lses [part, B, Q]."""
    i_q = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    i_v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    i_b = tl.program_id(2).to(tl.int64)
    b_top = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    b_bad = tl.zeros((BLOCK_Q,), tl.float32)
    for i_part in range(parts):
        row = (i_part * batch + i_b) * queries + i_q
        b_lse = tl.load(p_lses + row, mask=i_q < queries, other=float("-inf"))
        b_top = tl.maximum(b_top, b_lse)
        b_bad += tl.where(b_lse == b_lse, 0.0, float("nan"))
    b_top = tl.where(b_top == float("-inf"), 0.0, b_top) + b_bad
    b_total = tl.zeros((BLOCK_Q,), tl.float32)
    b_read = tl.zeros((BLOCK_Q, BLOCK_V), tl.float32)
    for i_part in range(parts):
        row = (i_part * batch + i_b) * queries + i_q
        b_share = tl.exp(tl.load(p_lses + row, mask=i_q < queries, other=float("-inf")) - b_top)
        b_part = tl.load(
            p_parts + row[:, None] * value_width + i_v[None, :],
            mask=(i_q < queries)[:, None] & (i_v < value_width)[None, :], other=0.0,
        )  # fmt: skip
        b_total += b_share
        b_read += b_share[:, None] * b_part
    empty = b_total == 0.0
    b_read = b_read / tl.where(empty, 1.0, b_total)[:, None]
    b_lse = tl.where(empty, float("inf"), b_top + tl.log(tl.where(empty, 1.0, b_total)))
    p_out = p_read + (i_b * value_width + i_v.to(tl.int64)[None, :]) * queries + i_q[:, None]
    tl.store(p_out, b_read, mask=(i_q < queries)[:, None] & (i_v < value_width)[None, :])
    if tl.program_id(1) == 0:
        tl.store(p_lse + i_b * queries + i_q, b_lse, mask=i_q < queries)


@triton.jit
def usage_kernel(
    p_query, sq_batch, sq_channel, sq_position,
    p_selection, se_batch, se_channel, se_position,
    p_key, sk_batch, sk_channel, middle, inner, s_outer, s_middle, s_inner,
    p_mask, p_shrinkage, p_centers, p_precision, width, scale,
    queries, memory, p_lse, p_usage,
    channels: tl.constexpr, BLOCK_C: tl.constexpr, FLAT: tl.constexpr, L2: tl.constexpr,
    SELECTION: tl.constexpr, SHRINKAGE: tl.constexpr, MASK: tl.constexpr, PRIOR: tl.constexpr,
    SPLIT: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr, INDEX: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """usage [B, M] = sum over queries of exp(s - lse)."""
    i_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    i_b = tl.program_id(1).to(tl.int64)
    b_key, b_gain, valid = load_memory(
        p_key + i_b * sk_batch, sk_channel, middle, inner, s_outer, s_middle, s_inner,
        p_mask + i_b * memory, p_shrinkage + i_b * memory,
        i_m, memory, scale, channels, BLOCK_C, FLAT, MASK, SHRINKAGE, INDEX,
    )  # fmt: skip
    b_usage = tl.zeros((BLOCK_M,), tl.float32)
    for i_q0 in range(0, queries, BLOCK_Q):
        i_q = i_q0 + tl.arange(0, BLOCK_Q)
        b_x, b_low, b_e, b_rest = load_query(
            p_query + i_b * sq_batch, sq_channel, sq_position,
            p_selection + i_b * se_batch, se_channel, se_position,
            i_q, queries, channels, BLOCK_C, SELECTION, SPLIT, DTYPE, INDEX,
        )  # fmt: skip
        b_score = score(
            b_x, b_low, b_e, b_rest, b_key, b_gain, valid,
            p_centers + i_b * memory * 2, p_precision + i_b * memory, i_q, i_m, width,
            L2, SELECTION, PRIOR, SPLIT, DTYPE, PRECISION,
        )  # fmt: skip
        b_lse = tl.load(p_lse + i_b * queries + i_q, mask=i_q < queries, other=float("inf"))
        b_usage += tl.sum(tl.exp(b_score - b_lse[:, None]), 0)
    tl.store(p_usage + i_b * memory + i_m, b_usage, mask=i_m < memory)


def read(p: Scores, value: Tensor) -> tuple[Tensor, Tensor]:
    """(B, O, Cv, Q) float32 and the scores' log-sum-exp (B, Q), +inf where a query can match nothing."""
    o, device = Operands.of(p, value), value.device
    objects, channels = value.shape[1:3]
    value_width = objects * channels
    result = torch.empty(o.batch, objects, channels, o.queries, dtype=torch.float32, device=device)
    lse = torch.empty(o.batch, o.queries, dtype=torch.float32, device=device)
    if lse.numel() == 0:
        return result, lse
    positions = Positions.of(value, 3)
    # Weights are rounded to the values' type where the result has it too.
    narrow = value.dtype == p.query_key.dtype
    block_q, block_m, block_v, warps = _tile(o, value, narrow and value.dtype != torch.float32)
    chunks = max(1, triton.cdiv(value_width, block_v))
    blocks = triton.cdiv(o.memory, block_m)
    parts = split(blocks, triton.cdiv(o.queries, block_q) * chunks * o.batch, device)
    span = triton.cdiv(blocks, parts) * block_m
    parts = triton.cdiv(o.memory, span)
    target, lses, strides = result, lse, (0, 1, o.queries)
    if parts > 1:
        target = result.new_empty(parts, o.batch, o.queries, value_width)
        lses = lse.new_empty(parts, o.batch, o.queries)
        strides = (target.stride(0), value_width, 1)
    with on_device(device):
        launch(
            read_kernel,
            (triton.cdiv(o.queries, block_q), chunks, o.batch * parts),
            *o.query, *o.memory_side, o.queries, o.memory,
            value, *value_strides(value), *positions.arguments,
            target, lses, value_width, o.batch, span, *strides,
            **o.options, VALUE_FLAT=positions.flat,
            VALUE_DTYPE=TYPES[value.dtype if narrow else torch.float32], PARTS=parts if parts == 1 else 2,
            BLOCK_Q=block_q, BLOCK_M=block_m, BLOCK_V=block_v, num_warps=warps, num_stages=2,
        )  # fmt: skip
        if parts > 1:
            launch(
                merge_kernel,
                (triton.cdiv(o.queries, 16), max(1, triton.cdiv(value_width, 128)), o.batch),
                target, lses, result, lse, o.queries, value_width, o.batch, parts,
                BLOCK_Q=16, BLOCK_V=128, num_warps=4,
            )  # fmt: skip
    return result, lse


def usage(p: Scores, lse: Tensor) -> Tensor:
    """(B, M) float32."""
    o = Operands.of(p)
    result = torch.zeros(o.batch, o.memory, dtype=torch.float32, device=lse.device)
    if lse.numel() == 0:
        return result
    block_q, block_m, warps = column_tile(o)
    with on_device(lse.device):
        launch(
            usage_kernel,
            (triton.cdiv(o.memory, block_m), o.batch),
            *o.query, *o.memory_side, o.queries, o.memory, lse, result,
            **o.options, BLOCK_Q=block_q, BLOCK_M=block_m, num_warps=warps, num_stages=2,
        )  # fmt: skip
    return result


def _tile(o: Operands, value: Tensor, narrow: bool) -> tuple[int, int, int, int]:
    """(BLOCK_Q, BLOCK_M, BLOCK_V, warps): the largest that fit the registers."""
    selects = bool(o.options["SELECTION"])
    rows = value.stride(2) == 1  # otherwise addresses take registers too
    if narrow and not o.wide:
        large = rows and not selects and capability(value.device)[0] >= 9
        tile = (128 if large else 64, 64, 256 if rows else 128)
        if selects and not rows:
            tile = (64, 32, 64)
    elif selects or not (rows or o.block_c <= 64):
        tile = (16, 32, 128)
    else:
        tile = (64 if rows and o.block_c <= 64 else 32, 32, 128)
    width = max(16, triton.next_power_of_2(value.shape[1] * value.shape[2]))
    return tile[0], tile[1], min(tile[2], width), 8
