# SPDX-License-Identifier: Apache-2.0
"""The same four functions as reference.py, on the operators of schema.py: compiled (C++, CUDA) or Triton."""

from __future__ import annotations

import torch
from torch import Tensor

from ..families import operator
from .problem import Scores
from .schema import scores_arguments


class Kernels:
    """The functions of one family of operators.

    Args:
        family: "" for the compiled libraries, "triton_" for Triton.
    """

    def __init__(self, family: str) -> None:
        self.family = family

    def match(self, p: Scores, top_k: int) -> tuple[Tensor, Tensor]:
        return operator(self.family, "memory_match")(*scores_arguments(p), top_k)  # type: ignore[no-any-return]

    def gather(self, indices: Tensor, weights: Tensor, value: Tensor, dtype: torch.dtype) -> Tensor:
        read = operator(self.family, "memory_gather")(indices.contiguous(), weights.contiguous(), value)
        return read.to(dtype)  # type: ignore[no-any-return]

    def read(
        self, p: Scores, value: Tensor, dtype: torch.dtype, return_usage: bool
    ) -> tuple[Tensor, Tensor | None]:
        result, lse = operator(self.family, "memory_read_dense")(*scores_arguments(p), value)
        usage = None
        if return_usage:
            with torch.no_grad():
                usage = operator(self.family, "memory_usage")(*scores_arguments(p), lse)
        return result.to(dtype), usage

    def best_query(self, p: Scores, log_prior: Tensor | None, gain: Tensor | None) -> Tensor:
        *tensors, _, _, l2, scale = scores_arguments(p)
        best: Tensor = operator(self.family, "memory_best_query")(
            *tensors, l2, scale, log_prior, gain, p.window or 0
        )
        return best
