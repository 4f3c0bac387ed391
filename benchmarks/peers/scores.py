# SPDX-License-Identifier: Apache-2.0
"""The score as an inner product: what lets a plain matrix product or an attention call compute it."""

from __future__ import annotations

import torch
from torch import Tensor

from vosops import KernelPrior


def as_product(
    query_key: Tensor,  # [B, Ck, *q]
    memory_key: Tensor,  # [B, Ck, *m]
    *,
    similarity: str,
    scale: float,
    shrinkage: Tensor | None = None,  # [B, 1, *m]
    selection: Tensor | None = None,  # [B, Ck, *q]
) -> tuple[Tensor, Tensor]:
    """Rewrite the scaled score as <q'_i, k'_j> with a few more channels.

    - "dot": q' = scale q, k' = k;
    - "l2": q' = scale [2q, 1], k' = r [k, -|k|^2];
    - with selection e: q' = -scale [e, -2 e q, sum e q^2], k' = r [k^2, k, 1].

    Returns:
        q' (B, C', Q) and k' (B, C', M) in the keys' dtype, C' = Ck, Ck + 1 or 2 Ck + 1. In bfloat16 and
        float16 the extra channels are rounded like the others, which costs accuracy.
    """
    q, k = query_key.flatten(2), memory_key.flatten(2)
    if similarity == "dot":
        return scale * q, k
    if selection is None:
        q = torch.cat((2 * q, torch.ones_like(q[:, :1])), 1)
        k = torch.cat((k, -k.square().sum(1, keepdim=True)), 1)
    else:
        e = selection.flatten(2)
        q = torch.cat((-e, 2 * e * q, -(e * q.square()).sum(1, keepdim=True)), 1)
        k = torch.cat((k.square(), k, torch.ones_like(k[:, :1])), 1)
    return scale * q, k if shrinkage is None else k * shrinkage.flatten(2)


def best_cells(q: Tensor, k: Tensor, grid: tuple[int, int]) -> Tensor:
    """KMN's centres: the query cell (row, column) that each memory position matches best.  # [B, M, 2]

    Args:
        q, k: of `as_product`; the scores (B, M, Q) are materialised.
        grid: (height, width) of the query.
    """
    with torch.no_grad():
        best = torch.bmm(k.mT, q).argmax(2)
    return torch.stack((best // grid[1], best % grid[1]), -1).to(q.dtype)


def cells(grid: tuple[int, int], like: Tensor) -> Tensor:
    """Cell (row, column) of every query, row-major.  # [Q, 2]"""
    rows = torch.arange(grid[0], device=like.device, dtype=like.dtype)
    columns = torch.arange(grid[1], device=like.device, dtype=like.dtype)
    return torch.cartesian_prod(rows, columns)


def with_prior(q: Tensor, k: Tensor, prior: KernelPrior, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Append KMN's Gaussian to the product, three channels, up to a term that is constant in j.

    -|x_i - c_j|^2 / (2 sigma^2) = <x_i, c_j> / sigma^2 - |c_j|^2 / (2 sigma^2) + constant(i), which no
    softmax or top-k over j sees.
    """
    center = best_cells(q, k, grid).mT  # [B, 2, M]
    position = cells(grid, q).mT.expand(q.shape[0], -1, -1)  # [B, 2, Q]
    precision = prior.sigma**-2
    q = torch.cat((q, precision * position, torch.ones_like(q[:, :1])), 1)
    k = torch.cat((k, center, -0.5 * precision * center.square().sum(1, keepdim=True)), 1)
    return q, k
