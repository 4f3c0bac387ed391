# SPDX-License-Identifier: Apache-2.0
"""The definition of local attention in plain torch; every other backend is tested against it."""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..memory_read.reference import softmax
from .problem import Window


def local_attention(p: Window) -> Tensor:  # [B, Cv, H, W]
    dtypes = (tensor.dtype for tensor in p.tensors().values())
    wide = functools.reduce(torch.promote_types, dtypes, torch.float32)
    heads = {"query": p.query, "key": p.key, "value": p.value}
    q, k, v = (
        tensor.to(wide).unflatten(1, (p.num_heads, -1)) for tensor in heads.values()
    )  # [B, h, c, H, W]
    weights = softmax(_scores(p, q, k, wide).movedim(2, -1)).movedim(-1, 2)  # [B, h, window^2, H, W]
    read = torch.einsum("bhdyx,bhcdyx->bhcyx", weights, _windows(v, p))
    if p.relative_value is not None:
        read = read + torch.einsum("bhdyx,hcd->bhcyx", weights, p.relative_value.to(wide))
    return read.flatten(1, 2).to(p.value.dtype)


def _scores(p: Window, q: Tensor, k: Tensor, wide: torch.dtype) -> Tensor:  # [B, h, window^2, H, W]
    s = p.scale * torch.einsum("bhcyx,bhcdyx->bhdyx", q, _windows(k, p))
    if p.relative_bias is not None:
        s = s + p.relative_bias.to(wide)
    if p.relative_weight is not None:
        s = s + torch.einsum(
            "bhcyx,hdc->bhdyx", q, p.relative_weight.to(wide).unflatten(0, (p.num_heads, -1))
        )
    if p.relative_offset is not None:
        s = s + p.relative_offset.to(wide).view(p.num_heads, -1, 1, 1)
    inside = _windows(torch.ones_like(k[:1, :1, :1]), p)[:, :, 0] > 0
    return s.masked_fill(~inside, -math.inf)


def _windows(x: Tensor, p: Window) -> Tensor:
    """Every position's neighbours, 0 outside of the frame.  # [B, h, c, H, W] -> [B, h, c, window^2, H, W]"""
    reach = p.window // 2 * p.dilation
    height, width = x.shape[-2:]
    padded = F.pad(x, (reach,) * 4)
    shifts = [(i * p.dilation, j * p.dilation) for i in range(p.window) for j in range(p.window)]
    return torch.stack([padded[..., y : y + height, x_ : x_ + width] for y, x_ in shifts], 3)
