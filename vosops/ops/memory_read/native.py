# SPDX-License-Identifier: Apache-2.0
"""The compiled backend: the same four functions as reference.py, on the operators of schema.py."""

from __future__ import annotations

import torch
from torch import Tensor

from .problem import Scores
from .schema import scores_arguments

_ops = torch.ops.vosops


def match(p: Scores, top_k: int) -> tuple[Tensor, Tensor]:
    return _ops.memory_match(*scores_arguments(p), top_k)  # type: ignore[no-any-return]


def gather(indices: Tensor, weights: Tensor, value: Tensor, dtype: torch.dtype) -> Tensor:
    return _ops.memory_gather(indices.contiguous(), weights.contiguous(), value).to(dtype)  # type: ignore[no-any-return]


def read(p: Scores, value: Tensor, dtype: torch.dtype, return_usage: bool) -> tuple[Tensor, Tensor | None]:
    result, lse = _ops.memory_read_dense(*scores_arguments(p), value)
    with torch.no_grad():
        usage = _ops.memory_usage(*scores_arguments(p), lse) if return_usage else None
    return result.to(dtype), usage


def best_query(p: Scores, log_prior: Tensor | None, gain: Tensor | None) -> Tensor:
    *tensors, _, _, l2, scale = scores_arguments(p)
    best: Tensor = _ops.memory_best_query(*tensors, l2, scale, log_prior, gain, p.window or 0)
    return best
