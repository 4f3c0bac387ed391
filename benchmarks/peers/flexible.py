# SPDX-License-Identifier: Apache-2.0
"""FlexAttention, compiled, for heads of any width."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

_WIDEST = 256  # channels of a value head that its GPU kernels hold on chip
_PART = 128  # what a wider one is cut into


def attend(
    query: Tensor,  # [B, h, Q, C/h]
    key: Tensor,  # [B, h, M, C/h]
    value: Tensor,  # [B, h, M, Cv/h]
    *,
    score_mod: ScoreMod | None = None,
    block_mask: BlockMask | None = None,
) -> Tensor:
    """Attention by the compiled kernel; score_mod and block_mask as `flex_attention` takes them.

    Any strides, of which the last must be 1 or is made so by a copy. On CUDA a value head of more than 256
    channels is cut into heads of 128 (`cut`), all of which match again: uncut its accumulator does not fit.

    Returns:
        [B, h, Q, Cv/h]

    Note:
        Cost: 2 B Q M' (C + Cv) operations, M' the positions of the blocks that the mask leaves. The first
        call with new shapes, and each new score_mod, compiles for some seconds.
    """
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    if not _too_wide(v):
        return _compiled()(q, k, v, score_mod=score_mod, block_mask=block_mask)
    parts = v.shape[-1] // _PART
    heads = _of_heads(score_mod, parts) if score_mod is not None else None
    q, k, v = cut(q, k, v, parts)
    # Results and gradients are laid out in the order of the strides of what they belong to: none may be 0.
    q, k = q.contiguous(), k.contiguous() if k.requires_grad else k
    return join(_compiled()(q, k, v, score_mod=heads, block_mask=block_mask), parts)


def cut(query: Tensor, key: Tensor, value: Tensor, parts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Every value head cut into `parts` heads, which share query and key.

    Nothing is copied where there is one head: the shared ones have a stride of 0.

    Returns:
        ([B, h parts, Q, C/h], [B, h parts, M, C/h], [B, h parts, M, Cv/h/parts])

    Raises:
        ValueError: parts does not divide the channels of a value head.
    """
    if value.shape[-1] % parts:
        raise ValueError(f"parts must divide the {value.shape[-1]} channels of a value head, got {parts}")
    q, k = (x[:, :, None].expand(-1, -1, parts, -1, -1).flatten(1, 2) for x in (query, key))
    return q, k, value.unflatten(-1, (parts, -1)).movedim(3, 2).flatten(1, 2)


def join(read: Tensor, parts: int) -> Tensor:
    """The read of `cut` heads.  # [B, h parts, Q, c] -> [B, h, Q, parts c]"""
    return read.unflatten(1, (-1, parts)).movedim(2, 3).flatten(3)


def _too_wide(value: Tensor) -> bool:
    return value.is_cuda and value.shape[-1] > _WIDEST


def _of_heads(score_mod: ScoreMod, parts: int) -> ScoreMod:
    def of_cut(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score_mod(score, b, h // parts, i, j)

    return of_cut


@cache
def _compiled() -> Callable[..., Tensor]:
    return torch.compile(flex_attention, dynamic=False)
