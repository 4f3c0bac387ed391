# SPDX-License-Identifier: Apache-2.0
"""KMN: Kernelized Memory Network for Video Object Segmentation (Seong, Hyun, Kim, ECCV 2020)."""

from __future__ import annotations

import torch
from torch import Tensor

from vosops.ops.priors import KernelPrior

from .encoders import IMAGENET_MEAN
from .stm import STM


class KMN(STM):
    """STM whose reads in a session are weighted by a Gaussian around each memory position's best query.

    The network, its parameters and its training are STM's: the argmax behind the Gaussian's centre has no
    gradient, so the kernel belongs to inference only.

    Args:
        sigma: standard deviation of the Gaussian in cells of the stride-16 grid; 7 in the paper.

    Raises:
        ValueError: sigma is not above 0.

    Note:
        Cost beside STM's: a second pass over the scores, 2 Q M 128 operations per object and frame.
    """

    def __init__(self, sigma: float = 7.0) -> None:
        if not sigma > 0:
            raise ValueError(f"sigma must be above 0, in cells of the stride-16 grid, got {sigma}")
        super().__init__()
        self.kernel = KernelPrior(sigma=sigma)


def hide_and_seek(
    frames: Tensor,  # [B, T, 3, H, W]
    masks: Tensor,  # [B, T, O, H, W]
    *,
    cell: int = 32,
    probability: float = 0.5,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Hides grid cells at random, in frames and masks alike: KMN's training data of occluded objects.

    Every frame of a clip is cut into cells of `cell` pixels a side (the last row and column may be
    smaller), each of which is hidden independently of all others. A hidden cell has ImageNet's mean colour
    and no object.

    Args:
        frames: (B, T, 3, H, W) float in [0, 1], RGB.
        masks: (B, T, O, H, W) float or bool, of the objects without the background.
        cell: side of a cell in pixels.
        probability: of a cell to be hidden.
        generator: on the frames' device; torch's default without one.

    Returns:
        New frames and masks of the same shapes and dtypes; the arguments stay as they are.

    Raises:
        TypeError, ValueError: a bad argument, named.

    Source: Singh and Lee, Hide-and-Seek, ICCV 2017, which KMN applies to its pre-training on still images.
        The probability is that of Hide-and-Seek, the cell lies among its sizes; KMN's own are not known here.
    """
    if frames.dim() != 5 or frames.shape[2] != 3 or not frames.is_floating_point():
        raise ValueError(
            f"frames must be floating-point of shape (B, T, 3, H, W), got {frames.dtype} {list(frames.shape)}"
        )
    batch, time, _, height, width = frames.shape
    if masks.dim() != 5 or masks.shape[:2] != frames.shape[:2] or masks.shape[3:] != frames.shape[3:]:
        expected = [batch, time, "O", height, width]
        raise ValueError(f"masks must have shape (B, T, O, H, W) = {expected}, got {list(masks.shape)}")
    if isinstance(cell, bool) or not isinstance(cell, int):
        raise TypeError(f"cell must be an integer, got {type(cell).__name__}")
    if cell < 1:
        raise ValueError(f"cell must be at least 1 pixel, got {cell}")
    if not 0 <= probability <= 1:
        raise ValueError(f"probability must lie in [0, 1], got {probability}")
    grid = (-(-height // cell), -(-width // cell))
    drawn = torch.rand(batch, time, 1, *grid, generator=generator, device=frames.device)
    hidden = (drawn < probability).repeat_interleave(cell, -2).repeat_interleave(cell, -1)
    hidden = hidden[..., :height, :width]  # [B, T, 1, H, W]
    mean = frames.new_tensor(IMAGENET_MEAN).view(3, 1, 1)
    return torch.where(hidden, mean, frames), masks.masked_fill(hidden, 0)
