# SPDX-License-Identifier: Apache-2.0
"""Tiles of local attention in Triton, shared by its kernels.

A strip of 16 queries beside one another and 16 offsets of a window row reach 31 cells of a key row. So a tile
of ROWS strips, one above the other, meets a key row in products of [16 ROWS, 32], PARTS times 16 offsets
until the window row is done. The relative terms are products of the same strips with 16 rows of a table,
[16, 16] by offset; `by_cell` moves them to the cells they belong to and `by_offset` moves weights back, each
an exchange inside a warp.

With dilation d, positions of the same residues (row mod d, column mod d) form a map of their own without
dilation, a plane: only the strides and where it starts know of d. Rows and columns below are a plane's.

Names: b_ blocks in registers, i_ indices, p_ pointers, INDEX as in the memory read.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
STRIP: tl.constexpr = tl.constexpr(16)  # queries of a strip, and offsets of a part
REACHED: tl.constexpr = tl.constexpr(32)  # cells that they reach, and one


@triton.jit
def tile_of(task, heads, height, width, dilation, ROWS: tl.constexpr):
    """Batch entry, head, the plane's first row and column on the map and its size, the tile's first cell."""
    classes_y, classes_x = tl.minimum(dilation, height), tl.minimum(dilation, width)
    tiles_y = tl.cdiv(tl.cdiv(height, dilation), ROWS)
    tiles_x = tl.cdiv(tl.cdiv(width, dilation), STRIP)
    i_x0, task = task % tiles_x * STRIP, task // tiles_x
    i_y0, task = task % tiles_y * ROWS, task // tiles_y
    left, task = task % classes_x, task // classes_x
    top, task = task % classes_y, task // classes_y
    rows = tl.cdiv(height - top, dilation)
    columns = tl.cdiv(width - left, dilation)
    return (task // heads).to(tl.int64), task % heads, top, left, rows, columns, i_y0, i_x0


@triton.jit
def plane_at(i_b, i_c, top, left, s_batch, s_channel, s_row, s_column):
    """Where a plane of channel i_c starts."""
    at = i_b * s_batch + i_c.to(tl.int64) * s_channel
    return at + top.to(tl.int64) * s_row + left.to(tl.int64) * s_column


@triton.jit
def load_cells(
    p_plane, s_channel, s_row, s_column, i_y, i_x, i_c, inside, channels, INDEX: tl.constexpr
):  # fmt: skip
    """[cells, channels] of cells that are `inside`, 0 elsewhere."""
    at = i_y.to(INDEX) * s_row + i_x.to(INDEX) * s_column
    mask = inside[:, None] & (i_c < channels)[None, :]
    return tl.load(p_plane + (at[:, None] + i_c.to(INDEX)[None, :] * s_channel), mask=mask, other=0.0)


@triton.jit
def load_cells_across(
    p_plane, s_channel, s_row, s_column, i_y, i_x, i_c, inside, channels, INDEX: tl.constexpr
):  # fmt: skip
    """The same as [channels, cells]."""
    at = i_y.to(INDEX) * s_row + i_x.to(INDEX) * s_column
    mask = (i_c < channels)[:, None] & inside[None, :]
    return tl.load(p_plane + (i_c.to(INDEX)[:, None] * s_channel + at[None, :]), mask=mask, other=0.0)


@triton.jit
def load_table(
    p_table, s_offset, s_channel, i_dy, i_part, window, i_c, channels, ROWS: tl.constexpr
):  # fmt: skip
    """A table's part [ROWS, channels, 16] for one window row i_dy [ROWS] each; 0 outside of the window."""
    i_dx = i_part * STRIP + tl.arange(0, STRIP)
    i_d = i_dy[:, None] * window + i_dx[None, :]
    inside = (i_dy >= 0)[:, None] & (i_dy < window)[:, None] & (i_dx < window)[None, :]
    return tl.load(
        p_table + i_d[:, None, :] * s_offset + i_c[None, :, None] * s_channel,
        mask=inside[:, None, :] & (i_c < channels)[None, :, None], other=0.0,
    )  # fmt: skip


