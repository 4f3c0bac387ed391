# SPDX-License-Identifier: Apache-2.0
"""The memory read's operators in Triton: one function per operator of schema.py, with its arguments."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..backward import scores_from
from . import best_query, dense, dense_backward, gather, match

_SCORES = 9  # leading arguments of every operator that computes scores


def memory_match(*arguments: Any) -> tuple[Tensor, Tensor]:
    return match.match(scores_from(*arguments[:_SCORES]), arguments[_SCORES])


def memory_read_dense(*arguments: Any) -> tuple[Tensor, Tensor]:
    return dense.read(scores_from(*arguments[:_SCORES]), arguments[_SCORES])


def memory_usage(*arguments: Any) -> Tensor:
    return dense.usage(scores_from(*arguments[:_SCORES]), arguments[_SCORES])


def memory_best_query(
    query_key: Tensor,
    memory_key: Tensor,
    shrinkage: Tensor | None,
    selection: Tensor | None,
    memory_mask: Tensor | None,
    l2: bool,
    scale: float,
    log_prior: Tensor | None,
    gain: Tensor | None,
    window: int,
) -> Tensor:
    p = scores_from(query_key, memory_key, shrinkage, selection, memory_mask, None, None, l2, scale)
    return best_query.best_query(p, log_prior, gain, window)


def memory_read_dense_backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return dense_backward.backward(scores_from(*arguments[:_SCORES]), *arguments[_SCORES:])


memory_gather = gather.gather
memory_gather_backward = gather.gather_backward
