# SPDX-License-Identifier: Apache-2.0
"""Gradients of the scores' operands, in plain torch on what the forward kept.

Top-k touches only the Q k kept pairs. Dense recomputes the weights from the log-sum-exp for a few
hundred queries at a time, so that Q x M is never whole.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .problem import Scores

# Weights held at a time by the dense gradient, and queries at least: each chunk adds to the whole gradient
# of the memory, which costs more than its products when a chunk is only a few queries.
_CHUNK_ELEMENTS, _CHUNK_QUERIES = 1 << 22, 128


def _scores(
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
@torch.autocast("cpu", enabled=False)
def match(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients to query key, memory key, shrinkage and selection (empty where absent), float32."""
    *scores, grad_weights, indices, weights = arguments
    p = _scores(*scores)
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
        return total.index_add_(0, flat, pairs.flatten(0, 2)).view(batch, memory, -1).mT.contiguous()

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


@torch.autocast("cpu", enabled=False)
def dense(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients to query key, memory key, shrinkage, selection (empty where absent) and values, float32."""
    *scores, memory_value, grad_read, grad_lse, read, lse = arguments
    p = _scores(*scores)
    q, k = p.query_key.flatten(2).float(), p.memory_key.flatten(2).float()  # [B, Ck, Q], [B, Ck, M]
    value = memory_value.flatten(3).flatten(1, 2).float()  # [B, O*Cv, M]
    hidden = None if p.memory_mask is None else ~p.memory_mask.flatten(1)[:, None]
    if hidden is not None:
        k, value = k.masked_fill(hidden, 0), value.masked_fill(hidden, 0)
    r = None if p.shrinkage is None else p.shrinkage.flatten(2).float()
    e = None if p.selection is None else p.selection.flatten(2).float()
    # similarity = left' right + bias, then times r and scale.
    left, right, bias = q, k, q.new_zeros(1, 1, 1)
    if e is not None:  # -sum e (k - q)^2
        left, right = torch.cat((2 * e * q, -e), 1), torch.cat((k, k.square()), 1)
        bias = -(e * q.square()).sum(1)[..., None]  # [B, Q, 1]
    elif p.similarity == "l2":
        left, bias = 2 * q, -k.square().sum(1)[:, None]  # [B, 1, M]
    grad_read = grad_read.flatten(1, 2)  # [B, O*Cv, Q]
    delta = ((grad_read * read.flatten(1, 2)).sum(1) - grad_lse)[..., None]  # [B, Q, 1]
    grad_left, grad_right, grad_value = map(torch.zeros_like, (left, right, value))
    grad_r = torch.zeros_like(r) if r is not None else k.new_empty(k.shape[0], 1, 0)
    of_query, of_memory = (
        torch.zeros_like(delta),
        k.new_zeros(k.shape[0], 1, k.shape[2]),
    )  # sums of the gradient
    cells = p.cells(q) if p.centers is not None else None
    step = max(_CHUNK_QUERIES, _CHUNK_ELEMENTS // k.shape[-1])
    for start in range(0, q.shape[-1], step):
        at = slice(start, start + step)
        base = bias[:, at] if bias.shape[1] > 1 else bias
        similarity = torch.baddbmm(base, left[..., at].mT, right)  # [B, Q', M]
        s = similarity.mul_(p.scale) if r is None else similarity * (r * p.scale)
        if cells is not None and p.centers is not None and p.precision is not None:
            for axis in (0, 1):
                offset = cells[None, at, None, axis] - p.centers[:, None, :, axis]
                s -= offset.square_().mul_(p.precision[:, None])
        if hidden is not None:
            s.masked_fill_(hidden, -torch.inf)
        weights = s.sub_(lse[:, at, None]).exp_()
        grad_value.baddbmm_(grad_read[..., at], weights)
        grad = (grad_read[..., at].mT @ value).sub_(delta[:, at]).mul_(weights).mul_(p.scale)
        if r is not None:
            grad_r += (similarity.mul_(grad)).sum(1, keepdim=True)
            grad *= r
        grad_left[..., at] = right @ grad.mT
        grad_right.baddbmm_(left[..., at], grad)
        of_query[:, at] = grad.sum(2, keepdim=True)
        of_memory += grad.sum(1, keepdim=True)
    grad_q, grad_k, grad_e = grad_left, grad_right, k.new_empty(*k.shape[:2], 0)
    if e is not None:
        (first, second), (along, squared) = grad_left.chunk(2, 1), grad_right.chunk(2, 1)
        grad_q = 2 * e * (first - q * of_query.mT)
        grad_e = 2 * q * first - second - q.square() * of_query.mT
        grad_k = along + 2 * k * squared
    elif p.similarity == "l2":
        grad_q, grad_k = 2 * grad_left, grad_right - 2 * k * of_memory
    if hidden is not None:
        grad_k, grad_value = grad_k.masked_fill(hidden, 0), grad_value.masked_fill(hidden, 0)
    return grad_q, grad_k, grad_r, grad_e, grad_value.unflatten(1, memory_value.shape[1:3])
