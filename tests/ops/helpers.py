# SPDX-License-Identifier: Apache-2.0
"""Random problems of the memory read, and what they are compared with."""

from __future__ import annotations

import torch
from torch import Tensor

import vosops
from vosops.ops.memory_read import reference
from vosops.ops.memory_read.problem import Scores, build_scores

VARIANTS = ("dot", "l2", "l2_shrinkage", "l2_selection", "l2_both")


def problem(
    variant: str = "dot",
    *,
    batch: int = 2,
    channels: int = 24,
    grid: tuple[int, int] = (5, 9),
    frames: int = 3,
    objects: int = 2,
    value_channels: int = 20,
    mask: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> dict[str, Tensor | str]:
    """Arguments of memory_read for one variant of the score."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    arguments: dict[str, Tensor | str] = {
        "query_key": randn(batch, channels, *grid),
        "memory_key": randn(batch, channels, frames, *grid),
        "memory_value": randn(batch, objects, value_channels, frames, *grid),
        "similarity": variant.split("_")[0],
    }
    if variant in ("l2_shrinkage", "l2_both"):
        arguments["shrinkage"] = 1 + randn(batch, 1, frames, *grid).square()
    if variant in ("l2_selection", "l2_both"):
        arguments["selection"] = randn(batch, channels, *grid).sigmoid()
    if mask:
        arguments["memory_mask"] = torch.rand(batch, frames, *grid, generator=generator) > 0.4
    return arguments


def widened(arguments: dict) -> dict:
    """The same problem in float64."""
    return {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in arguments.items()
    }


def score_arguments(arguments: dict) -> dict:
    return {name: value for name, value in arguments.items() if name != "memory_value"}


def scores64(arguments: dict, scale: float | None = None) -> Tensor:
    """Scores in float64, without a prior.  # [B, Q, M]"""
    return reference.scores(scores_of(widened(arguments), scale))


def scores_of(arguments: dict, scale: float | None = None) -> Scores:
    return build_scores(
        arguments["query_key"],
        arguments["memory_key"],
        arguments["similarity"],
        scale,
        arguments.get("shrinkage"),
        arguments.get("selection"),
        arguments.get("memory_mask"),
    )


def relative_error(result: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected magnitude."""
    scale = expected.double().abs().max().clamp(min=1e-300)
    return float((result.double() - expected.double()).abs().max() / scale)


def check_match(match: vosops.Match, scores: Tensor, top_k: int, band: float) -> None:
    """Indices may differ from the exact ones only among scores within `band` of the k-th best."""
    k = min(top_k, scores.shape[-1])
    assert match.indices.shape == (*scores.shape[:2], k)
    valid = match.indices >= 0
    picked = scores.gather(-1, match.indices.clamp(min=0))
    for row_scores, row, row_valid in zip(
        scores.flatten(0, 1), match.indices.flatten(0, 1), valid.flatten(0, 1), strict=True
    ):
        possible = int((row_scores > -torch.inf).sum())
        assert int(row_valid.sum()) == min(k, possible)
        chosen = row[row_valid]
        assert len(set(chosen.tolist())) == len(chosen), "a position was kept twice"
        if possible <= k:
            continue
        kth = row_scores.topk(k).values[-1]
        assert (row_scores[chosen] >= kth - band).all(), "kept a score below the k-th best"
        sure = (row_scores > kth + band).nonzero().flatten().tolist()
        assert set(sure) <= set(chosen.tolist()), "missed a score above the k-th best"
    weights = reference.softmax(picked.masked_fill(~valid, -torch.inf))
    torch.testing.assert_close(match.weights.double(), weights, rtol=0, atol=band)
