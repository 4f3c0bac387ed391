# SPDX-License-Identifier: Apache-2.0
"""The definition of the identity embedding in plain torch: the convolution of the (one-hot) mask."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = 255


def one_hot(labels: Tensor, classes: int, dtype: torch.dtype) -> Tensor:  # [B, H, W] -> [B, N, H, W]
    ids = torch.arange(classes, device=labels.device, dtype=torch.int64)
    return (labels[:, None].long() == ids[:, None, None]).to(dtype)


def embed(mask: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int) -> Tensor:
    """Of soft masks (B, N, H, W), in float32 at least.  # [B, C, h, w]"""
    wide = torch.promote_types(torch.promote_types(mask.dtype, weight.dtype), torch.float32)
    start = None if bias is None else bias.to(wide)
    return F.conv2d(mask.to(wide), weight.to(wide), start, stride=stride, padding=padding)


def embed_labels(labels: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int) -> Tensor:
    """Of integer labels (B, H, W).  # [B, C, h, w]"""
    wide = torch.promote_types(weight.dtype, torch.float32)
    return embed(one_hot(labels, weight.shape[1], wide), weight, bias, stride, padding)


def check_labels(labels: Tensor, classes: int) -> None:
    """Raises ValueError for a label that is neither a class nor ignored."""
    wide = labels.long()
    wrong = wide[((wide < 0) | (wide >= classes)) & (wide != IGNORED)]
    if wrong.numel():
        raise ValueError(f"labels must be in [0, N = {classes}) or {IGNORED}, got {int(wrong[0])}")
