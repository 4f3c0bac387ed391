# SPDX-License-Identifier: Apache-2.0
"""The same function as reference.py on a family of operators, compiled or Triton's: of schema.py, and the
memory read's gather."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..families import operator
from . import schema  # noqa: F401  (defines the operators)
from .problem import Heads, split_heads


def attend(
    family: str,
    p: Heads,
    values: Sequence[Tensor],
    identity: Tensor | None,
    top_k: int | None,
    return_usage: bool,
) -> tuple[list[Tensor], Tensor | None]:
    """The reads (B, Q, Cv) in float32, and the usage (B, M)."""
    usage = None
    if top_k is None:
        read, lse = operator(family, "attention_dense")(*p.arguments(), list(values), identity)
        if return_usage:
            with torch.no_grad():
                usage = operator(family, "attention_usage")(*p.arguments(), lse).sum(1)
        return list(read.split([value.shape[2] for value in values], 2)), usage
    indices, weights = operator(family, "attention_match")(*p.arguments(), top_k)
    reads = [_gather(family, p, indices, weights, value) for value in values]
    if identity is not None:
        reads[0] = reads[0] + _gather(family, p, indices, weights, identity)
    return reads, _usage(indices, weights, p.memory) if return_usage else None


def _gather(family: str, p: Heads, indices: Tensor, weights: Tensor, value: Tensor) -> Tensor:  # [B, Q, Cv]
    """The heads are the batch of the memory read's gather, and batch entries follow each other in its memory:
    a view of the values, whatever their strides."""
    batch, _, queries, kept = indices.shape
    heads = split_heads(value, p.num_heads).permute(1, 3, 0, 2)[:, None]  # [h, 1, Cv/h, B, M]
    if batch > 1:
        first = torch.arange(batch, device=indices.device)[:, None, None, None] * p.memory
        indices = torch.where(indices < 0, indices, indices + first)
    flat = (x.transpose(0, 1).reshape(p.num_heads, batch * queries, kept) for x in (indices, weights))
    read = operator(family, "memory_gather")(*flat, heads)  # [h, 1, Cv/h, B * Q]
    return read[:, 0].unflatten(2, (batch, queries)).permute(2, 3, 0, 1).flatten(2)


def _usage(indices: Tensor, weights: Tensor, memory: int) -> Tensor:  # [B, M]
    batch = indices.shape[0]
    entry = torch.arange(batch, device=indices.device)[:, None, None, None] * memory
    rows = (indices.clamp(min=0) + entry).flatten()
    usage = weights.new_zeros(batch * memory).index_add(0, rows, weights.detach().flatten())
    return usage.view(batch, memory)