@triton.jit
def by_strip(b_tile, b_table, b_sum, ROWS: tl.constexpr, PRECISION: tl.constexpr):
    """b_sum [ROWS, 16, n] + every strip of b_tile [16 ROWS, k] times its own table [ROWS, k, n]."""
    if ROWS == 1:
        b_product = tl.dot(
            b_tile, tl.reshape(b_table, [b_table.shape[1], b_table.shape[2]]), input_precision=PRECISION
        )
        return b_sum + b_product[None, :, :]
    b_strips = tl.reshape(b_tile, [ROWS, STRIP, b_tile.shape[1]])
    return tl.dot(b_strips, b_table, b_sum, input_precision=PRECISION)


@triton.jit
def by_cell(b_x, ROWS: tl.constexpr):
    """[ROWS, 16, 16] by offset -> [16 ROWS, 32] by cell; whatever comes where there is no offset."""
    i_x = tl.arange(0, ROWS * STRIP) % STRIP
    i_o = tl.arange(0, REACHED)[None, :] - i_x[:, None]
    b_flat = tl.reshape(b_x, [ROWS * STRIP, STRIP])
    return tl.gather(b_flat, tl.minimum(tl.maximum(i_o, 0), STRIP - 1), 1)


@triton.jit
def by_offset(b_x, ROWS: tl.constexpr):
    """[16 ROWS, 32] by cell -> [16 ROWS, 16] by offset."""
    i_x = tl.arange(0, ROWS * STRIP) % STRIP
    return tl.gather(b_x, tl.arange(0, STRIP)[None, :] + i_x[:, None], 1)


@triton.jit
def matches(i_row, i_part, i_y0, i_x0, rows, columns, window, ROWS: tl.constexpr):
    """Which of [16 ROWS queries, 32 cells of a key row] are offsets inside the frame; rows and columns of the
    cells and which are inside; the offsets' window rows [16 ROWS] and columns [16 ROWS, 32]."""
    reach = window // 2
    i_q = tl.arange(0, ROWS * STRIP)
    i_k = i_x0 - reach + i_part * STRIP + tl.arange(0, REACHED)
    i_r = tl.zeros_like(i_k) + i_row
    seen = (i_k >= 0) & (i_k < columns) & (i_r >= 0) & (i_r < rows)
    i_dy = i_row - i_y0 - i_q // STRIP + reach
    i_o = tl.arange(0, REACHED)[None, :] - (i_q % STRIP)[:, None]
    i_dx = i_o + i_part * STRIP
    valid = seen[None, :] & (i_o >= 0) & (i_o < STRIP) & (i_dx < window)
    return valid & (i_dy >= 0)[:, None] & (i_dy < window)[:, None], i_r, i_k, seen, i_dy, i_dx


