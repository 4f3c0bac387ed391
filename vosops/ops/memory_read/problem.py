# SPDX-License-Identifier: Apache-2.0
"""What one call of the memory read asks for, checked: the operands of the score s_ij and its prior."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import FLOATS, check_device, check_rank, check_shape, check_tensor
from ..priors import CenterPrior, KernelPrior, MaskPrior, Prior

_QUERY_LAYOUT, _MEMORY_LAYOUT = "(B, Ck, *q)", "(B, Ck, *m)"


@dataclass(frozen=True)
class Scores:
    """Operands of s_ij = scale * similarity(q_i, k_j) - precision_j |x_i - c_j|^2; all share one batch."""

    query_key: Tensor  # [B, Ck, *q]
    memory_key: Tensor  # [B, Ck, *m]
    shrinkage: Tensor | None  # [B, 1, *m]
    selection: Tensor | None  # [B, Ck, *q]
    memory_mask: Tensor | None  # [B, *m] bool
    similarity: str  # "dot" or "l2"
    scale: float
    centers: Tensor | None = None  # [B, M, 2] cell (row, column)
    precision: Tensor | None = None  # [B, M] 1 / (2 sigma^2)
    window: int | None = None  # of KernelPrior, for the argmax over queries

    def tensors(self) -> dict[str, Tensor]:
        names = ("query_key", "memory_key", "shrinkage", "selection", "memory_mask", "centers", "precision")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    @property
    def queries(self) -> int:
        return math.prod(self.query_key.shape[2:])

    @property
    def memory(self) -> int:
        return math.prod(self.memory_key.shape[2:])

    def cells(self, like: Tensor) -> Tensor:
        """Cell (row, column) of every query.  # [Q, 2]"""
        height, width = self.query_key.shape[2:]
        rows = torch.arange(height, device=like.device, dtype=like.dtype)
        columns = torch.arange(width, device=like.device, dtype=like.dtype)
        return torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1).flatten(0, 1)

    def in_window(self, device: torch.device) -> Tensor:
        """Queries that KernelPrior's argmax may choose.  # [Q, M], or [1, 1] for all"""
        if self.window is None:
            return torch.ones(1, 1, dtype=torch.bool, device=device)
        cells = self.cells(torch.empty(0, device=device, dtype=torch.int64))  # [Q, 2]
        frames = self.memory // cells.shape[0]
        offset = (cells[:, None] - cells[None]).abs().amax(-1)  # [Q, Q]
        return (offset <= self.window // 2).repeat(1, frames)


class Match(NamedTuple):
    """The kept memory positions of every query, best first.

    indices: (B, Q, k) int64 position in the flattened memory; -1 where fewer than k could match.
    weights: (B, Q, k) softmax weights, float32 (float64 for float64 keys); 0 at index -1.
    query_shape: the query's spatial shape *q.
    """

    indices: Tensor
    weights: Tensor
    query_shape: tuple[int, ...]


def build_scores(
    query_key: Tensor,
    memory_key: Tensor,
    similarity: str,
    scale: float | None,
    shrinkage: Tensor | None,
    selection: Tensor | None,
    memory_mask: Tensor | None,
) -> Scores:
    """Check the operands of the score (no prior yet); raises TypeError or ValueError, naming the argument."""
    check_tensor("query_key", query_key, layout=_QUERY_LAYOUT)
    check_tensor("memory_key", memory_key, layout=_MEMORY_LAYOUT)
    check_rank("query_key", query_key, 3, _QUERY_LAYOUT)
    check_rank("memory_key", memory_key, 3, _MEMORY_LAYOUT)
    check_device("memory_key", memory_key, "query_key", query_key.device)
    batch, channels = query_key.shape[:2]
    memory_shape = memory_key.shape[2:]
    if memory_key.shape[0] != batch:
        raise ValueError(f"memory_key must have the batch of query_key, {batch}, got {memory_key.shape[0]}")
    if memory_key.shape[1] != channels:
        raise ValueError(
            f"memory_key must have the channels of query_key, Ck = {channels}, got {memory_key.shape[1]}"
        )
    if channels == 0:
        raise ValueError("query_key must have at least one channel, got Ck = 0")
    if math.prod(memory_shape) == 0:
        raise ValueError(
            f"memory_key is empty: it must hold at least one position, got shape {list(memory_key.shape)}"
        )
    if similarity not in ("dot", "l2"):
        raise ValueError(f"similarity must be 'dot' or 'l2', got {similarity!r}")
    if similarity == "dot":
        for name, given in (("shrinkage", shrinkage), ("selection", selection)):
            if given is not None:
                raise ValueError(f"{name} belongs to similarity='l2', got similarity='dot'")
    if shrinkage is not None:
        check_tensor("shrinkage", shrinkage, layout="(B, 1, *m)")
        check_shape("shrinkage", shrinkage, (batch, 1, *memory_shape), "(B, 1, *m)")
        check_device("shrinkage", shrinkage, "query_key", query_key.device)
    if selection is not None:
        check_tensor("selection", selection, layout=_QUERY_LAYOUT)
        check_shape("selection", selection, query_key.shape, _QUERY_LAYOUT)
        check_device("selection", selection, "query_key", query_key.device)
    if memory_mask is not None:
        check_tensor("memory_mask", memory_mask, layout="(B, *m)", dtypes=(torch.bool,))
        check_shape("memory_mask", memory_mask, (batch, *memory_shape), "(B, *m)")
        check_device("memory_mask", memory_mask, "query_key", query_key.device)
    if scale is None:
        scale = channels**-0.5
    elif isinstance(scale, bool) or not isinstance(scale, int | float) or not math.isfinite(scale):
        raise ValueError(f"scale must be a finite number or None for 1/sqrt(Ck), got {scale!r}")
    return Scores(query_key, memory_key, shrinkage, selection, memory_mask, similarity, float(scale))


def check_top_k(top_k: object) -> int:
    if isinstance(top_k, bool) or not isinstance(top_k, int):
        raise TypeError(f"top_k must be an integer, got {type(top_k).__name__}")
    if top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    return top_k


def check_value(
    memory_value: Tensor, batch: int, memory_shape: Sequence[int] | None, device: torch.device
) -> None:
    layout = "(B, O, Cv, *m)"
    check_tensor("memory_value", memory_value, layout=layout)
    check_rank("memory_value", memory_value, 4, layout)
    expected = memory_value.shape[3:] if memory_shape is None else memory_shape
    check_shape("memory_value", memory_value, (batch, *memory_value.shape[1:3], *expected), layout)
    check_device("memory_value", memory_value, "the query", device)


def check_match(match: Match) -> None:
    if not isinstance(match, Match):
        raise TypeError(f"match must be the Match that memory_match returned, got {type(match).__name__}")
    check_tensor("match.indices", match.indices, layout="(B, Q, k)", dtypes=(torch.int64,))
    check_tensor("match.weights", match.weights, layout="(B, Q, k)", dtypes=(torch.float32, torch.float64))
    check_shape("match.weights", match.weights, match.indices.shape, "(B, Q, k)")
    if match.indices.dim() != 3 or match.indices.shape[1] != math.prod(match.query_shape):
        raise ValueError(
            f"match.indices must have shape (B, Q, k) with Q = {math.prod(match.query_shape)} queries, "
            f"got {list(match.indices.shape)}"
        )


def check_prior(p: Scores, prior: Prior) -> Scores:
    """Check `prior` against the call; returns the scores with its window. The centres come later."""
    if not isinstance(prior, KernelPrior | MaskPrior | CenterPrior):
        raise TypeError(
            f"prior must be a KernelPrior, MaskPrior, CenterPrior or None, got {type(prior).__name__}"
        )
    if p.query_key.dim() != 4:
        raise ValueError(
            f"prior needs a query grid: query_key (B, Ck, H, W), got shape {list(p.query_key.shape)}"
        )
    sigma, batch, memory_shape = prior.sigma, p.query_key.shape[0], p.memory_key.shape[2:]
    if isinstance(sigma, Tensor):
        check_tensor("prior.sigma", sigma, layout="(B, *m)")
        check_shape("prior.sigma", sigma, (sigma.shape[0], *memory_shape), "(B, *m)")
        check_device("prior.sigma", sigma, "query_key", p.query_key.device)
    elif not sigma > 0:
        raise ValueError(f"prior.sigma must be positive, in cells, got {sigma}")
    if isinstance(prior, CenterPrior):
        check_tensor("prior.centers", prior.centers, layout="(B, *m, 2)")
        check_shape("prior.centers", prior.centers, (prior.centers.shape[0], *memory_shape, 2), "(B, *m, 2)")
        check_device("prior.centers", prior.centers, "query_key", p.query_key.device)
        for name, tensor in (("prior.centers", prior.centers), ("prior.sigma", sigma)):
            if isinstance(tensor, Tensor) and tensor.shape[0] not in (1, batch):
                raise ValueError(f"{name} must have batch 1 or {batch}, got {tensor.shape[0]}")
    if isinstance(prior, MaskPrior):
        masks = (*FLOATS, torch.bool)
        check_tensor("prior.previous_mask", prior.previous_mask, layout="(B, *q)", dtypes=masks)
        check_shape("prior.previous_mask", prior.previous_mask, (batch, *p.query_key.shape[2:]), "(B, *q)")
        check_tensor("prior.memory_object_mask", prior.memory_object_mask, layout="(B, *m)", dtypes=masks)
        check_shape("prior.memory_object_mask", prior.memory_object_mask, (batch, *memory_shape), "(B, *m)")
        if not prior.spread > 0:
            raise ValueError(f"prior.spread must be positive, got {prior.spread}")
    if isinstance(prior, KernelPrior) and (prior.window is not None or prior.sigma_growth != 0):
        if prior.window is not None and (prior.window < 1 or prior.window % 2 == 0):
            raise ValueError(f"prior.window must be odd and positive, got {prior.window}")
        if memory_shape[-2:] != p.query_key.shape[2:]:
            raise ValueError(
                f"prior.window and prior.sigma_growth need a memory (..., T, H, W) on the query grid "
                f"{list(p.query_key.shape[2:])}, got {list(memory_shape)}"
            )
        return replace(p, window=prior.window)
    return p


def mask_log_prior(prior: MaskPrior, cells: Tensor) -> Tensor:
    """log G of every query cell, from the moments of the previous mask; 0 for an empty mask.  # [B, Q]"""
    mass = prior.previous_mask.flatten(1).to(cells.dtype)  # [B, Q]
    total = mass.sum(1, keepdim=True)
    share = mass / total.masked_fill(total == 0, 1)
    offset = cells - (share @ cells)[:, None]  # [B, Q, 2]
    covariance = torch.einsum("bq,bqi,bqj->bij", share, offset, offset) * prior.spread**2
    a, b, d = covariance[:, 0, 0] + 1 / 12, covariance[:, 0, 1], covariance[:, 1, 1] + 1 / 12
    y, x = offset.unbind(-1)
    distance = d[:, None] * y * y - 2 * b[:, None] * y * x + a[:, None] * x * x
    return (-0.5 * distance / (a * d - b * b)[:, None]).masked_fill(total == 0, 0)


def kernel_precision(p: Scores, prior: Prior) -> Tensor:
    """1 / (2 sigma_j^2) of every memory position.  # [B, M]"""
    batch, memory = p.memory_key.shape[0], p.memory
    if isinstance(prior.sigma, Tensor):
        sigma = prior.sigma.flatten(1).float().expand(batch, memory)
    else:
        sigma = torch.full((batch, memory), float(prior.sigma), device=p.query_key.device)
    if isinstance(prior, KernelPrior) and prior.sigma_growth != 0:
        frames = memory // p.queries
        age = torch.arange(frames - 1, -1, -1, device=sigma.device).repeat_interleave(memory // frames)
        sigma = sigma * (1 + prior.sigma_growth * age)
    return (0.5 / sigma.square()).contiguous()
