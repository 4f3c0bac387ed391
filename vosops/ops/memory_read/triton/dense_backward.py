# SPDX-License-Identifier: Apache-2.0
"""Gradients of the dense read on the GPU, in the packed form of backward.py, without atomics.

With s = <a, b> + bias, P = exp(S - lse), dR the read's gradient, delta_i the product of a query's read and
its gradient: dV = P' dR, dS = P (dR V' - delta), dA = dS B, dB = dS' A, dbias = column sums of dS. Three
passes: dV by memory block and value chunk, dB by memory block, dA by query block and part of the memory.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...launch import capability, launch, on_device, split
from ..problem import Scores
from .operands import Operands, Values, slim
from .scores import LOG2E, entry, load_memory, load_query, offset_of, score, to_bits


@triton.jit
def value_kernel(
    heads, p_query, sq_batch, sq_head, sq_channel, sq_position,
    p_selection, se_batch, se_channel, se_position,
    p_key, sk_batch, sk_head, sk_channel, middle, inner, s_outer, s_middle, s_inner,
    p_mask, p_shrinkage, p_centers, p_precision, width, scale,
    queries, memory, p_grad, p_lse, p_grad_value, value_width,
    channels: tl.constexpr, BLOCK_C: tl.constexpr, FLAT: tl.constexpr, FORM: tl.constexpr,
    SELECTION: tl.constexpr, SHRINKAGE: tl.constexpr, MASK: tl.constexpr, PRIOR: tl.constexpr,
    SPLIT: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr, INDEX: tl.constexpr,
    VALUE_DTYPE: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """grad_value [entry, M, width] = P' grad; grad [entry, Q, width]."""
    i_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    i_v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    i_b = tl.program_id(2).to(tl.int64)
    p_query += entry(i_b, heads, sq_batch, sq_head)
    p_key += entry(i_b, heads, sk_batch, sk_head)
    b_key, b_gain, b_bias, valid = load_memory(
        p_key, sk_channel, middle, inner, s_outer, s_middle, s_inner,
        p_mask + i_b * memory, p_shrinkage + i_b * memory,
        i_m, memory, scale, channels, BLOCK_C, FLAT, FORM, SELECTION, MASK, SHRINKAGE, INDEX,
    )  # fmt: skip
    bits = to_bits(scale, FORM)
    b_out = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
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
            FORM, SELECTION, PRIOR, SPLIT, DTYPE, PRECISION, MASK,
        )  # fmt: skip
        b_lse = tl.load(p_lse + i_b * queries + i_q, mask=i_q < queries, other=float("inf"))
        b_weight = tl.exp2(b_score * bits - (b_lse * LOG2E)[:, None])
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
    b_score, bits, valid, i_q, i_m, queries, p_lse, p_delta, p_grad,
    p_value, v_at, per_object, sv_object, sv_channel, p_identity, si_channel, si_position, value_width,
    IDENTITY: tl.constexpr, VALUE_DTYPE: tl.constexpr, PRECISION: tl.constexpr, INDEX: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """dS [BLOCK_Q, BLOCK_M] of a score tile; p_lse, p_delta, p_grad, p_value, p_identity of the entry."""
    b_product = tl.zeros((BLOCK_Q, BLOCK_M), tl.float32)
    for i_v0 in range(0, value_width, BLOCK_V):
        i_v = i_v0 + tl.arange(0, BLOCK_V)
        at_channel = (i_v // per_object).to(INDEX) * sv_object + (i_v % per_object).to(INDEX) * sv_channel
        b_grad = tl.load(
            p_grad + (i_q.to(INDEX)[:, None] * value_width + i_v[None, :]),
            mask=(i_q < queries)[:, None] & (i_v < value_width)[None, :], other=0.0,
        )  # fmt: skip
        inside = (i_v < value_width)[:, None] & valid[None, :]
        b_value = tl.load(p_value + (at_channel[:, None] + v_at[None, :]), mask=inside, other=0.0)
        if IDENTITY:
            i_at = i_m.to(INDEX)[None, :] * si_position + i_v.to(INDEX)[:, None] * si_channel
            b_value = b_value.to(tl.float32) + tl.load(p_identity + i_at, mask=inside, other=0.0)
        b_product = tl.dot(
            b_grad.to(VALUE_DTYPE), b_value.to(VALUE_DTYPE), b_product, input_precision=PRECISION
        )
    b_lse = tl.load(p_lse + i_q, mask=i_q < queries, other=float("inf"))
    b_delta = tl.load(p_delta + i_q, mask=i_q < queries, other=0.0)
    return tl.exp2(b_score * bits - (b_lse * LOG2E)[:, None]) * (b_product - b_delta[:, None])


@triton.jit
def memory_kernel(
    heads, p_query, sq_batch, sq_head, sq_channel, sq_position,
    p_selection, se_batch, se_channel, se_position,
    p_key, sk_batch, sk_head, sk_channel, middle, inner, s_outer, s_middle, s_inner,
    p_mask, p_shrinkage, p_centers, p_precision, width, scale,
    queries, memory,
    p_value, per_object, sv_batch, sv_head, sv_object, sv_channel,
    v_middle, v_inner, sv_outer, sv_middle, sv_inner,
    p_identity, si_batch, si_head, si_channel, si_position,
    p_grad, p_lse, p_delta, p_right, p_bias, value_width, depth,
    channels: tl.constexpr, BLOCK_C: tl.constexpr, FLAT: tl.constexpr, FORM: tl.constexpr,
    SELECTION: tl.constexpr, SHRINKAGE: tl.constexpr, MASK: tl.constexpr, PRIOR: tl.constexpr,
    SPLIT: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr, INDEX: tl.constexpr,
    VALUE_FLAT: tl.constexpr, VALUE_DTYPE: tl.constexpr, IDENTITY: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """right [entry, M, depth] = dS' A and bias [entry, M] = column sums of dS, of one memory block."""
    i_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    i_b = tl.program_id(1).to(tl.int64)
    p_query += entry(i_b, heads, sq_batch, sq_head)
    p_key += entry(i_b, heads, sk_batch, sk_head)
    p_value += entry(i_b, heads, sv_batch, sv_head)
    p_identity += entry(i_b, heads, si_batch, si_head)
    i_c = tl.arange(0, BLOCK_C)
    v_at = offset_of(i_m, v_middle, v_inner, sv_outer, sv_middle, sv_inner, VALUE_FLAT, INDEX)
    b_key, b_gain, b_bias, valid = load_memory(
        p_key, sk_channel, middle, inner, s_outer, s_middle, s_inner,
        p_mask + i_b * memory, p_shrinkage + i_b * memory,
        i_m, memory, scale, channels, BLOCK_C, FLAT, FORM, SELECTION, MASK, SHRINKAGE, INDEX,
    )  # fmt: skip
    bits = to_bits(scale, FORM)
    b_along = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    b_squared = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    b_alone = tl.zeros((BLOCK_M,), tl.float32)
    b_columns = tl.zeros((BLOCK_M,), tl.float32)
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
            FORM, SELECTION, PRIOR, SPLIT, DTYPE, PRECISION, MASK,
        )  # fmt: skip
        b_ds = score_gradient(
            b_score, bits, valid, i_q, i_m, queries, p_lse + i_b * queries, p_delta + i_b * queries,
            p_grad + i_b * queries * value_width, p_value, v_at,
            per_object, sv_object, sv_channel, p_identity, si_channel, si_position, value_width,
            IDENTITY, VALUE_DTYPE, PRECISION, INDEX, BLOCK_Q, BLOCK_M, BLOCK_V,
        )  # fmt: skip
        b_ds_t = tl.trans(b_ds).to(DTYPE)
        b_along = tl.dot(b_ds_t, b_x, b_along, input_precision=PRECISION)
        b_columns += tl.sum(b_ds, 0)
        if SELECTION:
            b_squared = tl.dot(b_ds_t, b_e, b_squared, input_precision=PRECISION)
            b_alone += tl.sum(b_ds * b_rest[:, None], 0)
    row = i_b * memory * depth + i_m.to(INDEX)[:, None] * depth
    inside = (i_m < memory)[:, None] & (i_c < channels)[None, :]
    factor = scale
    if FORM == "l2" or FORM == "distance":
        factor = 2 * scale
    tl.store(p_right + row + i_c[None, :], b_along * factor, mask=inside)
    if SELECTION:
        tl.store(p_right + row + channels + i_c[None, :], b_squared * -scale, mask=inside)
        p_last = p_right + (i_b * memory + i_m) * depth + 2 * channels
        tl.store(p_last, b_alone * -scale, mask=i_m < memory)
    tl.store(p_bias + i_b * memory + i_m, b_columns, mask=i_m < memory)


@triton.jit
def query_kernel(
    heads, p_query, sq_batch, sq_head, sq_channel, sq_position,
    p_selection, se_batch, se_channel, se_position,
    p_key, sk_batch, sk_head, sk_channel, middle, inner, s_outer, s_middle, s_inner,
    p_mask, p_shrinkage, p_centers, p_precision, width, scale,
    queries, memory,
    p_value, per_object, sv_batch, sv_head, sv_object, sv_channel,
    v_middle, v_inner, sv_outer, sv_middle, sv_inner,
    p_identity, si_batch, si_head, si_channel, si_position,
    p_grad, p_lse, p_delta, p_left, value_width, depth, entries, span,
    channels: tl.constexpr, BLOCK_C: tl.constexpr, FLAT: tl.constexpr, FORM: tl.constexpr,
    SELECTION: tl.constexpr, SHRINKAGE: tl.constexpr, MASK: tl.constexpr, PRIOR: tl.constexpr,
    SPLIT: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr, INDEX: tl.constexpr,
    VALUE_FLAT: tl.constexpr, VALUE_DTYPE: tl.constexpr, IDENTITY: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """left [part, entry, Q, depth] = dS B of one query block over one part of the memory."""
    i_q = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    i_b = (tl.program_id(1) % entries).to(tl.int64)
    p_query += entry(i_b, heads, sq_batch, sq_head)
    p_key += entry(i_b, heads, sk_batch, sk_head)
    p_value += entry(i_b, heads, sv_batch, sv_head)
    p_identity += entry(i_b, heads, si_batch, si_head)
    i_part = tl.program_id(1) // entries
    start = i_part * span
    end = tl.minimum(start + span, memory)
    i_c = tl.arange(0, BLOCK_C)
    b_x, b_low, b_e, b_rest = load_query(
        p_query, sq_channel, sq_position,
        p_selection + i_b * se_batch, se_channel, se_position,
        i_q, queries, channels, BLOCK_C, SELECTION, SPLIT, DTYPE, INDEX,
    )  # fmt: skip
    bits = to_bits(scale, FORM)
    b_along = tl.zeros((BLOCK_Q, BLOCK_C), tl.float32)
    b_squared = tl.zeros((BLOCK_Q, BLOCK_C), tl.float32)
    b_alone = tl.zeros((BLOCK_Q,), tl.float32)
    for i_m0 in range(start, end, BLOCK_M):
        i_m = i_m0 + tl.arange(0, BLOCK_M)
        v_at = offset_of(i_m, v_middle, v_inner, sv_outer, sv_middle, sv_inner, VALUE_FLAT, INDEX)
        b_key, b_gain, b_bias, valid = load_memory(
            p_key, sk_channel, middle, inner, s_outer, s_middle, s_inner,
            p_mask + i_b * memory, p_shrinkage + i_b * memory,
            i_m, memory, scale, channels, BLOCK_C, FLAT, FORM, SELECTION, MASK, SHRINKAGE, INDEX,
        )  # fmt: skip
        b_score = score(
            b_x, b_low, b_e, b_rest, b_key, b_gain, b_bias, valid,
            p_centers + i_b * memory * 2, p_precision + i_b * memory, i_q, i_m, width,
            FORM, SELECTION, PRIOR, SPLIT, DTYPE, PRECISION,
        )  # fmt: skip
        b_ds = score_gradient(
            b_score, bits, valid, i_q, i_m, queries, p_lse + i_b * queries, p_delta + i_b * queries,
            p_grad + i_b * queries * value_width, p_value, v_at,
            per_object, sv_object, sv_channel, p_identity, si_channel, si_position, value_width,
            IDENTITY, VALUE_DTYPE, PRECISION, INDEX, BLOCK_Q, BLOCK_M, BLOCK_V,
        )  # fmt: skip
        if SHRINKAGE:
            b_ds = b_ds * tl.load(p_shrinkage + i_b * memory + i_m, mask=valid, other=0.0)[None, :]
        b_along = tl.dot(b_ds.to(DTYPE), tl.trans(b_key.to(DTYPE)), b_along, input_precision=PRECISION)
        if SELECTION:
            b_wide = b_key.to(tl.float32)
            b_square = (b_wide * b_wide).to(DTYPE)
            b_squared = tl.dot(b_ds.to(DTYPE), tl.trans(b_square), b_squared, input_precision=PRECISION)
            b_alone += tl.sum(b_ds, 1)
    row = (i_part * entries + i_b) * queries + i_q
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
    o = Operands.of(p, value, grad_read)
    grad = grad_read.flatten(1, 2).mT.contiguous()  # [B, Q, O * Cv]
    *packed, grad_value = backward_of_entries(o, Values.of(value, o), grad, delta, lse)
    grad_value = grad_value.unflatten(2, value.shape[1:3]).permute(0, 2, 3, 1)
    return packed[0], packed[1], packed[2], grad_value


def backward_of_entries(
    o: Operands, v: Values, grad: Tensor, delta: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same for each entry, of grad (entries, Q, width); grad_value is (entries, M, width)."""
    depth = 2 * o.channels + 1 if o.options["SELECTION"] else o.channels
    right = lse.new_zeros(o.entries, o.memory, depth)
    bias = lse.new_zeros(o.entries, o.memory)
    grad_value = lse.new_empty(o.entries, o.memory, v.width)
    if lse.numel() == 0:
        return lse.new_zeros(o.entries, o.queries, depth), right, bias, grad_value.zero_()
    block_q, block_m, most_v, warps = _tile(o, v)
    block_v = min(most_v, v.block)
    scores = (*o.query, *o.memory_side, o.queries, o.memory)
    blocks = triton.cdiv(o.memory, block_m)
    parts = split(blocks, triton.cdiv(o.queries, block_q) * o.entries, o.device)
    span = triton.cdiv(blocks, parts) * block_m
    parts = triton.cdiv(o.memory, span)
    left = lse.new_empty(parts, o.entries, o.queries, depth)
    tile = {"BLOCK_Q": block_q, "BLOCK_M": block_m, "num_warps": warps, "num_stages": 2}
    with on_device(o.device):
        if v.width:
            wide_v = min(128, v.block)
            launch(
                value_kernel,
                (blocks, triton.cdiv(v.width, wide_v), o.entries),
                *scores, grad, lse, grad_value, v.width,
                **o.options, VALUE_DTYPE=v.options["VALUE_DTYPE"], BLOCK_V=wide_v, **tile,
            )  # fmt: skip
        launch(
            memory_kernel,
            (blocks, o.entries),
            *scores, *v.arguments, grad, lse, delta, right, bias, v.width, depth,
            **o.options, **v.options, BLOCK_V=block_v, **tile,
        )  # fmt: skip
        launch(
            query_kernel,
            (triton.cdiv(o.queries, block_q), parts * o.entries),
            *scores, *v.arguments, grad, lse, delta, left, v.width, depth, o.entries, span,
            **o.options, **v.options, BLOCK_V=block_v, **tile,
        )  # fmt: skip
    return left.sum(0), right, bias, grad_value


def _tile(o: Operands, v: Values) -> tuple[int, int, int, int]:
    """(BLOCK_Q, BLOCK_M, BLOCK_V, warps)."""
    if slim(o, v):
        if v.narrow and not o.wide:
            return 64, 64, 32, 4
        return 64, 32, 32, 4 if capability(o.device)[0] >= 9 else 8
    if o.wide or not v.narrow:
        return 16, 32, 32 if o.block_c <= 64 else 16, 8
    return (16, 32, 32, 8) if o.options["SELECTION"] else (32, 64, 64, 8)
