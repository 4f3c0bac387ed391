# SPDX-License-Identifier: Apache-2.0
"""Gradients of query, key and identity gate in plain torch: of the h Q k pairs that top-k kept, and, for the
dense read, from those of the packed operands that the kernel returns."""

from __future__ import annotations

import torch
from torch import Tensor

from .problem import Heads, split_heads


# A backward pass may run inside autocast, which would lower these products.
@torch.autocast("cuda", enabled=False)
@torch.autocast("cpu", enabled=False)
def match(
    query: Tensor,
    key: Tensor,
    identity_gate: Tensor | None,
    num_heads: int,
    distance: bool,
    scale: float,
    grad_weights: Tensor,
    indices: Tensor,
    weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients to query, key and identity gate (empty where absent), float32."""
    q, k = split_heads(query.float(), num_heads), split_heads(key.float(), num_heads)
    batch, heads, memory, channels = k.shape
    kept, rows = indices >= 0, indices.clamp(min=0)
    grad = weights * (grad_weights - (weights * grad_weights).sum(-1, keepdim=True))  # [B, h, Q, k]
    grad = grad.masked_fill(~kept, 0)
    entry = torch.arange(batch * heads, device=k.device).view(batch, heads, 1, 1)
    flat = (rows + entry * memory).flatten()
    gate = None if identity_gate is None else _per_head(identity_gate, heads)  # [B, h, M]
    gated = k if gate is None else k * gate[..., None]
    picked = gated.reshape(-1, channels)[flat].view(*rows.shape, channels)  # [B, h, Q, k, C/h]
    factor = 2 * scale if distance else scale
    grad_q = factor * torch.einsum("bhqk,bhqkc->bhqc", grad, picked)
    pull = factor * q[:, :, :, None]  # of s to k'
    if distance:
        pull = pull - 2 * picked
    total = grad.new_zeros(batch * heads * memory, channels)
    total.index_add_(0, flat, (grad[..., None] * pull).flatten(0, 3))
    return _ungated(grad_q, total.view(batch, heads, memory, channels), k, gate, identity_gate)


def unpack(
    p: Heads, grad_left: Tensor, grad_right: Tensor, grad_bias: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients from those of a = (2) scale q, b = k' and the bias -|k'|^2 (csrc/memory_read/pack.h).

    grad_left [B * h, Q, C/h], grad_right [B * h, M, C/h], grad_bias [B * h, M].
    """
    shape = (p.query.shape[0], p.num_heads)
    k = split_heads(p.key.float(), p.num_heads)
    gate = None if p.identity_gate is None else _per_head(p.identity_gate, p.num_heads)
    grad_q = grad_left.unflatten(0, shape) * (2 * p.scale if p.distance else p.scale)
    grad_k = grad_right.unflatten(0, shape)
    if p.distance:
        gated = k if gate is None else k * gate[..., None]
        grad_k = grad_k - 2 * gated * grad_bias.unflatten(0, shape)[..., None]
    grads = _ungated(grad_q, grad_k, k, gate, p.identity_gate)
    inputs = (p.query, p.key, p.identity_gate)
    typed = [None if x is None else g.to(x.dtype) for x, g in zip(inputs, grads, strict=True)]
    assert typed[0] is not None
    assert typed[1] is not None
    return typed[0], typed[1], typed[2]


def _per_head(gate: Tensor, num_heads: int) -> Tensor:  # [B, M, 1 or h] -> [B, h, M]
    return gate.float().mT.expand(-1, num_heads, -1)


def _ungated(
    grad_q: Tensor, grad_k: Tensor, k: Tensor, gate: Tensor | None, identity_gate: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """From gradients per head to q and k' = g k, those of query, key and gate in the callers' layout."""
    grad_gate = grad_q.new_empty(0)
    if gate is not None and identity_gate is not None:
        grad_gate = (grad_k * k).sum(-1).mT  # [B, M, h]
        if identity_gate.shape[2] == 1:
            grad_gate = grad_gate.sum(-1, keepdim=True)
        grad_gate = grad_gate.contiguous()
        grad_k = grad_k * gate[..., None]
    return grad_q.transpose(1, 2).flatten(2), grad_k.transpose(1, 2).flatten(2), grad_gate