@triton.jit
def window_scores(
    b_query, p_query, sq_channel, sq_row, sq_column, p_key, sk_channel, sk_row, sk_column,
    p_bias, sb_offset, sb_row, sb_column, p_weight, p_offset,
    i_row, i_part, i_y0, i_x0, rows, columns, window, scale,
    channels: tl.constexpr, BLOCK_C: tl.constexpr, BIAS: tl.constexpr, WEIGHT: tl.constexpr,
    OFFSET: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr, INDEX: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Scores times log2 e of a tile with a part of a key row, -inf where there is no match [16 ROWS, 32];
    then `matches` up to the cells. b_query [16 ROWS, BLOCK_C] is the tile if that holds all its channels."""
    valid, i_r, i_k, seen, i_dy, i_dx = matches(i_row, i_part, i_y0, i_x0, rows, columns, window, ROWS)
    i_q = tl.arange(0, ROWS * STRIP)
    i_y, i_x = i_y0 + i_q // STRIP, i_x0 + i_q % STRIP
    inside = (i_y < rows) & (i_x < columns)
    i_strip = i_row - i_y0 - tl.arange(0, ROWS) + window // 2
    b_score = tl.zeros((ROWS * STRIP, REACHED), tl.float32)
    b_relative = tl.zeros((ROWS, STRIP, STRIP), tl.float32)
    for i_c0 in range(0, channels, BLOCK_C):
        i_c = i_c0 + tl.arange(0, BLOCK_C)
        b_part = b_query
        if channels > BLOCK_C:
            b_part = load_cells(
                p_query, sq_channel, sq_row, sq_column, i_y, i_x, i_c, inside, channels, INDEX
            ).to(DTYPE)  # fmt: skip
        b_key = load_cells_across(
            p_key, sk_channel, sk_row, sk_column, i_r, i_k, i_c, seen, channels, INDEX
        ).to(DTYPE)  # fmt: skip
        b_score = tl.dot(b_part, b_key, b_score, input_precision=PRECISION)
        if WEIGHT:
            b_table = load_table(p_weight, channels, 1, i_strip, i_part, window, i_c, channels, ROWS)
            b_relative = by_strip(b_part, b_table.to(DTYPE), b_relative, ROWS, PRECISION)
    b_score = b_score * scale
    if WEIGHT:
        if OFFSET:
            b_relative += load_table(p_offset, 1, 0, i_strip, i_part, window, tl.arange(0, 1), 1, ROWS)
        b_score += by_cell(b_relative, ROWS)
    if BIAS:
        at = (i_dy[:, None] * window + i_dx).to(INDEX) * sb_offset
        at += (i_y.to(INDEX) * sb_row + i_x.to(INDEX) * sb_column)[:, None]
        b_score += tl.load(p_bias + at, mask=valid & inside[:, None], other=0.0).to(tl.float32)
    return tl.where(valid, b_score * LOG2E, float("-inf")), valid, i_r, i_k, seen


@triton.jit
def window_gradient(
    b_score, valid, b_lse, b_delta, b_grad, p_grad, sg_channel, sg_row, sg_column,
    p_value, sv_channel, sv_row, sv_column, p_relative,
    i_row, i_part, i_y0, i_x0, i_r, i_k, seen, rows, columns, window,
    value_channels: tl.constexpr, BLOCK_V: tl.constexpr, RELATIVE: tl.constexpr, VALUE_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr, INDEX: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The weights P and dS = P (dP - delta) of `window_scores`' tile [16 ROWS, 32]; lse times log2 e. b_grad
    [16 ROWS, BLOCK_V] is the read's gradient if that holds all value channels."""
    i_q = tl.arange(0, ROWS * STRIP)
    i_y, i_x = i_y0 + i_q // STRIP, i_x0 + i_q % STRIP
    inside = (i_y < rows) & (i_x < columns)
    i_strip = i_row - i_y0 - tl.arange(0, ROWS) + window // 2
    b_product = tl.zeros((ROWS * STRIP, REACHED), tl.float32)
    b_relative = tl.zeros((ROWS, STRIP, STRIP), tl.float32)
    for i_v0 in range(0, value_channels, BLOCK_V):
        i_v = i_v0 + tl.arange(0, BLOCK_V)
        b_part = b_grad
        if value_channels > BLOCK_V:
            b_part = load_cells(
                p_grad, sg_channel, sg_row, sg_column, i_y, i_x, i_v, inside, value_channels, INDEX
            ).to(VALUE_DTYPE)  # fmt: skip
        b_value = load_cells_across(
            p_value, sv_channel, sv_row, sv_column, i_r, i_k, i_v, seen, value_channels, INDEX
        ).to(VALUE_DTYPE)  # fmt: skip
        b_product = tl.dot(b_part, b_value, b_product, input_precision=PRECISION)
        if RELATIVE:
            b_table = load_table(
                p_relative, 1, window * window, i_strip, i_part, window, i_v, value_channels, ROWS
            )  # fmt: skip
            b_relative = by_strip(b_part, b_table.to(VALUE_DTYPE), b_relative, ROWS, PRECISION)
    if RELATIVE:
        b_product += by_cell(b_relative, ROWS)
    b_weight = tl.where(valid, tl.exp2(b_score - b_lse[:, None]), 0.0)
    return b_weight, tl.where(valid, b_weight * (b_product - b_delta[:, None]), 0.0)
