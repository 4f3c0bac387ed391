# SPDX-License-Identifier: Apache-2.0
"""Networks whose result is known: what refining does around them can be told exactly."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from vosops.refine.network import PatchNetwork

SURE = 9.0  # logit of what they find


class Known(PatchNetwork):
    """Has a weight, as networks do, that counts for nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))


class Bright(Known):
    """Finds the object where the image is bright, whatever the mask."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[int] = []

    def refine(self, images: Tensor, masks: Tensor) -> Tensor:
        self.batches.append(len(images))
        return (2 * (images[:, :1] > 0.5).float() - 1) * SURE


class Same(Known):
    """Finds what the mask says."""

    def refine(self, images: Tensor, masks: Tensor) -> Tensor:
        return (2 * masks - 1) * SURE


def disk(height: int, width: int, row: float, column: float, radius: float) -> np.ndarray:
    """A mask (H, W) uint8."""
    rows, columns = np.mgrid[:height, :width]
    return ((rows - row) ** 2 + (columns - column) ** 2 <= radius**2).astype(np.uint8)


def picture(*masks: np.ndarray) -> np.ndarray:
    """A frame, bright where any of the masks is."""
    bright = np.where(np.any(masks, axis=0), 230, 20).astype(np.uint8)
    return np.repeat(bright[..., None], 3, 2)


def certain(*masks: np.ndarray, sure: float = 0.9) -> Tensor:
    """Probabilities (1 + O, H, W) of masks that do not overlap."""
    objects = torch.from_numpy(np.stack(masks)).float() * sure
    return torch.cat((1 - objects.sum(0, keepdim=True), objects))
