# SPDX-License-Identifier: Apache-2.0
"""The identity embedding as the published models compute it: a convolution of the one-hot mask."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def identity_embedding(
    labels: Tensor,  # [B, H, W]
    weight: Tensor,  # [C, N, kh, kw]
    bias: Tensor | None = None,  # [C]
    *,
    stride: int = 16,
    padding: int = 8,
) -> Tensor:
    """Compare the labels with every class, convolve the mask.

    Args, returns: as `vosops.identity_embedding` from labels.

    Note:
        Cost: 2 B h w N kh kw C operations, and memory for the one-hot mask.

    Source: AOT (eq. 1).
    """
    classes = torch.arange(weight.shape[1], device=labels.device)
    mask = (labels[:, None] == classes[:, None, None]).to(weight.dtype)  # [B, N, H, W]
    return F.conv2d(mask, weight, bias, stride=stride, padding=padding)
