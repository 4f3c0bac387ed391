# SPDX-License-Identifier: Apache-2.0
"""What training data are: a clip with the objects of its first frame, and a batch of clips."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from torch import Tensor

from vosops.data.masks import VOID


class DataError(ValueError):
    """Training data that cannot be used; the message names the file or folder and says why."""


@dataclass(frozen=True)
class Clip:
    """A training clip. Every object is in sight in the first frame.

    Attributes:
        frames: (T, 3, H, W) float32 in [0, 1], RGB.
        labels: (T, H, W) uint8: 0 background, 1..O objects, 255 void (no loss there).
        objects: O, at least 1; ids are consecutive.
        name: where it comes from, for logs.
    """

    frames: Tensor
    labels: Tensor
    objects: int
    name: str


@dataclass(frozen=True)
class Batch:
    """Clips of one length and size, stacked.

    Attributes:
        frames: (B, T, 3, H, W) float32 in [0, 1], RGB.
        labels: (B, T, H, W) uint8, as in `Clip`.
        objects: (B,) int64, the number of objects of each clip.
        names: B names.
    """

    frames: Tensor
    labels: Tensor
    objects: Tensor
    names: tuple[str, ...]

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory; what `DataLoader(pin_memory=True)` calls."""
        return Batch(
            self.frames.pin_memory(), self.labels.pin_memory(), self.objects.pin_memory(), self.names
        )


def collate(clips: Sequence[Clip]) -> Batch:
    """Stacks clips: the `collate_fn` of a DataLoader.

    Args:
        clips: at least one, all of one length and size.

    Raises:
        ValueError: no clips, or clips of different shapes; names the two clips.
    """
    if not clips:
        raise ValueError("clips must hold at least one clip, got none")
    first = clips[0]
    for clip in clips[1:]:
        if clip.frames.shape != first.frames.shape:
            raise ValueError(
                f"clips must have one shape (T, 3, H, W), got {list(first.frames.shape)} ({first.name}) "
                f"and {list(clip.frames.shape)} ({clip.name})"
            )
    return Batch(
        torch.stack([clip.frames for clip in clips]),
        torch.stack([clip.labels for clip in clips]),
        torch.tensor([clip.objects for clip in clips]),
        tuple(clip.name for clip in clips),
    )


def first_frame_objects(
    labels: Tensor, *, max_objects: int, min_pixels: int, rng: np.random.Generator
) -> tuple[Tensor, int]:
    """Keeps the objects that the first frame shows, renumbered 1..O in random order.

    An object is one that the first frame shows with at least `min_pixels`. What it shows with fewer becomes
    void in every frame: a model that is given a sliver can neither be blamed for following it nor for not
    doing so. What appears later, and what exceeds `max_objects`, was not asked for: background.

    Args:
        labels: (T, H, W) uint8; 0 background, 255 void, any other ids.
        max_objects: most objects to keep; which ones is random.
        min_pixels: of an object in the first frame.
        rng: draws the order.

    Returns:
        New labels (T, H, W) and O, which may be 0.
    """
    counts = np.bincount(labels[0].numpy().ravel(), minlength=256)
    counts[0] = counts[VOID] = 0
    table = np.zeros(256, np.uint8)
    table[(counts > 0) & (counts < min_pixels)] = VOID
    table[VOID] = VOID
    kept = rng.permutation(np.flatnonzero(counts >= max(min_pixels, 1)))[:max_objects]
    table[kept] = np.arange(1, len(kept) + 1, dtype=np.uint8)
    return torch.from_numpy(cv2.LUT(labels.numpy(), table)), len(kept)
