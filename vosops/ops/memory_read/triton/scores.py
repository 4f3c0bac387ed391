# SPDX-License-Identifier: Apache-2.0
"""Tiles of the score s_ij in Triton, shared by every kernel of the memory read and of attention.

Names: b_ blocks in registers, i_ indices, p_ pointers. i_b counts batch entries, or, of attention, the heads
of every batch entry. One score tile [BLOCK_Q, BLOCK_M] is, by its FORM,

    plain                s = <q, k>, to be multiplied by a positive scale
    dot                  s = scale r <q, k>
    l2                   s = scale r (2 <q, k> - |k|^2)
    l2 with selection    s = scale r (2 <e q, k> - <e, k^2> - sum e q^2)
    distance             s = 2 scale <q, r k> - |r k|^2

e q and k^2 of bfloat16 keys have 16 significant bits: they are split into two bfloat16 parts, exactly, so
that the matrix units round nothing (SPLIT). INDEX is the type of element offsets inside one batch entry:
int32, which takes half the registers, or int64 where an operand reaches past 2^31 elements.
"""

from __future__ import annotations

import triton
import triton.language as tl

LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def entry(i_b, heads, s_batch, s_head):
    """Element offset of entry i_b = b * heads + head; outside of loops, as a division is not moved out."""
    i_entry = i_b.to(tl.int32)
    return (i_entry // heads).to(tl.int64) * s_batch + (i_entry % heads).to(tl.int64) * s_head


@triton.jit
def to_bits(scale, FORM: tl.constexpr):
    """What a tile's scores are multiplied by to be exponents of two."""
    if FORM == "plain":
        return scale * LOG2E
    return LOG2E


@triton.jit
def offset_of(i_m, middle, inner, s_outer, s_middle, s_inner, FLAT: tl.constexpr, INDEX: tl.constexpr):
    """Element offset of flattened memory positions (outer, middle, inner)."""
    if FLAT:
        return i_m.to(INDEX) * s_inner
    row = i_m // inner
    return (
        (row // middle).to(INDEX) * s_outer
        + (row % middle).to(INDEX) * s_middle
        + (i_m % inner).to(INDEX) * s_inner
    )


@triton.jit
def load_query(
    p_query,
    sq_channel,
    sq_position,
    p_selection,
    se_channel,
    se_position,
    i_q,  # [BLOCK_Q]
    queries,
    channels: tl.constexpr,
    BLOCK_C: tl.constexpr,
    SELECTION: tl.constexpr,
    SPLIT: tl.constexpr,
    DTYPE: tl.constexpr,
    INDEX: tl.constexpr,
):
    """The query's side: x (q, or e q), its low part, e, and sum e q^2."""
    i_c = tl.arange(0, BLOCK_C)
    inside = (i_q[:, None] < queries) & (i_c[None, :] < channels)
    rows, columns = i_q.to(INDEX)[:, None], i_c.to(INDEX)[None, :]
    b_query = tl.load(p_query + (rows * sq_position + columns * sq_channel), mask=inside, other=0.0)
    b_x = b_query.to(DTYPE)
    b_low, b_selection = b_x, b_x
    b_rest = tl.zeros_like(i_q).to(tl.float32)
    if SELECTION:
        b_e = tl.load(p_selection + (rows * se_position + columns * se_channel), mask=inside, other=0.0)
        b_product = b_e.to(tl.float32) * b_query.to(tl.float32)
        b_rest = tl.sum(b_product * b_query.to(tl.float32), 1)
        b_x = b_product.to(DTYPE)
        b_selection = b_e.to(DTYPE)
        if SPLIT:
            b_low = (b_product - b_x.to(tl.float32)).to(DTYPE)
    return b_x, b_low, b_selection, b_rest


@triton.jit
def load_memory(
    p_key,
    sk_channel,
    middle,
    inner,
    s_outer,
    s_middle,
    s_inner,
    p_mask,
    p_shrinkage,
    i_m,  # [BLOCK_M]
    end,
    scale,
    channels: tl.constexpr,
    BLOCK_C: tl.constexpr,
    FLAT: tl.constexpr,
    FORM: tl.constexpr,
    SELECTION: tl.constexpr,
    MASK: tl.constexpr,
    SHRINKAGE: tl.constexpr,
    INDEX: tl.constexpr,
):
    """The memory's side: keys [BLOCK_C, BLOCK_M], scale r, the term in |k|^2, and what may match."""
    i_c = tl.arange(0, BLOCK_C)
    valid = i_m < end
    if MASK:
        valid = valid & (tl.load(p_mask + i_m, mask=valid, other=0) != 0)
    # What never matches is read as 0, so that its NaN cannot spread.
    inside = (i_c[:, None] < channels) & valid[None, :]
    at = offset_of(i_m, middle, inner, s_outer, s_middle, s_inner, FLAT, INDEX)
    b_key = tl.load(p_key + (at[None, :] + i_c.to(INDEX)[:, None] * sk_channel), mask=inside, other=0.0)
    b_rate = tl.zeros_like(i_m).to(tl.float32) + 1.0
    if SHRINKAGE:
        b_rate = tl.load(p_shrinkage + i_m, mask=valid, other=0.0)
    b_gain = b_rate * scale
    b_bias = tl.zeros_like(b_gain)
    if (FORM == "l2" or FORM == "distance") and not SELECTION:
        b_wide = b_key.to(tl.float32)
        b_norm = tl.sum(b_wide * b_wide, 0)
        b_bias = -b_norm * (b_gain if FORM == "l2" else b_rate * b_rate)
    return b_key, b_gain, b_bias, valid


@triton.jit
def with_prior(b_score, p_centers, p_precision, i_q, i_m, valid, width):
    """Adds the Gaussian: minus precision_j |x_i - c_j|^2."""
    b_row = tl.load(p_centers + 2 * i_m, mask=valid, other=0.0)
    b_column = tl.load(p_centers + (2 * i_m + 1), mask=valid, other=0.0)
    b_precision = tl.load(p_precision + i_m, mask=valid, other=0.0)
    b_down = (i_q // width).to(tl.float32)[:, None] - b_row[None, :]
    b_across = (i_q % width).to(tl.float32)[:, None] - b_column[None, :]
    return b_score - (b_down * b_down + b_across * b_across) * b_precision[None, :]


@triton.jit
def score(
    b_x,
    b_low,
    b_selection,
    b_rest,
    b_key,
    b_gain,
    b_bias,
    valid,
    p_centers,
    p_precision,
    i_q,
    i_m,
    width,
    FORM: tl.constexpr,
    SELECTION: tl.constexpr,
    PRIOR: tl.constexpr,
    SPLIT: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    PARTIAL: tl.constexpr = True,
):
    """Scores [BLOCK_Q, BLOCK_M] with their prior; -inf where a position may not match. Not PARTIAL promises
    that there is none, or that what lies past the memory is dropped."""
    b_k = b_key.to(DTYPE)
    b_score = tl.dot(b_x, b_k, input_precision=PRECISION)
    if SELECTION:
        if SPLIT:
            b_score = tl.dot(b_low, b_k, b_score, input_precision=PRECISION)
        b_wide = b_key.to(tl.float32)
        b_square = b_wide * b_wide
        b_high = b_square.to(DTYPE)
        b_weighted = tl.dot(b_selection, b_high, input_precision=PRECISION)
        if SPLIT:
            b_rounding = (b_square - b_high.to(tl.float32)).to(DTYPE)
            b_weighted = tl.dot(b_selection, b_rounding, b_weighted, input_precision=PRECISION)
        b_score = (2 * b_score - b_weighted - b_rest[:, None]) * b_gain[None, :]
    elif FORM == "dot":
        b_score = b_score * b_gain[None, :]
    elif FORM != "plain":
        b_score = b_score * (2 * b_gain)[None, :] + b_bias[None, :]
    if PRIOR:
        b_score = with_prior(b_score, p_centers, p_precision, i_q, i_m, valid, width)
    if PARTIAL:
        b_score = tl.where(valid[None, :], b_score, float("-inf"))
    return b_score
