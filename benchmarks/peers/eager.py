# SPDX-License-Identifier: Apache-2.0
"""The published formula in plain PyTorch: every step on the whole M x Q matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from vosops import KernelPrior

from .scores import cells


def memory_read(
    query_key: Tensor,  # [B, Ck, *q]
    memory_key: Tensor,  # [B, Ck, *m]
    memory_value: Tensor,  # [B, O, Cv, *m]
    *,
    similarity: str = "dot",
    scale: float | None = None,
    shrinkage: Tensor | None = None,  # [B, 1, *m]
    selection: Tensor | None = None,  # [B, Ck, *q]
    top_k: int | None = None,
    prior: KernelPrior | None = None,
) -> Tensor:
    """The memory read as the VOS papers write it: affinity M x Q, one matrix product with the values.

    With top_k, as STCN and XMem have it: topk of the similarity, exp (no maximum subtracted), normalise,
    scatter into a zero M x Q matrix, and multiply that by all the values. Without, a softmax over M (STM).
    With a prior, as KMN has it: argmax over the queries, exp times the Gaussian, normalise; its top_k
    runs on that product.

    Args, returns: as `vosops.memory_read`, without memory_mask and usage.

    Note:
        Cost: 2 B Q M (Ck + O Cv) operations and several B Q M matrices of memory, whatever top_k is.

    Sources: STM (eq. 1), KMN (eq. 5-6), STCN (eq. 4), XMem (eq. 2-3).
    """
    q, k = query_key.flatten(2), memory_key.flatten(2)  # [B, Ck, Q], [B, Ck, M]
    batch, objects, channels = memory_value.shape[:3]
    scale = q.shape[1] ** -0.5 if scale is None else scale
    affinity = _similarity(q, k, similarity, shrinkage, selection) * scale  # [B, M, Q]
    if prior is not None:
        affinity = (affinity - affinity.amax(1, keepdim=True)).exp() * _gaussian(affinity, prior, query_key)
        if top_k is not None:
            kept, indices = affinity.topk(min(top_k, affinity.shape[1]), dim=1)
            affinity = _scatter(affinity, indices, kept)
        affinity = affinity / affinity.sum(1, keepdim=True)
    elif top_k is not None:
        kept, indices = affinity.topk(min(top_k, affinity.shape[1]), dim=1)
        kept = kept.exp()
        affinity = _scatter(affinity, indices, kept / kept.sum(1, keepdim=True))
    else:
        affinity = affinity.softmax(1)
    read = torch.bmm(memory_value.flatten(3).flatten(1, 2), affinity)  # [B, O*Cv, Q]
    return read.view(batch, objects, channels, *query_key.shape[2:])


def _similarity(
    q: Tensor, k: Tensor, similarity: str, shrinkage: Tensor | None, selection: Tensor | None
) -> Tensor:  # [B, M, Q]
    if similarity == "dot":
        return torch.bmm(k.mT, q)
    if selection is None:
        s = 2 * torch.bmm(k.mT, q) - k.square().sum(1)[..., None]
    else:
        e = selection.flatten(2)
        cross = 2 * torch.bmm(k.mT, q * e)
        s = cross - torch.bmm(k.square().mT, e) - (e * q.square()).sum(1, keepdim=True)
    return s if shrinkage is None else s * shrinkage.flatten(2).mT


def _scatter(affinity: Tensor, indices: Tensor, kept: Tensor) -> Tensor:  # [B, M, Q]
    if kept.requires_grad:
        return torch.zeros_like(affinity).scatter(1, indices, kept)
    return affinity.zero_().scatter_(1, indices, kept)  # the similarity is no longer needed: reuse its memory


def _gaussian(s: Tensor, prior: KernelPrior, query_key: Tensor) -> Tensor:  # [B, M, Q]
    height, width = query_key.shape[2:]
    best = s.detach().argmax(2)  # [B, M]
    position = cells((height, width), s)  # [Q, 2]
    rows = position[:, 0] - (best // width)[..., None]
    columns = position[:, 1] - (best % width)[..., None]
    return (-(rows.square() + columns.square()) / (2 * prior.sigma**2)).exp()
