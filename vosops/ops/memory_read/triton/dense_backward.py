# SPDX-License-Identifier: Apache-2.0
"""Gradients of the dense read on the GPU, in the packed form of backward.py, without atomics.

With s = <a, b> + bias, P = exp(S - lse), dR the read's gradient, delta_i the product of a query's read and
its gradient: dV = P' dR, dS = P (dR V' - delta), dA = dS B, dB = dS' A, dbias = column sums of dS. Three
passes: dV by memory block and value chunk, dB by memory block, dA by query block and part of the memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...launch import launch, on_device, split
from ..problem import Scores
from .gather import value_gradient
from .operands import TYPES, Operands, Positions, value_strides
from .scores import load_memory, load_query, offset_of, score


@triton.jit
def value_kernel(
    p_query, sq_batch, sq_channel, sq_position,
    p_selection, se_batch, se_channel, se_position,
    p_key, sk_batch, sk_channel, middle, inner, s_outer, s_middle, s_inner,
    p_mask, p_shrinkage, p_centers, p_precision, width, scale,
    queries, memory, p_grad, p_lse, p_grad_value, value_width,
    channels: tl.constexpr, BLOCK_C: tl.constexpr, FLAT: tl.constexpr, L2: tl.constexpr,
    SELECTION: tl.constexpr, SHRINKAGE: tl.constexpr, MASK: tl.constexpr, PRIOR: tl.constexpr,
    SPLIT: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr, INDEX: tl.constexpr,
    VALUE_DTYPE: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """grad_value [B, M, width] = P' grad; grad [B, Q, width]."""
    i_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    i_v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    i_b = tl.program_id(2).to(tl.int64)
    b_key, b_gain, valid = load_memory(
        p_key + i_b * sk_batch, sk_channel, middle, inner, s_outer, s_middle, s_inner,
        p_mask + i_b * memory, p_shrinkage + i_b * memory,
        i_m, memory, scale, channels, BLOCK_C, FLAT, MASK, SHRINKAGE, INDEX,
    )  # fmt: skip
    b_out = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
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
        b_weight = tl.exp(b_score - b_lse[:, None])
        b_grad = tl.load(
            p_grad + i_b * queries * value_width + (i_q.to(INDEX)[:, None] * value_width + i_v[None, :]),
            mask=(i_q < queries)[:, None] & (i_v < value_width)[None, :], other=0.0,
        )  # fmt: skip
        b_out = tl.dot(
            tl.trans(b_weight).to(VALUE_DTYPE), b_grad.to(VALUE_DTYPE), b_out, input_precision=PRECISION
        )
    tl.store(
        p_grad_value + i_b * memory * value_width + (i_m.to(INDEX)[:, None] * value_width + i_v[None, :]),
        b_out, mask=(i_m < memory)[:, None] & (i_v < value_width)[None, :],
    )  # fmt: skip


