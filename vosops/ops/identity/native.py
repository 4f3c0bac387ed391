# SPDX-License-Identifier: Apache-2.0
"""The identity embedding of labels on the compiled operators of schema.py."""

from __future__ import annotations

import torch
from torch import Tensor

from . import schema  # noqa: F401  (defines the operators)

_SERVED = (torch.uint8, torch.int32, torch.int64)


def embed_labels(labels: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int) -> Tensor:
    if labels.dtype not in _SERVED:
        labels = labels.to(torch.int32)
    start = None if bias is None else bias.float().contiguous()
    result: Tensor = torch.ops.vosops.identity_embedding(labels, weight, start, stride, padding)
    return result
