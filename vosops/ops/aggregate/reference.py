# SPDX-License-Identifier: Apache-2.0
"""The definition of soft aggregation in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

EPSILON = 1e-7


def soft_aggregate(probabilities: Tensor) -> Tensor:  # [B, O, ...] -> [B, O + 1, ...]
    wide = probabilities.to(torch.promote_types(probabilities.dtype, torch.float32))
    background = (1 - wide).prod(1, keepdim=True)
    clamped = torch.cat((background, wide), 1).clamp(EPSILON, 1 - EPSILON)
    return (clamped / (1 - clamped)).log().to(probabilities.dtype)