@triton.jit
def score_gradient(
    b_score, valid, i_q, queries, p_lse, p_delta, p_grad, p_value, v_at, per_object, sv_object, sv_channel,
    value_width, VALUE_DTYPE: tl.constexpr, PRECISION: tl.constexpr, INDEX: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """dS [BLOCK_Q, BLOCK_M] of a score tile; p_lse, p_delta, p_grad, p_value of the batch entry."""
    b_product = tl.zeros((BLOCK_Q, BLOCK_M), tl.float32)
    for i_v0 in range(0, value_width, BLOCK_V):
        i_v = i_v0 + tl.arange(0, BLOCK_V)
        at_channel = (i_v // per_object).to(INDEX) * sv_object + (i_v % per_object).to(INDEX) * sv_channel
        b_grad = tl.load(
            p_grad + (i_q.to(INDEX)[:, None] * value_width + i_v[None, :]),
            mask=(i_q < queries)[:, None] & (i_v < value_width)[None, :], other=0.0,
        )  # fmt: skip
        b_value = tl.load(
            p_value + (at_channel[:, None] + v_at[None, :]),
            mask=(i_v < value_width)[:, None] & valid[None, :], other=0.0,
        )  # fmt: skip
        b_product = tl.dot(
            b_grad.to(VALUE_DTYPE), b_value.to(VALUE_DTYPE), b_product, input_precision=PRECISION
        )
    b_lse = tl.load(p_lse + i_q, mask=i_q < queries, other=float("inf"))
    b_delta = tl.load(p_delta + i_q, mask=i_q < queries, other=0.0)
    return tl.exp(b_score - b_lse[:, None]) * (b_product - b_delta[:, None])


@triton.jit
def memory_kernel(
    p_query, sq_batch, sq_channel, sq_position,
    p_selection, se_batch, se_channel, se_position,
    p_key, sk_batch, sk_channel, middle, inner, s_outer, s_middle, s_inner,
    p_mask, p_shrinkage, p_centers, p_precision, width, scale,
    queries, memory,
    p_value, per_object, sv_batch, sv_object, sv_channel, v_middle, v_inner, sv_outer, sv_middle, sv_inner,
    p_grad, p_lse, p_delta, p_right, p_bias, value_width, depth,
    channels: tl.constexpr, BLOCK_C: tl.constexpr, FLAT: tl.constexpr, L2: tl.constexpr,
    SELECTION: tl.constexpr, SHRINKAGE: tl.constexpr, MASK: tl.constexpr, PRIOR: tl.constexpr,
    SPLIT: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr, INDEX: tl.constexpr,
    VALUE_FLAT: tl.constexpr, VALUE_DTYPE: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """right [B, M, depth] = dS' A and bias [B, M] = column sums of dS, of one memory block."""
    i_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    i_b = tl.program_id(1).to(tl.int64)
    i_c = tl.arange(0, BLOCK_C)
    v_at = offset_of(i_m, v_middle, v_inner, sv_outer, sv_middle, sv_inner, VALUE_FLAT, INDEX)
    b_key, b_gain, valid = load_memory(
        p_key + i_b * sk_batch, sk_channel, middle, inner, s_outer, s_middle, s_inner,
        p_mask + i_b * memory, p_shrinkage + i_b * memory,
        i_m, memory, scale, channels, BLOCK_C, FLAT, MASK, SHRINKAGE, INDEX,
    )  # fmt: skip
    b_along = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    b_squared = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    b_alone = tl.zeros((BLOCK_M,), tl.float32)
    b_bias = tl.zeros((BLOCK_M,), tl.float32)
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
        b_ds = score_gradient(
            b_score, valid, i_q, queries, p_lse + i_b * queries, p_delta + i_b * queries,
            p_grad + i_b * queries * value_width, p_value + i_b * sv_batch, v_at,
            per_object, sv_object, sv_channel, value_width,
            VALUE_DTYPE, PRECISION, INDEX, BLOCK_Q, BLOCK_M, BLOCK_V,
        )  # fmt: skip
        b_ds_t = tl.trans(b_ds).to(DTYPE)
        b_along = tl.dot(b_ds_t, b_x, b_along, input_precision=PRECISION)
        b_bias += tl.sum(b_ds, 0)
        if SELECTION:
            b_squared = tl.dot(b_ds_t, b_e, b_squared, input_precision=PRECISION)
            b_alone += tl.sum(b_ds * b_rest[:, None], 0)
    row = i_b * memory * depth + i_m.to(INDEX)[:, None] * depth
    inside = (i_m < memory)[:, None] & (i_c < channels)[None, :]
    factor = scale
    if L2:
        factor = 2 * scale
    tl.store(p_right + row + i_c[None, :], b_along * factor, mask=inside)
    if SELECTION:
        tl.store(p_right + row + channels + i_c[None, :], b_squared * -scale, mask=inside)
        p_last = p_right + (i_b * memory + i_m) * depth + 2 * channels
        tl.store(p_last, b_alone * -scale, mask=i_m < memory)
    tl.store(p_bias + i_b * memory + i_m, b_bias, mask=i_m < memory)


@triton.jit
def query_kernel(
    p_query, sq_batch, sq_channel, sq_position,
    p_selection, se_batch, se_channel, se_position,
    p_key, sk_batch, sk_channel, middle, inner, s_outer, s_middle, s_inner,
    p_mask, p_shrinkage, p_centers, p_precision, width, scale,
    queries, memory,
    p_value, per_object, sv_batch, sv_object, sv_channel, v_middle, v_inner, sv_outer, sv_middle, sv_inner,
    p_grad, p_lse, p_delta, p_left, value_width, depth, batch, span,
    channels: tl.constexpr, BLOCK_C: tl.constexpr, FLAT: tl.constexpr, L2: tl.constexpr,
    SELECTION: tl.constexpr, SHRINKAGE: tl.constexpr, MASK: tl.constexpr, PRIOR: tl.constexpr,
    SPLIT: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr, INDEX: tl.constexpr,
    VALUE_FLAT: tl.constexpr, VALUE_DTYPE: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """left [part, B, Q, depth] = dS B of one query block over one part of the memory."""
    i_q = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    i_b = (tl.program_id(1) % batch).to(tl.int64)
    i_part = tl.program_id(1) // batch
    start = i_part * span
    end = tl.minimum(start + span, memory)
    i_c = tl.arange(0, BLOCK_C)
    b_x, b_low, b_e, b_rest = load_query(
        p_query + i_b * sq_batch, sq_channel, sq_position,
        p_selection + i_b * se_batch, se_channel, se_position,
        i_q, queries, channels, BLOCK_C, SELECTION, SPLIT, DTYPE, INDEX,
    )  # fmt: skip
    b_along = tl.zeros((BLOCK_Q, BLOCK_C), tl.float32)
    b_squared = tl.zeros((BLOCK_Q, BLOCK_C), tl.float32)
    b_alone = tl.zeros((BLOCK_Q,), tl.float32)
    for i_m0 in range(start, end, BLOCK_M):
        i_m = i_m0 + tl.arange(0, BLOCK_M)
        v_at = offset_of(i_m, v_middle, v_inner, sv_outer, sv_middle, sv_inner, VALUE_FLAT, INDEX)
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
        b_ds = score_gradient(
            b_score, valid, i_q, queries, p_lse + i_b * queries, p_delta + i_b * queries,
            p_grad + i_b * queries * value_width, p_value + i_b * sv_batch, v_at,
            per_object, sv_object, sv_channel, value_width,
            VALUE_DTYPE, PRECISION, INDEX, BLOCK_Q, BLOCK_M, BLOCK_V,
        )  # fmt: skip
        if SHRINKAGE:
            b_ds = b_ds * tl.load(p_shrinkage + i_b * memory + i_m, mask=valid, other=0.0)[None, :]
        b_along = tl.dot(b_ds.to(DTYPE), tl.trans(b_key.to(DTYPE)), b_along, input_precision=PRECISION)
        if SELECTION:
            b_wide = b_key.to(tl.float32)
            b_square = (b_wide * b_wide).to(DTYPE)
            b_squared = tl.dot(b_ds.to(DTYPE), tl.trans(b_square), b_squared, input_precision=PRECISION)
            b_alone += tl.sum(b_ds, 1)
    row = (i_part * batch + i_b) * queries + i_q
    inside = (i_q < queries)[:, None] & (i_c < channels)[None, :]
    p_row = p_left + row[:, None] * depth + i_c[None, :]
    tl.store(p_row, b_along, mask=inside)
    if SELECTION:
        tl.store(p_row + channels, b_squared, mask=inside)
        tl.store(p_left + row * depth + 2 * channels, b_alone, mask=i_q < queries)


def backward(
    p: Scores, value: Tensor, grad_read: Tensor, delta: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """grad_left (B, Q, depth), grad_right (B, M, depth), grad_bias (B, M), grad_value (B, O, Cv, M)."""
    o, device = Operands.of(p, value, grad_read), value.device
    objects, value_channels = value.shape[1:3]
    value_width = objects * value_channels
    depth = 2 * o.channels + 1 if p.selection is not None else o.channels
    right = lse.new_zeros(o.batch, o.memory, depth)
    bias = lse.new_zeros(o.batch, o.memory)
    grad_value = value_gradient(value, o.memory)
    if lse.numel() == 0:
        return lse.new_zeros(o.batch, o.queries, depth), right, bias, grad_value.zero_()
    grad = grad_read.flatten(1, 2).mT.contiguous()  # [B, Q, width]
    positions = Positions.of(value, 3)
    narrow = value.dtype == p.query_key.dtype
    value_dtype = TYPES[value.dtype if narrow else torch.float32]
    block_q, block_m, most_v, warps = _tile(o, value_dtype != tl.float32)
    block_v = min(most_v, max(16, triton.next_power_of_2(value_width)))
    scores = (*o.query, *o.memory_side, o.queries, o.memory)
    values = (value, *value_strides(value), *positions.arguments)
    options = {**o.options, "VALUE_DTYPE": value_dtype, "BLOCK_Q": block_q, "BLOCK_M": block_m}
    blocks = triton.cdiv(o.memory, block_m)
    parts = split(blocks, triton.cdiv(o.queries, block_q) * o.batch, device)
    span = triton.cdiv(blocks, parts) * block_m
    parts = triton.cdiv(o.memory, span)
    left = lse.new_empty(parts, o.batch, o.queries, depth)
    with on_device(device):
        if value_width:
            wide_v = min(128, max(16, triton.next_power_of_2(value_width)))
            launch(
                value_kernel,
                (blocks, triton.cdiv(value_width, wide_v), o.batch),
                *scores, grad, lse, grad_value, value_width,
                **options, BLOCK_V=wide_v, num_warps=warps, num_stages=2,
            )  # fmt: skip
        launch(
            memory_kernel,
            (blocks, o.batch),
            *scores, *values, grad, lse, delta, right, bias, value_width, depth,
            **options, VALUE_FLAT=positions.flat, BLOCK_V=block_v, num_warps=warps, num_stages=2,
        )  # fmt: skip
        launch(
            query_kernel,
            (triton.cdiv(o.queries, block_q), parts * o.batch),
            *scores, *values, grad, lse, delta, left, value_width, depth, o.batch, span,
            **options, VALUE_FLAT=positions.flat, BLOCK_V=block_v, num_warps=warps, num_stages=2,
        )  # fmt: skip
    return left.sum(0), right, bias, grad_value


def _tile(o: Operands, narrow: bool) -> tuple[int, int, int, int]:
    """(BLOCK_Q, BLOCK_M, BLOCK_V, warps)."""
    if o.wide or not narrow:
        return 16, 32, 32 if o.block_c <= 64 else 16, 8
    return (16, 32, 32, 8) if o.options["SELECTION"] else (32, 64, 64, 8)
