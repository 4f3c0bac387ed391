# SPDX-License-Identifier: Apache-2.0
"""Gradients of keys and values: a tile of keys passes over the query rows whose windows hold it.

The tile's 16 ROWS keys against 32 queries of a row, PARTS times: 16 offsets of a window row lead from a strip
of keys to 31 queries, as they do the other way round.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import LOG2E, REACHED, STRIP, load_cells, load_cells_across, plane_at, tile_of


@triton.jit
def load_table_rows(p_table, s_offset, s_channel, i_dy, i_dx, window, i_c, channels):
    """A table's rows [offsets, channels]; 0 outside of the window."""
    inside = (i_dy >= 0) & (i_dy < window) & (i_dx < window)
    return tl.load(
        p_table + (i_dy * window + i_dx)[:, None] * s_offset + i_c[None, :] * s_channel,
        mask=inside[:, None] & (i_c < channels)[None, :], other=0.0,
    )  # fmt: skip


@triton.jit
def by_query(b_x, ROWS: tl.constexpr):
    """[16 ROWS offsets, 32 queries] -> [16 ROWS keys, 32 queries]; anything where there is no offset."""
    i_o = tl.arange(0, STRIP)[:, None] + (STRIP - 1) - tl.arange(0, REACHED)[None, :]
    i_o = tl.minimum(tl.maximum(i_o, 0), STRIP - 1)
    b_strips = tl.reshape(b_x, [ROWS, STRIP, REACHED])
    i_o = tl.broadcast_to(i_o[None, :, :], [ROWS, STRIP, REACHED])
    return tl.reshape(tl.gather(b_strips, i_o, 1), [ROWS * STRIP, REACHED])


