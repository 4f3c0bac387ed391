# SPDX-License-Identifier: Apache-2.0
"""The definition of attention in plain torch; every other backend is tested against it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..memory_read.reference import softmax
from .problem import Heads, split_heads, widest


def scores(p: Heads) -> Tensor:  # [B, h, Q, M]
    wide = widest(p.query.dtype, p.key.dtype)
    q, k = (split_heads(x.to(wide), p.num_heads) for x in (p.query, p.key))  # [B, h, Q, C/h], [B, h, M, C/h]
    if p.identity_gate is not None:
        k = k * p.identity_gate.to(wide).mT[..., None]  # [B, 1 or h, M, 1]
    s = q @ k.mT * p.scale
    return 2 * s - k.square().sum(-1)[:, :, None] if p.distance else s


def attend(
    p: Heads, values: Sequence[Tensor], identity: Tensor | None, top_k: int | None, return_usage: bool
) -> tuple[list[Tensor], Tensor | None]:
    """The reads (B, Q, Cv), in float32 at least, and the usage (B, M)."""
    s = scores(p)
    if top_k is not None:
        # Sorted, not topk: among equal scores the lowest index wins.
        kept = s.detach().sort(dim=-1, descending=True, stable=True).indices[..., :top_k]
        dropped = torch.ones_like(s, dtype=torch.bool).scatter(-1, kept, False)
        s = s.masked_fill(dropped, -torch.inf)
    weights = softmax(s)
    reads = []
    for value in values:
        v = value.to(weights.dtype)
        if identity is not None:
            v = v + identity.to(weights.dtype)
        reads.append((weights @ split_heads(v, p.num_heads)).transpose(1, 2).flatten(2))
    return reads, weights.detach().sum((1, 2)).float() if return_usage else None
