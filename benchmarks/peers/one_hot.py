# SPDX-License-Identifier: Apache-2.0
"""The identity embedding as published, a convolution of the one-hot mask, and its best plain form."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

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


def identity_embedding_bags(
    labels: Tensor,  # [B, H, W]
    weight: Tensor,  # [C, N, kh, kw]
    bias: Tensor | None = None,  # [C]
    *,
    stride: int = 16,
    padding: int = 8,
) -> Tensor:
    """Look up the weight that the label under every tap selects, and add: F.embedding_bag, no mask.

    Args, returns: as `vosops.identity_embedding` from labels; labels outside of 0 to N - 1 add nothing.

    Note:
        Cost: B h w kh kw rows of C, looked up in a transposed copy of `weight`; memory for their indices.
    """
    channels, classes, rows, columns = weight.shape
    outside = (labels < 0) | (labels >= classes)
    known = labels.long().masked_fill(outside, classes)  # one more class, of zeros
    padded = F.pad(known, (padding,) * 4, value=classes)
    windows = padded.unfold(1, rows, stride).unfold(2, columns, stride).flatten(3)  # [B, h, w, taps]
    taps = torch.arange(rows * columns, device=labels.device) * (classes + 1)
    table = F.pad(weight.permute(2, 3, 1, 0).flatten(0, 1), (0, 0, 0, 1)).flatten(0, 1)
    summed = F.embedding_bag((windows + taps).flatten(0, 2), table, mode="sum")
    result = summed if bias is None else summed + bias
    return result.view(*windows.shape[:3], channels).movedim(-1, 1)


def identity_embedding_compiled(
    labels: Tensor, weight: Tensor, bias: Tensor | None = None, **options: int
) -> Tensor:
    """`identity_embedding`, through torch.compile for these very shapes, without graph breaks.

    Args, returns: as `identity_embedding`.

    Note:
        The first call with new shapes or options compiles for some seconds.
    """
    return _compiled()(labels, weight, bias, **options)


@cache
def _compiled() -> Callable[..., Tensor]:
    return torch.compile(identity_embedding, dynamic=False, fullgraph=True)