@triton.jit
def memory_kernel(
    p_query, sq_batch, sq_channel, sq_row, sq_column,
    p_key, sk_batch, sk_channel, sk_row, sk_column,
    p_value, sv_batch, sv_channel, sv_row, sv_column,
    p_bias, sb_batch, sb_head, sb_offset, sb_row, sb_column,
    p_weight, p_offset, p_relative,
    heads, height, width, dilation, window, scale,
    p_grad, p_lse, p_delta, p_grad_key, p_grad_value,
    channels: tl.constexpr, value_channels: tl.constexpr, BLOCK_C: tl.constexpr, PARTS: tl.constexpr,
    BIAS: tl.constexpr, WEIGHT: tl.constexpr, OFFSET: tl.constexpr, RELATIVE: tl.constexpr,
    DTYPE: tl.constexpr, VALUE_DTYPE: tl.constexpr, PRECISION: tl.constexpr, INDEX: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_V: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr,
):  # fmt: skip
    """BLOCK_C channels of grad_key [B, C, H, W] with KEY, BLOCK_V of grad_value [B, Cv, H, W] with VALUE."""
    BLOCK_M: tl.constexpr = ROWS * STRIP
    i_b, i_h, top, left, rows, columns, i_y0, i_x0 = tile_of(
        tl.program_id(0), heads, height, width, dilation, ROWS
    )
    area = height * width
    reach = window // 2
    i_m = tl.arange(0, BLOCK_M)
    i_y, i_x = i_y0 + i_m // STRIP, i_x0 + i_m % STRIP
    inside = (i_y < rows) & (i_x < columns)
    p_query += plane_at(i_b, i_h * channels, top, left, sq_batch, sq_channel, sq_row, sq_column)
    p_key += plane_at(i_b, i_h * channels, top, left, sk_batch, sk_channel, sk_row, sk_column)
    p_value += plane_at(i_b, i_h * value_channels, top, left, sv_batch, sv_channel, sv_row, sv_column)
    p_bias += plane_at(i_b, i_h, top, left, sb_batch, sb_head, sb_row, sb_column)
    p_grad += plane_at(i_b, i_h * value_channels, top, left, heads * value_channels * area, area, width, 1)
    p_weight += i_h * window * window * channels
    p_offset += i_h * window * window
    p_relative += i_h * window * window * value_channels
    p_lse += (i_b * heads + i_h) * area + top * width + left
    p_delta += (i_b * heads + i_h) * area + top * width + left
    b_key = load_cells(
        p_key, sk_channel, sk_row * dilation, sk_column * dilation,
        i_y, i_x, tl.arange(0, BLOCK_C), inside, channels, INDEX,
    ).to(DTYPE)  # fmt: skip
    b_value = load_cells(
        p_value, sv_channel, sv_row * dilation, sv_column * dilation,
        i_y, i_x, tl.arange(0, BLOCK_V), inside, value_channels, INDEX,
    ).to(VALUE_DTYPE)  # fmt: skip
    first = tl.maximum(i_y0 - reach, 0)
    steps = (tl.minimum(i_y0 + ROWS + reach, rows) - first) * PARTS
    b_along = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    b_out = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    for step in range(steps):
        i_row, i_part = first + step // PARTS, step % PARTS
        i_q = i_x0 + reach - i_part * STRIP - (STRIP - 1) + tl.arange(0, REACHED)
        i_r = tl.zeros_like(i_q) + i_row
        seen = (i_q >= 0) & (i_q < columns)
        i_dy = i_y - i_row + reach
        i_o = (i_m % STRIP)[:, None] + (STRIP - 1) - tl.arange(0, REACHED)[None, :]
        i_dx = i_o + i_part * STRIP
        valid = seen[None, :] & (i_o >= 0) & (i_o < STRIP) & (i_dx < window)
        valid = valid & (i_dy >= 0)[:, None] & (i_dy < window)[:, None]
        i_table = i_part * STRIP + i_m % STRIP  # the offset that row m of a table's part belongs to
        b_score = tl.zeros((BLOCK_M, REACHED), tl.float32)
        b_relative = tl.zeros((BLOCK_M, REACHED), tl.float32)
        for i_c0 in range(0, channels, BLOCK_C):
            i_c = i_c0 + tl.arange(0, BLOCK_C)
            if channels > BLOCK_C:
                b_key = load_cells(
                    p_key, sk_channel, sk_row * dilation, sk_column * dilation,
                    i_y, i_x, i_c, inside, channels, INDEX,
                ).to(DTYPE)  # fmt: skip
            b_query = load_cells_across(
                p_query, sq_channel, sq_row * dilation, sq_column * dilation,
                i_r, i_q, i_c, seen, channels, INDEX,
            ).to(DTYPE)  # fmt: skip
            b_score = tl.dot(b_key, b_query, b_score, input_precision=PRECISION)
            if WEIGHT:
                b_table = load_table_rows(p_weight, channels, 1, i_dy, i_table, window, i_c, channels)
                b_relative = tl.dot(b_table.to(DTYPE), b_query, b_relative, input_precision=PRECISION)
        b_score = b_score * scale
        if WEIGHT:
            if OFFSET:
                b_relative += load_table_rows(p_offset, 1, 0, i_dy, i_table, window, tl.arange(0, 1), 1)
            b_score += by_query(b_relative, ROWS)
        if BIAS:
            at = (i_dy[:, None] * window + i_dx).to(INDEX) * sb_offset
            at += (i_r.to(INDEX) * (sb_row * dilation) + i_q.to(INDEX) * (sb_column * dilation))[None, :]
            b_score += tl.load(p_bias + at, mask=valid & inside[:, None], other=0.0).to(tl.float32)
        cell = i_r * dilation * width + i_q * dilation
        b_lse = tl.load(p_lse + cell, mask=seen, other=float("inf"))
        b_weight = tl.where(valid, tl.exp2((b_score - b_lse[None, :]) * LOG2E), 0.0)
        if KEY:
            b_product = tl.zeros((BLOCK_M, REACHED), tl.float32)
            b_relative = tl.zeros((BLOCK_M, REACHED), tl.float32)
            for i_v0 in range(0, value_channels, BLOCK_V):
                i_v = i_v0 + tl.arange(0, BLOCK_V)
                if value_channels > BLOCK_V:
                    b_value = load_cells(
                        p_value, sv_channel, sv_row * dilation, sv_column * dilation,
                        i_y, i_x, i_v, inside, value_channels, INDEX,
                    ).to(VALUE_DTYPE)  # fmt: skip
                b_grad = load_cells_across(
                    p_grad, area, width * dilation, dilation,
                    i_r, i_q, i_v, seen, value_channels, INDEX,
                ).to(VALUE_DTYPE)  # fmt: skip
                b_product = tl.dot(b_value, b_grad, b_product, input_precision=PRECISION)
                if RELATIVE:
                    b_table = load_table_rows(
                        p_relative, 1, window * window, i_dy, i_table, window, i_v, value_channels
                    ).to(VALUE_DTYPE)  # fmt: skip
                    b_relative = tl.dot(b_table, b_grad, b_relative, input_precision=PRECISION)
            if RELATIVE:
                b_product += by_query(b_relative, ROWS)
            b_delta = tl.load(p_delta + cell, mask=seen, other=0.0)
            b_ds = tl.where(valid, b_weight * (b_product - b_delta[None, :]), 0.0)
            b_query = load_cells(
                p_query, sq_channel, sq_row * dilation, sq_column * dilation,
                i_r, i_q, tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C), seen, channels, INDEX,
            ).to(DTYPE)  # fmt: skip
            b_along = tl.dot(b_ds.to(DTYPE), b_query, b_along, input_precision=PRECISION)
        if VALUE:
            b_grad = load_cells(
                p_grad, area, width * dilation, dilation,
                i_r, i_q, tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V), seen, value_channels, INDEX,
            ).to(VALUE_DTYPE)  # fmt: skip
            b_out = tl.dot(b_weight.to(VALUE_DTYPE), b_grad, b_out, input_precision=PRECISION)
    cell = (top + i_y * dilation) * width + left + i_x * dilation
    if KEY:
        i_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
        p_out = p_grad_key + (i_b * heads + i_h) * channels * area
        tl.store(
            p_out + (i_c.to(tl.int64)[None, :] * area + cell[:, None]),
            b_along * scale, mask=inside[:, None] & (i_c < channels)[None, :],
        )  # fmt: skip
    if VALUE:
        i_v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
        p_out = p_grad_value + (i_b * heads + i_h) * value_channels * area
        tl.store(
            p_out + (i_v.to(tl.int64)[None, :] * area + cell[:, None]),
            b_out, mask=inside[:, None] & (i_v < value_channels)[None, :],
        )  # fmt: skip
