# SPDX-License-Identifier: Apache-2.0
"""Local attention on the GPU: online softmax over the key rows that a tile of queries meets.

A program holds a tile of 16 ROWS queries of one head and BLOCK_V of its value channels. With r = window // 2
it passes ROWS + 2 r key rows, each a [16 ROWS, 32] product for the scores and one for the read, and reads a
cell of keys and values (ROWS + 2 r) / ROWS times 32 / 16 times in all. Nothing but the result is written.

Floor at AOT's 31 x 54, 8 heads of 32 | 32, window 15, bfloat16: 2.6 MB of maps and 0.5 MB of tables read, 1.8
MB written, 1 us of an H200's memory; 0.8 G operations, of which the tiles do 2.6 times the dense half and 1.3
times the relative half, 1.5 us of its matrix units; 3.0 M exponentials, 7.7 M with what the tiles'
corners add. None of these fills the GPU: the latency of ROWS + 2 r dependent steps decides.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...launch import capability, launch, on_device
from .operands import Operands
from .tiles import (
    LN2,
    REACHED,
    STRIP,
    by_offset,
    by_strip,
    load_cells,
    load_table,
    matches,
    plane_at,
    tile_of,
    window_scores,
)


@triton.jit
def forward_kernel(
    p_query, sq_batch, sq_channel, sq_row, sq_column,
    p_key, sk_batch, sk_channel, sk_row, sk_column,
    p_value, sv_batch, sv_channel, sv_row, sv_column,
    p_bias, sb_batch, sb_head, sb_offset, sb_row, sb_column,
    p_weight, p_offset, p_relative,
    heads, height, width, dilation, window, scale, p_read, p_lse,
    channels: tl.constexpr, value_channels: tl.constexpr, BLOCK_C: tl.constexpr, PARTS: tl.constexpr,
    BIAS: tl.constexpr, WEIGHT: tl.constexpr, OFFSET: tl.constexpr, RELATIVE: tl.constexpr,
    DTYPE: tl.constexpr, VALUE_DTYPE: tl.constexpr, PRECISION: tl.constexpr, INDEX: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """read [B, h * value_channels, H, W] and lse [B, h, H, W]; of a query without a match 0 and +inf."""
    BLOCK_Q: tl.constexpr = ROWS * STRIP
    i_b, i_h, top, left, rows, columns, i_y0, i_x0 = tile_of(
        tl.program_id(0), heads, height, width, dilation, ROWS
    )
    reach = window // 2
    i_v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    i_y = i_y0 + tl.arange(0, BLOCK_Q) // STRIP
    i_x = i_x0 + tl.arange(0, BLOCK_Q) % STRIP
    inside = (i_y < rows) & (i_x < columns)
    p_query += plane_at(i_b, i_h * channels, top, left, sq_batch, sq_channel, sq_row, sq_column)
    p_key += plane_at(i_b, i_h * channels, top, left, sk_batch, sk_channel, sk_row, sk_column)
    p_value += plane_at(i_b, i_h * value_channels, top, left, sv_batch, sv_channel, sv_row, sv_column)
    p_bias += plane_at(i_b, i_h, top, left, sb_batch, sb_head, sb_row, sb_column)
    p_weight += i_h * window * window * channels
    p_offset += i_h * window * window
    p_relative += i_h * window * window * value_channels
    b_query = load_cells(
        p_query, sq_channel, sq_row * dilation, sq_column * dilation,
        i_y, i_x, tl.arange(0, BLOCK_C), inside, channels, INDEX,
    ).to(DTYPE)  # fmt: skip
    first = tl.maximum(i_y0 - reach, 0)
    steps = (tl.minimum(i_y0 + ROWS + reach, rows) - first) * PARTS
    b_top = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    b_total = tl.zeros((BLOCK_Q,), tl.float32)
    b_read = tl.zeros((BLOCK_Q, BLOCK_V), tl.float32)
    b_relative = tl.zeros((ROWS, STRIP, BLOCK_V), tl.float32)
    b_poison = tl.zeros((REACHED, BLOCK_V), VALUE_DTYPE)
    for step in range(steps):
        i_row, i_part = first + step // PARTS, step % PARTS
        b_score, _, i_r, i_k, seen = window_scores(
            b_query, p_query, sq_channel, sq_row * dilation, sq_column * dilation,
            p_key, sk_channel, sk_row * dilation, sk_column * dilation,
            p_bias, sb_offset, sb_row * dilation, sb_column * dilation, p_weight, p_offset,
            i_row, i_part, i_y0, i_x0, rows, columns, window, scale,
            channels, BLOCK_C, BIAS, WEIGHT, OFFSET, DTYPE, PRECISION, INDEX, ROWS,
        )  # fmt: skip
        b_new = tl.maximum(b_top, tl.max(b_score, 1))
        b_shift = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_weight = tl.exp2(b_score - b_shift[:, None])
        b_fade = tl.exp2(b_top - b_shift)
        b_total = b_total * b_fade + tl.sum(b_weight, 1)
        b_top = b_new
        b_value = load_cells(
            p_value, sv_channel, sv_row * dilation, sv_column * dilation,
            i_r, i_k, i_v, seen, value_channels, INDEX,
        ).to(VALUE_DTYPE)  # fmt: skip
        b_poison += b_value * 0
        b_value = tl.where(tl.abs(b_value) < float("inf"), b_value, 0.0).to(VALUE_DTYPE)
        b_read = tl.dot(
            b_weight.to(VALUE_DTYPE), b_value, b_read * b_fade[:, None], input_precision=PRECISION
        )
        if RELATIVE:
            b_relative = b_relative * tl.reshape(b_fade, [ROWS, STRIP, 1])
            b_table = load_table(
                p_relative, 1, window * window, i_row - i_y0 - tl.arange(0, ROWS) + reach,
                i_part, window, i_v, value_channels, ROWS,
            )  # fmt: skip
            b_relative = by_strip(
                by_offset(b_weight, ROWS).to(VALUE_DTYPE), tl.permute(b_table, (0, 2, 1)).to(VALUE_DTYPE),
                b_relative, ROWS, PRECISION,
            )  # fmt: skip
    empty = b_total == 0.0
    b_lse = b_top + tl.log2(tl.where(empty, 1.0, b_total))
    b_lse = tl.where(empty, float("inf"), b_lse)
    b_read = (b_read + tl.reshape(b_relative, [BLOCK_Q, BLOCK_V])) / tl.where(empty, 1.0, b_total)[:, None]
    if tl.max(tl.where(b_poison == b_poison, 0, 1)) > 0:
        b_blind = blind_spots(
            p_value, sv_channel, sv_row * dilation, sv_column * dilation, i_v,
            first, steps, i_y0, i_x0, rows, columns, window,
            value_channels, PARTS, VALUE_DTYPE, INDEX, ROWS, BLOCK_V,
        )  # fmt: skip
        b_read = tl.where(b_blind > 0, float("nan"), b_read)
    cell = (top + i_y * dilation) * width + left + i_x * dilation
    area = height * width
    p_out = p_read + (i_b * heads + i_h) * value_channels * area
    tl.store(
        p_out + (i_v.to(tl.int64)[None, :] * area + cell[:, None]),
        b_read, mask=inside[:, None] & (i_v < value_channels)[None, :],
    )  # fmt: skip
    if tl.program_id(1) == 0:
        tl.store(p_lse + (i_b * heads + i_h) * area + cell, b_lse * LN2, mask=inside)


@triton.jit
def blind_spots(
    p_value, sv_channel, sv_row, sv_column, i_v, first, steps, i_y0, i_x0, rows, columns, window,
    value_channels: tl.constexpr, PARTS: tl.constexpr, VALUE_DTYPE: tl.constexpr, INDEX: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """How many values that are not finite each query sees [16 ROWS, BLOCK_V]. A tile's product would spread
    them, as 0 times NaN, to the queries that do not."""
    b_count = tl.zeros((ROWS * STRIP, BLOCK_V), tl.float32)
    for step in range(steps):
        i_row, i_part = first + step // PARTS, step % PARTS
        valid, i_r, i_k, seen, _, _ = matches(i_row, i_part, i_y0, i_x0, rows, columns, window, ROWS)
        b_value = load_cells(
            p_value, sv_channel, sv_row, sv_column, i_r, i_k, i_v, seen, value_channels, INDEX
        )
        b_bad = tl.where(tl.abs(b_value) < float("inf"), 0.0, 1.0)
        b_count = tl.dot(valid.to(VALUE_DTYPE), b_bad.to(VALUE_DTYPE), b_count)
    return b_count


def forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    """read (B, Cv, H, W) and lse (B, h, H, W), float32; the operator's arguments."""
    o, value = Operands.of(*arguments), arguments[2]
    read = torch.empty(value.shape, dtype=torch.float32, device=value.device)
    lse = torch.empty(o.shape, dtype=torch.float32, device=value.device)
    if o.empty:
        return read, lse
    tile = _tile(o, value.device)
    programs = o.tiles(tile["ROWS"]) * o.shape[0] * o.shape[1]
    with on_device(value.device):
        launch(
            forward_kernel,
            (programs, triton.cdiv(o.value_channels, tile["BLOCK_V"])),
            *o.tensors, *o.sizes, read, lse, **o.options, **tile, num_warps=8,
        )  # fmt: skip
    return read, lse


def _tile(o: Operands, device: torch.device) -> dict[str, int]:
    """The largest tile that fits the registers, and how far ahead it loads."""
    if not o.wide:
        return {"ROWS": 4, **o.blocks(128, 128), "num_stages": 2}
    tight = o.channels > 32 and o.options["RELATIVE"]
    blocks = o.blocks(64, 64) if capability(device)[0] >= 9 else o.blocks(32, 16 if tight else 32)
    return {"ROWS": 4, **blocks, "num_stages": 2 if o.channels <= 32 else 1}
