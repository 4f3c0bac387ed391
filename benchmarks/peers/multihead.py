# SPDX-License-Identifier: Apache-2.0
"""Multi-head attention in plain PyTorch: the published formula, its best plain form, and SDPA."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def _split(x: Tensor, num_heads: int) -> Tensor:  # [B, N, C] -> [B, h, N, C/h]
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def _merge(x: Tensor) -> Tensor:  # [B, h, N, C/h] -> [B, N, C]
    return x.transpose(1, 2).flatten(2)


def attention(
    query: Tensor,  # [B, Q, C]
    key: Tensor,  # [B, M, C]
    value: tuple[Tensor, ...],  # [B, M, Cv] each
    *,
    num_heads: int,
    top_k: int | None = None,
    identity: Tensor | None = None,
    identity_gate: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Attention as AOT's layers write it: scores h x Q x M, softmax, one product with the values.

    With top_k: topk of the scores, a softmax over what is kept, scattered into a matrix of zeros, and that
    times all the values. Several values are concatenated, as DeAOT does every frame; identity and gate are
    applied to the whole memory.

    Args, returns: as `vosops.attention` with a tuple of values.

    Note:
        Cost: 2 B Q M (C + Cv) operations and several B h Q M matrices of memory, whatever top_k is.

    Sources: AOT (eq. 2-4), DeAOT (gated propagation).
    """
    key = key if identity_gate is None else gated(key, identity_gate, num_heads)
    whole = joined(value, identity, num_heads)
    scores = _split(query, num_heads) * (query.shape[2] // num_heads) ** -0.5 @ _split(key, num_heads).mT
    if top_k is None:
        weights = scores.softmax(-1)
    else:
        best, indices = scores.topk(min(top_k, scores.shape[-1]), dim=-1)
        weights = torch.zeros_like(scores).scatter(-1, indices, best.softmax(-1))
    return parted(weights @ _split(whole, num_heads), value, num_heads)


def attention_smart(
    query: Tensor,  # [B, Q, C]
    key: Tensor,  # [B, M, C]
    value: tuple[Tensor, ...],  # [B, M, Cv] each
    *,
    num_heads: int,
    top_k: int,
    identity: Tensor | None = None,
    identity_gate: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Top-k attention without the dense weights: scores in one product, topk, embedding_bag per head.

    Args, returns: as `vosops.attention` with a tuple of values.

    Note:
        Cost: 2 B Q M C operations, one topk over h x Q x M, h Q k rows of Cv/h values. Memory: one matrix of
        scores, and the values once more with the heads apart.
    """
    key = key if identity_gate is None else gated(key, identity_gate, num_heads)
    table = _split(joined(value, identity, num_heads), num_heads)  # [B, h, M, Cv/h]
    batch, heads, memory, channels = table.shape
    scale = (query.shape[2] // num_heads) ** -0.5
    best, rows = (_split(query, heads) * scale @ _split(key, heads).mT).topk(top_k, dim=-1, sorted=False)
    rows = rows + memory * torch.arange(batch * heads, device=rows.device).view(batch, heads, 1, 1)
    read = F.embedding_bag(
        rows.flatten(0, 2),
        table.reshape(-1, channels),
        per_sample_weights=best.softmax(-1).flatten(0, 2),
        mode="sum",
    )
    return parted(read.view(batch, heads, -1, channels), value, num_heads)


def attention_sdpa(
    query: Tensor,  # [B, Q, C]
    key: Tensor,  # [B, M, C]
    value: tuple[Tensor, ...],  # [B, M, Cv] each
    *,
    num_heads: int,
    identity: Tensor | None = None,
    identity_gate: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Dense attention with F.scaled_dot_product_attention; several values are concatenated.

    Args, returns: as `vosops.attention` with a tuple of values and top_k=None.

    Note:
        Cost: 2 B Q M (C + Cv) operations. Where key and value widths differ PyTorch's CPU backend takes its
        matrix path, which stores h x Q x M.
    """
    key = key if identity_gate is None else gated(key, identity_gate, num_heads)
    whole = joined(value, identity, num_heads)
    read = F.scaled_dot_product_attention(*(_split(x, num_heads) for x in (query, key, whole)))
    return parted(read, value, num_heads)


def gated(key: Tensor, identity_gate: Tensor, num_heads: int) -> Tensor:
    """K' = key * identity_gate, a gate per token or per head.  # [B, M, C]"""
    return (key.unflatten(-1, (num_heads, -1)) * identity_gate[..., None]).flatten(2)


def joined(value: tuple[Tensor, ...], identity: Tensor | None, num_heads: int) -> Tensor:
    """All values as one tensor whose heads hold the channels of all; V' = value + identity."""
    if identity is not None:
        value = (value[0] + identity,)
    if len(value) == 1:
        return value[0]
    return torch.cat([x.unflatten(-1, (num_heads, -1)) for x in value], -1).flatten(2)


def parted(read: Tensor, value: tuple[Tensor, ...], num_heads: int) -> tuple[Tensor, ...]:
    """The read of `joined` values, one tensor for each of them.  # [B, h, Q, C'/h] -> [B, Q, Cv]"""
    return tuple(_merge(x) for x in read.split([x.shape[2] // num_heads for x in value], -1))
