# SPDX-License-Identifier: Apache-2.0
"""Gradients of the scores' operands in plain torch: of the Q k pairs that top-k kept, and, for the dense
read, from those of the packed operands that the kernel returns."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .problem import Scores


def scores_from(
    query_key: Tensor,
    memory_key: Tensor,
    shrinkage: Tensor | None,
    selection: Tensor | None,
    memory_mask: Tensor | None,
    centers: Tensor | None,
    precision: Tensor | None,
    l2: bool,
    scale: float,
) -> Scores:
    similarity = "l2" if l2 else "dot"
    return Scores(
        query_key, memory_key, shrinkage, selection, memory_mask, similarity, scale, centers, precision
    )


# A backward pass may run inside autocast, which would lower these products.
@torch.autocast("cuda", enabled=False)
@torch.autocast("cpu", enabled=False)
def match(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients to query key, memory key, shrinkage and selection (empty where absent), float32."""
    *scores, grad_weights, indices, weights = arguments
    p = scores_from(*scores)
    kept = indices >= 0
    rows = indices.clamp(min=0)
    grad = weights * (grad_weights - (weights * grad_weights).sum(-1, keepdim=True)) * p.scale  # [B, Q, k]
    grad = grad.masked_fill(~kept, 0)
    q = p.query_key.flatten(2).float().mT  # [B, Q, Ck]
    keys = p.memory_key.flatten(2).mT  # [B, M, Ck]
    batch, memory, channels = keys.shape
    entry = torch.arange(batch, device=keys.device)[:, None, None]
    k = keys[entry, rows].float()  # [B, Q, k, Ck]

    def scatter(pairs: Tensor) -> Tensor:  # [B, Q, k, C] -> [B, C, M]
        total = pairs.new_zeros(batch * memory, pairs.shape[-1])
        flat = (rows + entry * memory).flatten()
        return (
            total.index_add_(0, flat, pairs.flatten(0, 2))
            .view(batch, memory, pairs.shape[-1])
            .mT.contiguous()
        )

    r = None if p.shrinkage is None else p.shrinkage.flatten(1).float()[entry, rows]  # [B, Q, k]
    weighted = grad if r is None else grad * r
    empty = grad.new_empty(batch, 1, 0)
    grad_r, grad_e = empty, grad.new_empty(batch, channels, 0)
    if p.selection is not None:  # s = -r sum_c e (k - q)^2
        e = p.selection.flatten(2).float().mT[:, :, None]  # [B, Q, 1, Ck]
        offset = k - q[:, :, None]
        pull = weighted[..., None] * offset
        grad_q, grad_k = 2 * (e * pull).sum(2), -2 * e * pull
        grad_e = -(pull * offset).sum(2).mT.contiguous()
        similarity = -(e * offset.square()).sum(-1)
    elif p.similarity == "l2":  # s = r (2 <q, k> - |k|^2)
        grad_q = 2 * torch.einsum("bqk,bqkc->bqc", weighted, k)
        grad_k = 2 * weighted[..., None] * (q[:, :, None] - k)
        similarity = 2 * torch.einsum("bqc,bqkc->bqk", q, k) - k.square().sum(-1) if r is not None else empty
    else:
        grad_q = torch.einsum("bqk,bqkc->bqc", weighted, k)
        grad_k = weighted[..., None] * q[:, :, None]
        similarity = empty
    if r is not None:
        grad_r = scatter((grad * similarity)[..., None])
    return grad_q.mT.contiguous(), scatter(grad_k), grad_r, grad_e


def unpack(p: Scores, grad_left: Tensor, grad_right: Tensor, grad_bias: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of query key, memory key, shrinkage and selection from those of the score's packed form,
    s = <a, b> + bias (csrc/memory_read/pack.h).  # [B, Q, depth], [B, M, depth], [B, M]
    """
    q, k = p.query_key.flatten(2).float().mT, p.memory_key.flatten(2).float().mT  # [B, Q, Ck], [B, M, Ck]
    if p.memory_mask is not None:
        k = k.masked_fill(~p.memory_mask.flatten(1)[..., None], 0)
    r = None if p.shrinkage is None else p.shrinkage.flatten(2).float().mT  # [B, M, 1]
    channels, bias = q.shape[-1], grad_bias[..., None]
    grad_r = grad_e = None
    if p.selection is not None:  # a = scale (2 e q, -e, -sum e q^2), b = (r k, r k^2, r)
        e = p.selection.flatten(2).float().mT
        first, second, rest = grad_left.split((channels, channels, 1), -1)
        grad_q = 2 * p.scale * e * (first - q * rest)
        grad_e = p.scale * (2 * q * first - second - q.square() * rest)
        along, squared, alone = grad_right.split((channels, channels, 1), -1)
        grad_k = along + 2 * k * squared
        if r is not None:
            grad_r = (k * along + k.square() * squared).sum(-1, keepdim=True) + alone
    elif p.similarity == "l2":  # a = 2 scale q, b = r k, bias = -scale r |k|^2
        grad_q, grad_k = 2 * p.scale * grad_left, grad_right - 2 * p.scale * k * bias
        if r is not None:
            grad_r = (k * grad_right - p.scale * k.square() * bias).sum(-1, keepdim=True)
    else:  # a = scale q, b = k
        grad_q, grad_k = p.scale * grad_left, grad_right
    if r is not None:
        grad_k = grad_k * r
    grads = (grad_q, grad_k, grad_r, grad_e)
    inputs = (p.query_key, p.memory_key, p.shrinkage, p.selection)
    return tuple(
        None if g is None or x is None else g.mT.reshape(x.shape).to(x.dtype)
        for g, x in zip(grads, inputs, strict=True)
    )
