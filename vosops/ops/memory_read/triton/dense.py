# SPDX-License-Identifier: Apache-2.0
"""The dense read on the GPU: online softmax over memory blocks, split over the memory when queries are few.

A program holds BLOCK_Q queries and BLOCK_V of an entry's value channels; the parts of a split memory are
merged by their log-sum-exp. Exponents are of two, which is what the hardware computes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...launch import capability, launch, on_device, split
from ..problem import Scores
from .operands import Operands, Values, column_tile, index_type, slim
from .scores import LN2, LOG2E, entry, load_memory, load_query, offset_of, score, to_bits


@triton.jit
def read_kernel(
    heads, p_query, sq_batch, sq_head, sq_channel, sq_position,
    p_selection, se_batch, se_channel, se_position,
    p_key, sk_batch, sk_head, sk_channel, middle, inner, s_outer, s_middle, s_inner,
    p_mask, p_shrinkage, p_centers, p_precision, width, scale,
    queries, memory,
    p_value, per_object, sv_batch, sv_head, sv_object, sv_channel,
    v_middle, v_inner, sv_outer, sv_middle, sv_inner,
    p_identity, si_batch, si_head, si_channel, si_position,
    p_read, p_lse, value_width, entries, span, so_part, so_batch, so_head, so_query, so_channel,
    channels: tl.constexpr, BLOCK_C: tl.constexpr, FLAT: tl.constexpr, FORM: tl.constexpr,
    SELECTION: tl.constexpr, SHRINKAGE: tl.constexpr, MASK: tl.constexpr, PRIOR: tl.constexpr,
    SPLIT: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr, INDEX: tl.constexpr,
    VALUE_FLAT: tl.constexpr, VALUE_DTYPE: tl.constexpr, IDENTITY: tl.constexpr, PARTS: tl.constexpr,
    SLIM: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """read [part, entry, ...] by strides and lse [part, entry, Q]; of a part without a match lse is -inf, or,
    when it is the only part, +inf, so that exp(s - lse) is 0."""
    i_q = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    i_v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    i_b = (tl.program_id(2) % entries).to(tl.int64)
    p_query += entry(i_b, heads, sq_batch, sq_head)
    p_key += entry(i_b, heads, sk_batch, sk_head)
    p_value += entry(i_b, heads, sv_batch, sv_head)
    p_identity += entry(i_b, heads, si_batch, si_head)
    i_part = tl.program_id(2) // entries
    start = i_part * span
    end = tl.minimum(start + span, memory)
    b_x, b_low, b_e, b_rest = load_query(
        p_query, sq_channel, sq_position,
        p_selection + i_b * se_batch, se_channel, se_position,
        i_q, queries, channels, BLOCK_C, SELECTION, SPLIT, DTYPE, INDEX,
    )  # fmt: skip
    bits = to_bits(scale, FORM)
    at_channel = (i_v // per_object).to(INDEX) * sv_object + (i_v % per_object).to(INDEX) * sv_channel
    b_top = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    b_total = tl.zeros((BLOCK_Q,), tl.float32)
    b_read = tl.zeros((BLOCK_Q, BLOCK_V), tl.float32)
    whole = end
    if SLIM:  # only the last block has scores to leave out, which is a fifth of the loop's instructions
        whole = start + (end - start) // BLOCK_M * BLOCK_M
    for LAST in tl.static_range(1 + SLIM):
        first, last = start, whole
        if LAST:
            first, last = whole, end
        for i_m0 in range(first, last, BLOCK_M):
            i_m = i_m0 + tl.arange(0, BLOCK_M)
            b_key, b_gain, b_bias, valid = load_memory(
                p_key, sk_channel, middle, inner, s_outer, s_middle, s_inner,
                p_mask + i_b * memory, p_shrinkage + i_b * memory,
                i_m, memory, scale, channels, BLOCK_C, FLAT, FORM, SELECTION, MASK, SHRINKAGE, INDEX,
            )  # fmt: skip
            b_score = score(
                b_x, b_low, b_e, b_rest, b_key, b_gain, b_bias, valid,
                p_centers + i_b * memory * 2, p_precision + i_b * memory, i_q, i_m, width,
                FORM, SELECTION, PRIOR, SPLIT, DTYPE, PRECISION, (MASK or LAST) or not SLIM,
            )  # fmt: skip
            b_new = tl.maximum(b_top, tl.max(b_score, 1))
            b_shift = tl.where(b_new == float("-inf"), 0.0, b_new * bits)
            b_weight = tl.exp2(b_score * bits - b_shift[:, None])
            b_fade = tl.exp2(b_top * bits - b_shift)
            b_total = b_total * b_fade + tl.sum(b_weight, 1)
            b_top = b_new
            v_at = offset_of(i_m, v_middle, v_inner, sv_outer, sv_middle, sv_inner, VALUE_FLAT, INDEX)
            inside = valid[:, None] & (i_v < value_width)[None, :]
            b_value = tl.load(p_value + (v_at[:, None] + at_channel[None, :]), mask=inside, other=0.0)
            if IDENTITY:
                i_at = i_m.to(INDEX)[:, None] * si_position + i_v.to(INDEX)[None, :] * si_channel
                b_value = b_value.to(tl.float32) + tl.load(p_identity + i_at, mask=inside, other=0.0)
            b_read = tl.dot(
                b_weight.to(VALUE_DTYPE), b_value.to(VALUE_DTYPE), b_read * b_fade[:, None],
                input_precision=PRECISION,
            )  # fmt: skip
    empty = b_total == 0.0
    b_read = b_read / tl.where(empty, 1.0, b_total)[:, None]
    b_lse = (b_top * bits + tl.log2(tl.where(empty, 1.0, b_total))) * LN2
    if PARTS == 1:
        b_lse = tl.where(empty, float("inf"), b_lse)
    p_out = p_read + i_part * so_part + entry(i_b, heads, so_batch, so_head)
    p_out += i_q.to(INDEX)[:, None] * so_query + i_v.to(INDEX)[None, :] * so_channel
    tl.store(p_out, b_read, mask=(i_q < queries)[:, None] & (i_v < value_width)[None, :])
    if tl.program_id(1) == 0:
        tl.store(p_lse + (i_part * entries + i_b) * queries + i_q, b_lse, mask=i_q < queries)


@triton.jit
def merge_kernel(
    heads, p_parts, p_lses, p_read, p_lse, queries, value_width, entries, parts,
    so_batch, so_head, so_query, so_channel,
    INDEX: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """read by strides and lse [entry, Q] from parts [part, entry, Q, width] and lses [part, entry, Q]."""
    i_q = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    i_v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    i_b = tl.program_id(2).to(tl.int64)
    b_top = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    b_bad = tl.zeros((BLOCK_Q,), tl.float32)
    for i_part in range(parts):
        row = (i_part * entries + i_b) * queries + i_q
        b_lse = tl.load(p_lses + row, mask=i_q < queries, other=float("-inf"))
        b_top = tl.maximum(b_top, b_lse)
        b_bad += tl.where(b_lse == b_lse, 0.0, float("nan"))
    b_top = tl.where(b_top == float("-inf"), 0.0, b_top) + b_bad
    b_total = tl.zeros((BLOCK_Q,), tl.float32)
    b_read = tl.zeros((BLOCK_Q, BLOCK_V), tl.float32)
    for i_part in range(parts):
        row = (i_part * entries + i_b) * queries + i_q
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
    p_out = p_read + entry(i_b, heads, so_batch, so_head)
    p_out += i_q.to(INDEX)[:, None] * so_query + i_v.to(INDEX)[None, :] * so_channel
    tl.store(p_out, b_read, mask=(i_q < queries)[:, None] & (i_v < value_width)[None, :])
    if tl.program_id(1) == 0:
        tl.store(p_lse + i_b * queries + i_q, b_lse, mask=i_q < queries)


@triton.jit
def usage_kernel(
    heads, p_query, sq_batch, sq_head, sq_channel, sq_position,
    p_selection, se_batch, se_channel, se_position,
    p_key, sk_batch, sk_head, sk_channel, middle, inner, s_outer, s_middle, s_inner,
    p_mask, p_shrinkage, p_centers, p_precision, width, scale,
    queries, memory, p_lse, p_usage,
    channels: tl.constexpr, BLOCK_C: tl.constexpr, FLAT: tl.constexpr, FORM: tl.constexpr,
    SELECTION: tl.constexpr, SHRINKAGE: tl.constexpr, MASK: tl.constexpr, PRIOR: tl.constexpr,
    SPLIT: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr, INDEX: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """usage [entry, M] = sum over queries of exp(s - lse)."""
    i_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    i_b = tl.program_id(1).to(tl.int64)
    p_query += entry(i_b, heads, sq_batch, sq_head)
    p_key += entry(i_b, heads, sk_batch, sk_head)
    b_key, b_gain, b_bias, valid = load_memory(
        p_key, sk_channel, middle, inner, s_outer, s_middle, s_inner,
        p_mask + i_b * memory, p_shrinkage + i_b * memory,
        i_m, memory, scale, channels, BLOCK_C, FLAT, FORM, SELECTION, MASK, SHRINKAGE, INDEX,
    )  # fmt: skip
    bits = to_bits(scale, FORM)
    b_usage = tl.zeros((BLOCK_M,), tl.float32)
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
        b_usage += tl.sum(tl.exp2(b_score * bits - (b_lse * LOG2E)[:, None]), 0)
    tl.store(p_usage + i_b * memory + i_m, b_usage, mask=i_m < memory)


def read(p: Scores, value: Tensor) -> tuple[Tensor, Tensor]:
    """(B, O, Cv, Q) float32 and the scores' log-sum-exp (B, Q), +inf where a query can match nothing."""
    o = Operands.of(p, value)
    result = torch.empty(*value.shape[:3], o.queries, dtype=torch.float32, device=o.device)
    lse = torch.empty(o.entries, o.queries, dtype=torch.float32, device=o.device)
    read_into(o, Values.of(value, o), result.flatten(1, 2)[:, None], lse)
    return result, lse


