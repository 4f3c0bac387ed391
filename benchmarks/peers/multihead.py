# SPDX-License-Identifier: Apache-2.0
"""Multi-head attention in plain PyTorch: the published formula, its best plain form, SDPA, FlexAttention."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import flexible


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


def attention_compiled(
    query: Tensor, key: Tensor, value: tuple[Tensor, ...], **options: object
) -> tuple[Tensor, ...]:
    """`attention`, through torch.compile for these very shapes, without graph breaks.

    Args, returns: as `attention`.

    Note:
        The first call with new shapes or options compiles for ten seconds or more.
    """
    return _compiled()(query, key, value, **options)


@cache
def _compiled() -> Callable[..., tuple[Tensor, ...]]:
    return torch.compile(attention, dynamic=False, fullgraph=True)


def attention_sdpa(
    query: Tensor,  # [B, Q, C]
    key: Tensor,  # [B, M, C]
    value: tuple[Tensor, ...],  # [B, M, Cv] each
    *,
    num_heads: int,
    identity: Tensor | None = None,
    identity_gate: Tensor | None = None,
    backend: SDPBackend | None = None,
    equal_widths: bool = False,
) -> tuple[Tensor, ...]:
    """Dense attention with F.scaled_dot_product_attention; several values are concatenated.

    Args, returns: as `vosops.attention` with a tuple of values and top_k=None.
        backend: the one to take; None leaves the choice to PyTorch.
        equal_widths: cut value heads into as many as make them as wide as those of the key (`flexible.cut`),
            which all match again: the only way into PyTorch's fastest backends where the widths differ.

    Raises:
        RuntimeError: `backend` does not serve the call (`sdpa_serves`).
        ValueError: equal_widths, and the width of a key head does not divide that of a value head.

    Note:
        Cost: 2 B Q M (C + Cv) operations. Where key and value widths differ PyTorch's CPU backend takes its
        matrix path, which stores h x Q x M.
    """
    q, k, v, parts = _sdpa_heads(query, key, value, num_heads, identity, identity_gate, equal_widths)
    with sdpa_kernel(backend) if backend is not None else nullcontext():
        read = F.scaled_dot_product_attention(q, k, v)
    return parted(flexible.join(read, parts), value, num_heads)


def sdpa_serves(
    backend: SDPBackend,
    query: Tensor,
    key: Tensor,
    value: tuple[Tensor, ...],
    *,
    num_heads: int,
    identity: Tensor | None = None,
    identity_gate: Tensor | None = None,
    equal_widths: bool = False,
) -> bool:
    """Whether PyTorch says that a backend of its own for CUDA serves a call of `attention_sdpa`.

    Args:
        backend: FLASH_ATTENTION, EFFICIENT_ATTENTION or CUDNN_ATTENTION.
        query, key, value, num_heads, identity, identity_gate, equal_widths: of the call; on a CUDA device.
    """
    q, k, v, _ = _sdpa_heads(query, key, value, num_heads, identity, identity_gate, equal_widths)
    ask = {
        SDPBackend.FLASH_ATTENTION: torch.backends.cuda.can_use_flash_attention,
        SDPBackend.EFFICIENT_ATTENTION: torch.backends.cuda.can_use_efficient_attention,
        SDPBackend.CUDNN_ATTENTION: torch.backends.cuda.can_use_cudnn_attention,
    }[backend]
    with sdpa_kernel(backend):
        return bool(ask(torch.backends.cuda.SDPAParams(q, k, v, None, 0.0, False, False)))


def _sdpa_heads(
    query: Tensor,
    key: Tensor,
    value: tuple[Tensor, ...],
    num_heads: int,
    identity: Tensor | None,
    identity_gate: Tensor | None,
    equal_widths: bool,
) -> tuple[Tensor, Tensor, Tensor, int]:
    key = key if identity_gate is None else gated(key, identity_gate, num_heads)
    whole = joined(value, identity, num_heads)
    q, k, v = (_split(x, num_heads) for x in (query, key, whole))
    parts = v.shape[-1] // k.shape[-1] if equal_widths else 1
    if parts > 1:
        q, k, v = (x.contiguous() for x in flexible.cut(q, k, v, parts))  # no kernel promises strides of 0
    return *(x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v)), parts  # type: ignore[return-value]


def attention_flex(
    query: Tensor,  # [B, Q, C]
    key: Tensor,  # [B, M, C]
    value: tuple[Tensor, ...],  # [B, M, Cv] each
    *,
    num_heads: int,
    identity: Tensor | None = None,
    identity_gate: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Dense attention with compiled FlexAttention (`flexible.attend`); several values are concatenated.

    Args, returns: as `vosops.attention` with a tuple of values and top_k=None.

    Note:
        Cost: 2 B Q M (C + Cv) operations. Forward only on the CPU.
    """
    key = key if identity_gate is None else gated(key, identity_gate, num_heads)
    whole = joined(value, identity, num_heads)
    read = flexible.attend(*(_split(x, num_heads) for x in (query, key, whole)))
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
