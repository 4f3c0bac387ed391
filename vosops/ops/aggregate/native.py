# SPDX-License-Identifier: Apache-2.0
"""Soft aggregation on the operators of schema.py: compiled (C++) or Triton."""

from __future__ import annotations

from torch import Tensor

from ..families import operator
from . import schema  # noqa: F401  defines the operators


def soft_aggregate(probabilities: Tensor, family: str) -> Tensor:
    logits: Tensor = operator(family, "soft_aggregate")(probabilities)
    shape = (logits.shape[0], logits.shape[1], *probabilities.shape[2:])
    return logits.view(shape).to(probabilities.dtype)