def read_into(o: Operands, v: Values, result: Tensor, lse: Tensor) -> None:
    """Writes result (batch, heads, width, Q), of any strides, and lse (entries, Q)."""
    if lse.numel() == 0:
        return
    block_q, block_m, block_v, warps = _tile(o, v)
    chunks = max(1, triton.cdiv(v.width, block_v))
    blocks = triton.cdiv(o.memory, block_m)
    parts = split(blocks, triton.cdiv(o.queries, block_q) * chunks * o.entries, o.device)
    span = triton.cdiv(blocks, parts) * block_m
    parts = triton.cdiv(o.memory, span)
    s_batch, s_head, s_channel, s_query = result.stride()
    strides = (s_batch, s_head, s_query, s_channel)
    target, lses, of_part = result, lse, (0, *strides)
    if parts > 1:
        target = result.new_empty(parts, o.entries, o.queries, v.width)
        lses = lse.new_empty(parts, o.entries, o.queries)
        of_entry = o.queries * v.width
        of_part = (o.entries * of_entry, o.heads * of_entry, of_entry, v.width, 1)
    with on_device(o.device):
        launch(
            read_kernel,
            (triton.cdiv(o.queries, block_q), chunks, o.entries * parts),
            *o.query, *o.memory_side, o.queries, o.memory, *v.arguments,
            target, lses, v.width, o.entries, span, *of_part,
            **o.options, **v.options, PARTS=parts if parts == 1 else 2, SLIM=slim(o, v),
            BLOCK_Q=block_q, BLOCK_M=block_m, BLOCK_V=block_v, num_warps=warps, num_stages=2,
        )  # fmt: skip
        if parts > 1:
            launch(
                merge_kernel,
                (triton.cdiv(o.queries, 16), max(1, triton.cdiv(v.width, 128)), o.entries),
                o.heads, target, lses, result, lse, o.queries, v.width, o.entries, parts, *strides,
                INDEX=index_type(result), BLOCK_Q=16, BLOCK_V=128, num_warps=4,
            )  # fmt: skip


