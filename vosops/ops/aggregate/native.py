# SPDX-License-Identifier: Apache-2.0
"""The compiled backend of soft aggregation."""

from __future__ import annotations

import torch
from torch import Tensor

from . import schema  # noqa: F401  defines the operator


def soft_aggregate(probabilities: Tensor) -> Tensor:
    logits: Tensor = torch.ops.vosops.soft_aggregate(probabilities)
    shape = (logits.shape[0], logits.shape[1], *probabilities.shape[2:])
    return logits.view(shape).to(probabilities.dtype)
