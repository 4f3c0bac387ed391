# SPDX-License-Identifier: Apache-2.0
"""The top-k match on the GPU, exact and without a Q x M matrix: a filter by group maxima, not a sort.

1. `group_maxima`: score tiles on the matrix units; of every group of GROUP consecutive positions only the
   maximum is kept.
2. `choose_groups`: the k groups with the largest maxima, the lowest first among equal ones. If t is the k-th
   largest maximum, k groups hold a score of at least t, so no better score lies outside of these groups; and
   as groups are runs of positions, neither does a lower position with a score equal to the k-th best.
3. `candidate_scores`: the k GROUP scores in them, in float32.
4. `choose_matches`: the k best of those by (score, lowest index), and their softmax.

A NaN or +inf makes a group's maximum +inf, so it is chosen and poisons its query in step 4.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...launch import capability, launch, on_device, split
from ..problem import Scores
from .operands import Operands
from .scores import entry, load_memory, load_query, offset_of, score

LIMIT = 128
"""Most positions that a query can keep."""
_MOST_GROUPS = 8192  # of one query, held in the registers of one program
_BUFFER = 1 << 28  # bytes of group maxima and candidate scores at a time


@triton.jit
def group_maxima(
    heads, p_query, sq_batch, sq_head, sq_channel, sq_position,
    p_selection, se_batch, se_channel, se_position,
    p_key, sk_batch, sk_head, sk_channel, middle, inner, s_outer, s_middle, s_inner,
    p_mask, p_shrinkage, p_centers, p_precision, width, scale,
    first_query, queries, memory,
    p_maxima, rows, groups, span,
    channels: tl.constexpr, BLOCK_C: tl.constexpr, FLAT: tl.constexpr, FORM: tl.constexpr,
    SELECTION: tl.constexpr, SHRINKAGE: tl.constexpr, MASK: tl.constexpr, PRIOR: tl.constexpr,
    SPLIT: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr, INDEX: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_M: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """maxima [B, rows, groups] of queries first_query + [0, rows); a program takes `span` positions."""
    i_row = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    i_b = tl.program_id(2).to(tl.int64)
    p_query += entry(i_b, heads, sq_batch, sq_head)
    p_key += entry(i_b, heads, sk_batch, sk_head)
    i_q = first_query + i_row
    start = tl.program_id(1) * span
    end = tl.minimum(start + span, memory)
    b_x, b_low, b_e, b_rest = load_query(
        p_query, sq_channel, sq_position,
        p_selection + i_b * se_batch, se_channel, se_position,
        i_q, queries, channels, BLOCK_C, SELECTION, SPLIT, DTYPE, INDEX,
    )  # fmt: skip
    PER_TILE: tl.constexpr = BLOCK_M // GROUP
    # Columns are permuted so that the strided reduction below, the cheap one, covers runs of positions.
    i_column = tl.arange(0, BLOCK_M)
    i_run = (i_column % PER_TILE) * GROUP + i_column // PER_TILE
    p_row = p_maxima + i_b * rows * groups + i_row[:, None] * groups
    for i_m0 in range(start, end, BLOCK_M):
        i_m = i_m0 + i_run
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
        b_score = tl.where(b_score == b_score, b_score, float("inf"))
        b_max = tl.max(tl.reshape(b_score, (BLOCK_Q, GROUP, PER_TILE)), 1)  # [BLOCK_Q, PER_TILE]
        i_group = i_m0 // GROUP + tl.arange(0, PER_TILE)
        inside = (i_row[:, None] < rows) & (i_group[None, :] < groups)
        tl.store(p_row + i_group[None, :], b_max, mask=inside)


@triton.jit
def ordered(b_score):
    """int32 in the order of the floats: NaN above all, -0 equal to 0."""
    b_bits = tl.where(b_score == 0.0, 0.0, b_score).to(tl.int32, bitcast=True)
    b_key = b_bits ^ ((b_bits >> 31) & 0x7FFFFFFF)
    return tl.where(b_score == b_score, b_key, 0x7FFFFFFF)


@triton.jit
def choose_groups(p_maxima, p_groups, groups, chosen, BLOCK: tl.constexpr):
    """groups [B * rows, chosen]: the largest maxima of each row, in ascending order of position."""
    i_row = tl.program_id(0).to(tl.int64)
    i_group = tl.arange(0, BLOCK)
    b_max = tl.load(p_maxima + i_row * groups + i_group, mask=i_group < groups, other=float("-inf"))
    # The sign bit flipped, so that unsigned comparison orders them; 0, for what is no group, is below all.
    sign = tl.full((), 1, tl.uint32) << 31
    b_key = ordered(b_max).to(tl.uint32, bitcast=True) ^ sign
    b_key = tl.where(i_group < groups, b_key, tl.zeros_like(b_key))
    # The chosen-th largest key, bit by bit from the top.
    bound = tl.zeros((), tl.uint32)
    for i_bit in range(32):
        higher = bound | (sign >> i_bit)
        enough = tl.sum((b_key >= higher).to(tl.int32), 0) >= chosen
        bound = tl.where(enough, higher, bound)
    above = b_key > bound
    level = (b_key == bound) & (i_group < groups)
    wanted = chosen - tl.sum(above.to(tl.int32), 0)
    take = above | (level & (tl.cumsum(level.to(tl.int32), 0) <= wanted))
    place = tl.cumsum(take.to(tl.int32), 0) - 1
    tl.store(p_groups + i_row * chosen + place, i_group, mask=take)


@triton.jit
def candidate_scores(
    heads, p_query, sq_batch, sq_head, sq_channel, sq_position,
    p_selection, se_batch, se_channel, se_position,
    p_key, sk_batch, sk_head, sk_channel, middle, inner, s_outer, s_middle, s_inner,
    p_mask, p_shrinkage, p_centers, p_precision, width, scale,
    first_query, queries, memory,
    p_groups, p_scores, rows, chosen,
    channels: tl.constexpr, BLOCK_C: tl.constexpr, FLAT: tl.constexpr, FORM: tl.constexpr,
    SELECTION: tl.constexpr, SHRINKAGE: tl.constexpr, MASK: tl.constexpr, PRIOR: tl.constexpr,
    SPLIT: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr, INDEX: tl.constexpr,
    GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """scores [B * rows, chosen * GROUP] of the positions in the chosen groups of one query, in float32."""
    i_row, i_b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    p_query += entry(i_b, heads, sq_batch, sq_head)
    p_key += entry(i_b, heads, sk_batch, sk_head)
    i_q = first_query + i_row
    i_c = tl.arange(0, BLOCK_C)
    inside = i_c < channels
    b_query = tl.load(
        p_query + i_q.to(tl.int64) * sq_position + i_c.to(tl.int64) * sq_channel,
        mask=inside, other=0.0,
    ).to(tl.float32)  # fmt: skip
    b_e = b_query
    if SELECTION:
        b_e = tl.load(
            p_selection + i_b * se_batch + i_q.to(tl.int64) * se_position + i_c.to(tl.int64) * se_channel,
            mask=inside, other=0.0,
        ).to(tl.float32)  # fmt: skip
    row = i_b * rows + i_row
    for i_first in range(0, chosen * GROUP, BLOCK):
        i_candidate = i_first + tl.arange(0, BLOCK)
        given = i_candidate < chosen * GROUP
        b_group = tl.load(p_groups + row * chosen + i_candidate // GROUP, mask=given, other=0)
        i_m = b_group * GROUP + i_candidate % GROUP
        valid = given & (i_m < memory)
        if MASK:
            valid = valid & (tl.load(p_mask + i_b * memory + i_m, mask=valid, other=0) != 0)
        at = offset_of(i_m, middle, inner, s_outer, s_middle, s_inner, FLAT, INDEX)
        b_key = tl.load(
            p_key + (at[:, None] + i_c.to(INDEX)[None, :] * sk_channel),
            mask=valid[:, None] & inside[None, :], other=0.0,
        ).to(tl.float32)  # fmt: skip
        if SELECTION:
            b_offset = b_key - b_query[None, :]
            b_score = -tl.sum(b_e[None, :] * b_offset * b_offset, 1)
        elif FORM == "l2":
            b_score = tl.sum(b_key * (2 * b_query[None, :] - b_key), 1)
        elif FORM == "distance":
            if SHRINKAGE:
                b_key = b_key * tl.load(p_shrinkage + i_b * memory + i_m, mask=valid, other=0.0)[:, None]
            b_score = tl.sum(b_key * (2 * scale * b_query[None, :] - b_key), 1)
        else:
            b_score = tl.sum(b_key * b_query[None, :], 1)
        if FORM != "distance":
            if SHRINKAGE:
                b_score = b_score * tl.load(p_shrinkage + i_b * memory + i_m, mask=valid, other=0.0)
            b_score = b_score * scale
        if PRIOR:
            p_center = p_centers + 2 * (i_b * memory + i_m)
            b_down = (i_q // width).to(tl.float32) - tl.load(p_center, mask=valid, other=0.0)
            b_across = (i_q % width).to(tl.float32) - tl.load(p_center + 1, mask=valid, other=0.0)
            b_width = tl.load(p_precision + i_b * memory + i_m, mask=valid, other=0.0)
            b_score = b_score - (b_down * b_down + b_across * b_across) * b_width
        b_score = tl.where(valid, b_score, float("-inf"))
        tl.store(p_scores + row * (chosen * GROUP) + i_candidate, b_score, mask=given)


@triton.jit
def choose_matches(
    p_groups, p_scores, p_indices, p_weights, first_query, queries, rows, chosen, kept,
    GROUP: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The best candidates of one query one by one, then their softmax."""
    i_row, i_b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row = i_b * rows + i_row
    i_candidate = tl.arange(0, BLOCK)
    given = i_candidate < chosen * GROUP
    b_score = tl.load(p_scores + row * (chosen * GROUP) + i_candidate, mask=given, other=float("-inf"))
    b_group = tl.load(p_groups + row * chosen + i_candidate // GROUP, mask=given, other=0)
    i_m = b_group * GROUP + i_candidate % GROUP
    # Score above, complement of the position below: the largest is the best, the lowest among equal ones.
    b_key = (ordered(b_score).to(tl.int64) << 32) | (0x7FFFFFFF - i_m).to(tl.int64)
    lowest = tl.full((), -0x8000000000000000, tl.int64)
    b_key = tl.where(given, b_key, lowest)
    i_k = tl.arange(0, BLOCK_K)
    b_kept = tl.full((BLOCK_K,), -0x8000000000000000, tl.int64)
    for i in range(kept):
        best = tl.max(b_key, 0)
        b_kept = tl.where(i_k == i, best, b_kept)
        b_key = tl.where(b_key == best, lowest, b_key)
    b_bits = (b_kept >> 32).to(tl.int32)
    b_best = (b_bits ^ ((b_bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    inside = i_k < kept
    b_best = tl.where(inside & (b_kept != lowest), b_best, float("-inf"))
    top = tl.max(tl.where(b_best == b_best, b_best, float("inf")), 0)
    b_weight = tl.exp(b_best - tl.where(top == float("-inf"), 0.0, top))
    total = tl.sum(b_weight, 0)
    b_weight = b_weight / tl.where(total == 0.0, 1.0, total)
    b_index = tl.where(b_best == float("-inf"), -1, 0x7FFFFFFF - (b_kept & 0x7FFFFFFF))
    at = (i_b * queries + first_query + i_row) * kept + i_k
    tl.store(p_indices + at, b_index, mask=inside)
    tl.store(p_weights + at, b_weight, mask=inside)


def group_size(memory: int) -> int:
    """Positions per group: few candidates for a short memory, few groups for a long one."""
    return max(16, triton.next_power_of_2(triton.cdiv(memory, _MOST_GROUPS)))


def match(p: Scores, top_k: int) -> tuple[Tensor, Tensor]:
    """indices (B, Q, k) int64 and weights (B, Q, k) float32, k = min(top_k, M), best first."""
    return match_entries(Operands.of(p), top_k)


def match_entries(o: Operands, top_k: int) -> tuple[Tensor, Tensor]:
    """The same of any operands, for each of their entries."""
    device, kept = o.device, min(top_k, o.memory)
    indices = torch.empty(o.entries, o.queries, kept, dtype=torch.int64, device=device)
    weights = torch.empty(o.entries, o.queries, kept, dtype=torch.float32, device=device)
    if indices.numel() == 0:
        return indices, weights
    size = group_size(o.memory)
    groups = triton.cdiv(o.memory, size)
    chosen = min(kept, groups)
    block_q, block_m, warps = _tile(o, size)
    per_query = 4 * o.entries * (groups + chosen * (size + 1))
    rows = min(o.queries, max(block_q, _BUFFER // per_query // block_q * block_q))
    maxima, candidates = (
        torch.empty(o.entries * rows * width, dtype=torch.float32, device=device)
        for width in (groups, chosen * size)
    )
    chosen_groups = torch.empty(o.entries * rows * chosen, dtype=torch.int32, device=device)
    operands = (*o.query, *o.memory_side)
    with on_device(device):
        for first in range(0, o.queries, rows):
            count = min(rows, o.queries - first)
            blocks = triton.cdiv(o.memory, block_m)
            parts = split(blocks, triton.cdiv(count, block_q) * o.entries, device)
            span = triton.cdiv(blocks, parts) * block_m
            launch(
                group_maxima,
                (triton.cdiv(count, block_q), triton.cdiv(o.memory, span), o.entries),
                *operands, first, o.queries, o.memory, maxima, count, groups, span,
                **o.options, BLOCK_Q=block_q, BLOCK_M=block_m, GROUP=size,
                num_warps=warps, num_stages=2 if o.wide else 3,
            )  # fmt: skip
            block = max(32, triton.next_power_of_2(groups))
            launch(
                choose_groups,
                (o.entries * count,),
                maxima, chosen_groups, groups, chosen,
                BLOCK=block, num_warps=min(16, max(1, block // 512)),
            )  # fmt: skip
            launch(
                candidate_scores,
                (count, o.entries),
                *operands, first, o.queries, o.memory, chosen_groups, candidates, count, chosen,
                **o.options, GROUP=size, BLOCK=max(16, min(64, 8192 // o.block_c)), num_warps=4,
            )  # fmt: skip
            block = max(32, triton.next_power_of_2(chosen * size))
            launch(
                choose_matches,
                (count, o.entries),
                chosen_groups, candidates, indices, weights, first, o.queries, count, chosen, kept,
                GROUP=size, BLOCK=block, BLOCK_K=max(16, triton.next_power_of_2(kept)),
                num_warps=min(16, max(1, block // 512)),
            )  # fmt: skip
    return indices, weights


def _tile(o: Operands, group: int) -> tuple[int, int, int]:
    """(BLOCK_Q, BLOCK_M, warps) of a score tile: the largest that fits the registers."""
    selects = bool(o.options["SELECTION"])  # two products at a time
    heavy = selects or o.block_c > 64
    if not o.wide:
        block_q, block_m, warps = 128, 64 if selects or o.options["PRIOR"] else 128, 8
    elif capability(o.device)[0] >= 9:
        block_q, block_m, warps = 64, 32 if heavy else 64, 8
    else:
        block_q, block_m, warps = (16, 64, 8) if heavy or group > 32 else (64, 32, 4)
    return block_q, max(block_m, group), warps
