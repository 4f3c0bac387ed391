# SPDX-License-Identifier: Apache-2.0
"""The identity embedding of labels on the operators of schema.py: compiled (C++) or Triton."""

from __future__ import annotations

import torch
from torch import Tensor

from ..families import operator
from . import schema  # noqa: F401  (defines the operators)

_SERVED = (torch.uint8, torch.int32, torch.int64)


def embed_labels(
    labels: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int, family: str
) -> Tensor:
    if labels.dtype not in _SERVED:
        labels = labels.to(torch.int32)
    start = None if bias is None else bias.float().contiguous()
    result: Tensor = operator(family, "identity_embedding")(labels, weight, start, stride, padding)
    return result
