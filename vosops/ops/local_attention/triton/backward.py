# SPDX-License-Identifier: Apache-2.0
"""Gradients of local attention on the GPU from the log-sum-exp of every query, without atomics.

    P = exp(S - lse), dP = <dR, v + relative_value>, dS = P (dP - delta),
    dq = dS (scale k + weight), dk = scale dS' q, dv = P' dR; the tables: the same sums over all queries.

Three passes, each of which computes S and dP again: by tile of queries (dq, and dS as the gradient of
relative_bias), by tile of keys over the queries whose windows hold it (`memory.py`: dk, dv), and by part of a
window row over all queries of a head (the tables), cut into splits that are added up in order.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...launch import capability, launch, on_device, processors
from .memory import memory_kernel
from .operands import STRIP as WIDTH
from .operands import Operands
from .tiles import (
    LOG2E,
    STRIP,
    by_offset,
    by_strip,
    load_cells,
    load_table,
    matches,
    plane_at,
    tile_of,
    window_gradient,
    window_scores,
)


@triton.jit
def query_kernel(
    p_query, sq_batch, sq_channel, sq_row, sq_column,
    p_key, sk_batch, sk_channel, sk_row, sk_column,
    p_value, sv_batch, sv_channel, sv_row, sv_column,
    p_bias, sb_batch, sb_head, sb_offset, sb_row, sb_column,
    p_weight, p_offset, p_relative,
    heads, height, width, dilation, window, scale,
    p_grad, p_lse, p_delta, p_grad_query, p_grad_bias,
    channels: tl.constexpr, value_channels: tl.constexpr, BLOCK_C: tl.constexpr, PARTS: tl.constexpr,
    BIAS: tl.constexpr, WEIGHT: tl.constexpr, OFFSET: tl.constexpr, RELATIVE: tl.constexpr,
    DTYPE: tl.constexpr, VALUE_DTYPE: tl.constexpr, PRECISION: tl.constexpr, INDEX: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """grad_query [B, C, H, W], BLOCK_C channels of a head at a time, and the bias' gradient where there is a
    match [B, h, window^2, H, W]; p_grad [B, Cv, H, W], p_lse and p_delta [B, h, H, W] contiguous."""
    BLOCK_Q: tl.constexpr = ROWS * STRIP
    i_b, i_h, top, left, rows, columns, i_y0, i_x0 = tile_of(
        tl.program_id(0), heads, height, width, dilation, ROWS
    )
    area = height * width
    i_q = tl.arange(0, BLOCK_Q)
    i_y, i_x = i_y0 + i_q // STRIP, i_x0 + i_q % STRIP
    inside = (i_y < rows) & (i_x < columns)
    p_query += plane_at(i_b, i_h * channels, top, left, sq_batch, sq_channel, sq_row, sq_column)
    p_key += plane_at(i_b, i_h * channels, top, left, sk_batch, sk_channel, sk_row, sk_column)
    p_value += plane_at(i_b, i_h * value_channels, top, left, sv_batch, sv_channel, sv_row, sv_column)
    p_bias += plane_at(i_b, i_h, top, left, sb_batch, sb_head, sb_row, sb_column)
    p_grad += plane_at(i_b, i_h * value_channels, top, left, heads * value_channels * area, area, width, 1)
    p_weight += i_h * window * window * channels
    p_offset += i_h * window * window
    p_relative += i_h * window * window * value_channels
    sq_row, sq_column = sq_row * dilation, sq_column * dilation
    sk_row, sk_column = sk_row * dilation, sk_column * dilation
    sv_row, sv_column = sv_row * dilation, sv_column * dilation
    sb_row, sb_column = sb_row * dilation, sb_column * dilation
    cell = (top + i_y * dilation) * width + left + i_x * dilation
    b_lse = tl.load(p_lse + (i_b * heads + i_h) * area + cell, mask=inside, other=float("inf")) * LOG2E
    b_delta = tl.load(p_delta + (i_b * heads + i_h) * area + cell, mask=inside, other=0.0)
    b_query = load_cells(
        p_query, sq_channel, sq_row, sq_column, i_y, i_x, tl.arange(0, BLOCK_C), inside, channels, INDEX
    ).to(DTYPE)  # fmt: skip
    b_grad = load_cells(
        p_grad, area, width * dilation, dilation,
        i_y, i_x, tl.arange(0, BLOCK_V), inside, value_channels, INDEX,
    ).to(VALUE_DTYPE)  # fmt: skip
    i_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    first = tl.maximum(i_y0 - window // 2, 0)
    steps = (tl.minimum(i_y0 + ROWS + window // 2, rows) - first) * PARTS
    b_out = tl.zeros((BLOCK_Q, BLOCK_C), tl.float32)
    b_along = tl.zeros((ROWS, STRIP, BLOCK_C), tl.float32)
    for step in range(steps):
        i_row, i_part = first + step // PARTS, step % PARTS
        b_score, valid, i_r, i_k, seen = window_scores(
            b_query, p_query, sq_channel, sq_row, sq_column, p_key, sk_channel, sk_row, sk_column,
            p_bias, sb_offset, sb_row, sb_column, p_weight, p_offset,
            i_row, i_part, i_y0, i_x0, rows, columns, window, scale,
            channels, BLOCK_C, BIAS, WEIGHT, OFFSET, DTYPE, PRECISION, INDEX, ROWS,
        )  # fmt: skip
        _, b_ds = window_gradient(
            b_score, valid, b_lse, b_delta, b_grad, p_grad, area, width * dilation, dilation,
            p_value, sv_channel, sv_row, sv_column, p_relative,
            i_row, i_part, i_y0, i_x0, i_r, i_k, seen, rows, columns, window,
            value_channels, BLOCK_V, RELATIVE, VALUE_DTYPE, PRECISION, INDEX, ROWS,
        )  # fmt: skip
        b_key = load_cells(
            p_key, sk_channel, sk_row, sk_column, i_r, i_k, i_c, seen, channels, INDEX
        ).to(DTYPE)  # fmt: skip
        b_out = tl.dot(b_ds.to(DTYPE), b_key, b_out, input_precision=PRECISION)
        if WEIGHT:
            b_table = load_table(
                p_weight, channels, 1, i_row - i_y0 - tl.arange(0, ROWS) + window // 2,
                i_part, window, i_c, channels, ROWS,
            )  # fmt: skip
            b_along = by_strip(
                by_offset(b_ds, ROWS).to(DTYPE), tl.permute(b_table, (0, 2, 1)).to(DTYPE),
                b_along, ROWS, PRECISION,
            )  # fmt: skip
        if BIAS:
            _, _, _, _, i_dy, i_dx = matches(i_row, i_part, i_y0, i_x0, rows, columns, window, ROWS)
            at = (i_b * heads + i_h) * window * window + (i_dy[:, None] * window + i_dx)
            if tl.program_id(1) == 0:
                tl.store(p_grad_bias + (at * area + cell[:, None]), b_ds, mask=valid & inside[:, None])
    b_out = b_out * scale + tl.reshape(b_along, [BLOCK_Q, BLOCK_C])
    p_out = p_grad_query + (i_b * heads + i_h) * channels * area
    tl.store(
        p_out + (i_c.to(tl.int64)[None, :] * area + cell[:, None]),
        b_out, mask=inside[:, None] & (i_c < channels)[None, :],
    )  # fmt: skip


@triton.jit
def table_kernel(
    p_query, sq_batch, sq_channel, sq_row, sq_column,
    p_key, sk_batch, sk_channel, sk_row, sk_column,
    p_value, sv_batch, sv_channel, sv_row, sv_column,
    p_bias, sb_batch, sb_head, sb_offset, sb_row, sb_column,
    p_weight, p_offset, p_relative,
    heads, height, width, dilation, window, scale,
    p_grad, p_lse, p_delta, p_grad_weight, p_grad_offset, p_grad_relative, tiles, items, span,
    channels: tl.constexpr, value_channels: tl.constexpr, BLOCK_C: tl.constexpr, PARTS: tl.constexpr,
    BIAS: tl.constexpr, WEIGHT: tl.constexpr, OFFSET: tl.constexpr, RELATIVE: tl.constexpr,
    DTYPE: tl.constexpr, VALUE_DTYPE: tl.constexpr, PRECISION: tl.constexpr, INDEX: tl.constexpr,
    BLOCK_V: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr,
):  # fmt: skip
    """Of 16 offsets: grad_weight [split, h, window PARTS, 16, C / h] and grad_offset [split, h, window PARTS,
    16] with KEY, grad_relative [split, h, window PARTS, 16, Cv / h] with VALUE; BLOCK_C or BLOCK_V channels
    of `tiles` strips in every batch entry, `span` of all `items` in a split."""
    i_dy, i_part = tl.program_id(0) // PARTS, tl.program_id(0) % PARTS
    i_h, i_split = tl.program_id(1) % heads, tl.program_id(1) // heads
    i_c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    i_v = tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
    area = height * width
    p_weight += i_h * window * window * channels
    p_offset += i_h * window * window
    p_relative += i_h * window * window * value_channels
    b_weights = tl.zeros((STRIP, BLOCK_C), tl.float32)
    b_offsets = tl.zeros((STRIP,), tl.float32)
    b_relatives = tl.zeros((STRIP, BLOCK_V), tl.float32)
    for item in range(i_split * span, tl.minimum(i_split * span + span, items)):
        task = (item // tiles * heads + i_h) * tiles + item % tiles
        i_b, _, top, left, rows, columns, i_y0, i_x0 = tile_of(task, heads, height, width, dilation, 1)
        i_x = i_x0 + tl.arange(0, STRIP)
        i_y = tl.zeros_like(i_x) + i_y0
        inside = (i_y < rows) & (i_x < columns)
        at_query = plane_at(i_b, i_h * channels, top, left, sq_batch, sq_channel, sq_row, sq_column)
        at_key = plane_at(i_b, i_h * channels, top, left, sk_batch, sk_channel, sk_row, sk_column)
        at_value = plane_at(i_b, i_h * value_channels, top, left, sv_batch, sv_channel, sv_row, sv_column)
        at_bias = plane_at(i_b, i_h, top, left, sb_batch, sb_head, sb_row, sb_column)
        at_grad = plane_at(
            i_b, i_h * value_channels, top, left, heads * value_channels * area, area, width, 1
        )  # fmt: skip
        cell = (top + i_y * dilation) * width + left + i_x * dilation
        b_lse = tl.load(p_lse + (i_b * heads + i_h) * area + cell, mask=inside, other=float("inf")) * LOG2E
        b_delta = tl.load(p_delta + (i_b * heads + i_h) * area + cell, mask=inside, other=0.0)
        b_query = load_cells(
            p_query + at_query, sq_channel, sq_row * dilation, sq_column * dilation,
            i_y, i_x, tl.arange(0, BLOCK_C), inside, channels, INDEX,
        ).to(DTYPE)  # fmt: skip
        b_grad = load_cells(
            p_grad + at_grad, area, width * dilation, dilation,
            i_y, i_x, tl.arange(0, BLOCK_V), inside, value_channels, INDEX,
        ).to(VALUE_DTYPE)  # fmt: skip
        i_row = i_y0 + i_dy - window // 2
        b_score, valid, i_r, i_k, seen = window_scores(
            b_query, p_query + at_query, sq_channel, sq_row * dilation, sq_column * dilation,
            p_key + at_key, sk_channel, sk_row * dilation, sk_column * dilation,
            p_bias + at_bias, sb_offset, sb_row * dilation, sb_column * dilation, p_weight, p_offset,
            i_row, i_part, i_y0, i_x0, rows, columns, window, scale,
            channels, BLOCK_C, BIAS, WEIGHT, OFFSET, DTYPE, PRECISION, INDEX, 1,
        )  # fmt: skip
        b_weight, b_ds = window_gradient(
            b_score, valid, b_lse, b_delta, b_grad, p_grad + at_grad, area, width * dilation, dilation,
            p_value + at_value, sv_channel, sv_row * dilation, sv_column * dilation, p_relative,
            i_row, i_part, i_y0, i_x0, i_r, i_k, seen, rows, columns, window,
            value_channels, BLOCK_V, RELATIVE, VALUE_DTYPE, PRECISION, INDEX, 1,
        )  # fmt: skip
        if KEY:
            if channels > BLOCK_C:
                b_query = load_cells(
                    p_query + at_query, sq_channel, sq_row * dilation, sq_column * dilation,
                    i_y, i_x, i_c, inside, channels, INDEX,
                ).to(DTYPE)  # fmt: skip
            b_ds = by_offset(b_ds, 1)
            b_offsets += tl.sum(b_ds, 0)
            b_weights = tl.dot(tl.trans(b_ds).to(DTYPE), b_query, b_weights, input_precision=PRECISION)
        if VALUE:
            if value_channels > BLOCK_V:
                b_grad = load_cells(
                    p_grad + at_grad, area, width * dilation, dilation,
                    i_y, i_x, i_v, inside, value_channels, INDEX,
                ).to(VALUE_DTYPE)  # fmt: skip
            b_weight = tl.trans(by_offset(b_weight, 1)).to(VALUE_DTYPE)
            b_relatives = tl.dot(b_weight, b_grad, b_relatives, input_precision=PRECISION)
    i_o = (tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * STRIP
    i_o += tl.arange(0, STRIP)
    if KEY:
        tl.store(
            p_grad_weight + (i_o[:, None] * channels + i_c[None, :]),
            b_weights, mask=(i_c < channels)[None, :],
        )  # fmt: skip
        if OFFSET:
            tl.store(p_grad_offset + i_o, b_offsets)  # by every block of channels the same
    if VALUE:
        tl.store(
            p_grad_relative + (i_o[:, None] * value_channels + i_v[None, :]),
            b_relatives, mask=(i_v < value_channels)[None, :],
        )  # fmt: skip


def backward(grad_read: Tensor, delta: Tensor, lse: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """The gradients of the seven tensors, float32 and of their shapes; empty for one that is not there."""
    o = Operands.of(*arguments)
    batch, heads, _, _ = o.shape
    query, _, value, bias, weight, offset, relative = arguments[:7]
    grads = {
        name: lse.new_empty((0,) if x is None else x.shape, dtype=torch.float32)
        for name, x in zip(("query", "key", "value"), arguments[:3], strict=True)
    }
    # Offsets outside of the frame keep the gradient 0.
    grads["bias"] = lse.new_zeros((0,) if bias is None else bias.shape)
    if o.empty:
        zeros = (lse.new_zeros((0,) if x is None else x.shape) for x in (weight, offset, relative))
        return *grads.values(), *zeros
    common = (*o.tensors, *o.sizes, grad_read, lse, delta)
    tile = _tile(o, value.device)
    options = {**o.options, "BLOCK_C": tile["BLOCK_C"], "BLOCK_V": tile["BLOCK_V"], "num_stages": 1}
    programs = o.tiles(tile["ROWS"]) * batch * heads
    blocks = (triton.cdiv(o.channels, tile["BLOCK_C"]), triton.cdiv(o.value_channels, tile["BLOCK_V"]))
    passes = [(True, False, blocks[0]), (False, True, blocks[1])]
    # One pass for both where the registers hold them; compiled for Blackwell it spills.
    if blocks == (1, 1) and not o.wide and capability(value.device)[0] < 10:
        passes = [(True, True, 1)]
    with on_device(value.device):
        launch(
            query_kernel,
            (programs, blocks[0]),
            *common, grads["query"], grads["bias"], **o.options, **tile,
        )  # fmt: skip
        for key, values, count in passes:
            launch(
                memory_kernel,
                (programs, count),
                *common, grads["key"], grads["value"], **o.options, **tile, KEY=key, VALUE=values,
            )  # fmt: skip
        tables = _tables(o, common, blocks, options, query.device)
    return *grads.values(), *tables


def _tables(
    o: Operands,
    common: tuple[Any, ...],
    blocks: tuple[int, int],
    options: dict[str, Any],
    device: torch.device,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of relative_weight, relative_offset and relative_value."""
    batch, heads, _, _ = o.shape
    weight, offset, relative = (bool(o.options[name]) for name in ("WEIGHT", "OFFSET", "RELATIVE"))
    items = batch * o.tiles(1)
    # Every program is one strip wide: it takes many on a processor to hide what they wait for.
    splits = min(items, triton.cdiv(16 * processors(device), o.offset_blocks * heads))
    span = triton.cdiv(items, splits)
    splits = triton.cdiv(items, span)

    def part(wanted: bool, *size: int) -> Tensor:
        shape = (splits, heads, o.window, o.offset_blocks // o.window * WIDTH, *size)
        return torch.empty(shape if wanted else (0,), dtype=torch.float32, device=device)

    parts = (part(weight, o.channels), part(offset), part(relative, o.value_channels))
    passes = [(weight, relative, 1)]
    if blocks != (1, 1):
        passes = [(weight, False, blocks[0]), (False, relative, blocks[1])]
    for key, values, count in passes:
        if key or values:
            launch(
                table_kernel,
                (o.offset_blocks, heads * splits, count),
                *common, *parts, o.tiles(1), items, span, **options, KEY=key, VALUE=values, num_warps=4,
            )  # fmt: skip
    weights, offsets, relatives = (x if x.numel() == 0 else x.sum(0)[:, :, : o.window] for x in parts)
    if weight:
        weights = weights.reshape(-1, o.channels)
    if relative:
        relatives = relatives.flatten(1, 2).mT.contiguous()
    return weights, offsets.reshape(-1), relatives


def _tile(o: Operands, device: torch.device) -> dict[str, int]:
    """The largest tile that fits the registers."""
    large = capability(device)[0] >= 9
    if o.wide and not large:
        blocks = o.blocks(32, 32 if o.channels <= 32 else 16)
        return {"ROWS": 1, **blocks, "num_warps": 4, "num_stages": 1}
    blocks = o.blocks(32, 32) if o.wide else o.blocks(128, 64) if large else o.blocks(64, 32)
    return {"ROWS": 4, **blocks, "num_warps": 8, "num_stages": 1}
