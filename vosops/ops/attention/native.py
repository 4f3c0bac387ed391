# SPDX-License-Identifier: Apache-2.0
"""The same function as reference.py on the compiled operators: of schema.py, and the memory read's gather."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import schema  # noqa: F401  (defines the operators)
from .problem import Heads, split_heads

_ops = torch.ops.vosops


def attend(
    p: Heads, values: Sequence[Tensor], identity: Tensor | None, top_k: int | None, return_usage: bool
) -> tuple[list[Tensor], Tensor | None]:
    """The reads (B, Q, Cv) in float32, and the usage (B, M)."""
    usage = None
    if top_k is None:
        read, lse = _ops.attention_dense(*p.arguments(), list(values), identity)
        if return_usage:
            with torch.no_grad():
                usage = _ops.attention_usage(*p.arguments(), lse).sum(1)
        return list(read.split([value.shape[2] for value in values], 2)), usage
    indices, weights = _ops.attention_match(*p.arguments(), top_k)
    reads = [_gather(p, indices, weights, value) for value in values]
    if identity is not None:
        reads[0] = reads[0] + _gather(p, indices, weights, identity)
    return reads, _usage(indices, weights, p.memory) if return_usage else None


def _gather(p: Heads, indices: Tensor, weights: Tensor, value: Tensor) -> Tensor:  # [B, Q, Cv]
    """The heads of one batch entry are the batch of the memory read's gather: a view for any strides."""
    batch, _, queries, _ = indices.shape
    if batch == 0:
        return value.new_empty((0, queries, value.shape[2]), dtype=torch.float32)
    heads = split_heads(value, p.num_heads).mT  # [B, h, Cv/h, M]
    reads = [_ops.memory_gather(indices[b], weights[b], heads[b][:, None]) for b in range(batch)]
    return torch.stack(reads).permute(0, 4, 1, 2, 3).reshape(batch, queries, value.shape[2])


def _usage(indices: Tensor, weights: Tensor, memory: int) -> Tensor:  # [B, M]
    batch = indices.shape[0]
    entry = torch.arange(batch, device=indices.device)[:, None, None, None] * memory
    rows = (indices.clamp(min=0) + entry).flatten()
    usage = weights.new_zeros(batch * memory).index_add(0, rows, weights.detach().flatten())
    return usage.view(batch, memory)
