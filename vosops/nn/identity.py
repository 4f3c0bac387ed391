# SPDX-License-Identifier: Apache-2.0
"""What tells objects and places apart: the identity bank, and sine positions."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from vosops.ops.identity import identity_embedding

from .attention import as_tokens

STRIDE = 16


class IdentityBank(nn.Conv2d):
    """Identity embedding of a mask: every object takes one of the bank's identities, channel 0 is background.

    Parameters weight (channels, 1 + identities, kernel, kernel) and bias, as of the convolution of the
    one-hot mask that it stands for.

    Args:
        identities: objects that fit into one pass.
        channels: of the embedding.
        aligned: for maps of 16 n + 1 pixels (kernel 17, padding 8); otherwise 16 n (kernel 16).

    Source: AOT (Yang et al., NeurIPS 2021), eq. 1, patch-wise as its published code has it.
    """

    def __init__(self, identities: int = 10, channels: int = 256, *, aligned: bool = True) -> None:
        kernel = STRIDE + aligned
        super().__init__(1 + identities, channels, kernel, stride=STRIDE, padding=STRIDE // 2 * aligned)
        nn.init.orthogonal_(self.weight.view(channels, -1), gain=kernel**-2)

    def forward(self, mask: Tensor) -> Tensor:
        """Tokens (B, h * w, channels) of labels (B, H, W) integers (255 ignored), or soft masks
        (B, 1 + identities, H, W)."""
        padding = self.padding[0]
        assert isinstance(padding, int)
        return as_tokens(identity_embedding(mask, self.weight, self.bias, stride=STRIDE, padding=padding))


def sine_position(size: tuple[int, int], channels: int, device: torch.device) -> Tensor:
    """Position of every cell (1, h * w, channels): the first half of the channels tells y, the second x.

    Coordinates run from 0 to 2 pi; frequencies 10000 ** (-2 i / (channels / 2)), sine and cosine in turn.

    Args:
        size: (h, w) of the map.
        channels: a multiple of 4.

    Source: DETR (Carion et al., ECCV 2020), normalised positions; AOT.
    """
    half = channels // 2
    step = 10000 ** (2 * (torch.arange(half, device=device) // 2) / half)
    halves = []
    for length in size:
        place = torch.arange(length, dtype=torch.float32, device=device)
        phase = (place / (length - 1 + 1e-6) * (2 * math.pi))[:, None] / step  # [length, half]
        halves.append(torch.stack((phase[:, 0::2].sin(), phase[:, 1::2].cos()), 2).flatten(1))
    y, x = halves
    grid = (y[:, None].expand(*size, half), x[None].expand(*size, half))
    return torch.cat(grid, 2).flatten(0, 1)[None]