def usage(p: Scores, lse: Tensor) -> Tensor:
    """(B, M) float32."""
    return usage_of_entries(Operands.of(p), lse)


def usage_of_entries(o: Operands, lse: Tensor) -> Tensor:
    """(entries, M) float32."""
    result = torch.zeros(o.entries, o.memory, dtype=torch.float32, device=o.device)
    if lse.numel() == 0:
        return result
    block_q, block_m, warps = column_tile(o)
    with on_device(o.device):
        launch(
            usage_kernel,
            (triton.cdiv(o.memory, block_m), o.entries),
            *o.query, *o.memory_side, o.queries, o.memory, lse, result,
            **o.options, BLOCK_Q=block_q, BLOCK_M=block_m, num_warps=warps, num_stages=2,
        )  # fmt: skip
    return result


def _tile(o: Operands, v: Values) -> tuple[int, int, int, int]:
    """(BLOCK_Q, BLOCK_M, BLOCK_V, warps): the largest that fit the registers."""
    selects = bool(o.options["SELECTION"])
    # Where channels are not innermost, addresses take registers too.
    if v.narrow and not o.wide:
        large = slim(o, v) or (v.rows and not selects and capability(o.device)[0] >= 9)
        tile = (128 if large else 64, 64, 256 if v.rows else 128)
        if selects and not v.rows:
            tile = (64, 32, 64)
    elif slim(o, v):
        tile = (128, 32, 32)
    elif selects or not (v.rows or o.block_c <= 64):
        tile = (16, 32, 128)
    else:
        tile = (64 if v.rows and o.block_c <= 64 else 32, 32, 128)
    return tile[0], tile[1], min(tile[2], v.block), 8
