# SPDX-License-Identifier: Apache-2.0
"""What a model in training can do already: J on clips held out, and pictures of what it predicts."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from vosops.data import davis_palette, overlay
from vosops.evaluation import region_similarity

from .clips import Clip
from .config import HeldOutConfig
from .dataset import build_dataset

_SEED = 20_260_101  # held-out clips are the same in every run


def first_masks(labels: Tensor, objects: int) -> Tensor:
    """Float masks (B, O, H, W) of the objects 1..O in labels (B, T, H, W) of their first frames."""
    ids = torch.arange(1, objects + 1, device=labels.device)[:, None, None]
    return (labels[:, :1] == ids).float()


class HeldOut:
    """Mean J of the objects of a few clips that training never sees.

    Args:
        config: which clips.
        crop, max_objects: as of the training's clips.

    Raises:
        DataError: a source that cannot be used.

    Note:
        Cost: a forward pass of every clip, and its decoding.
    """

    def __init__(self, config: HeldOutConfig, *, crop: int, max_objects: int) -> None:
        self._clips = config.clips
        self._dataset = build_dataset(
            config.data, frames=config.frames, crop=crop, max_objects=max_objects, seed=_SEED
        )

    @torch.no_grad()
    def score(self, model: nn.Module, state: Mapping[str, Tensor] | None, device: torch.device) -> float:
        """Mean J over objects, frames (but the first) and clips, in [0, 1].

        Args:
            model: is in evaluation mode meanwhile.
            state: weights to use in place of the model's own, such as their average.
            device: of the model.
        """
        training = model.training
        model.eval()
        scores = [self._score(model, state, self._dataset[i], device) for i in range(self._clips)]
        model.train(training)
        return float(np.mean(scores))

    def _score(
        self, model: nn.Module, state: Mapping[str, Tensor] | None, clip: Clip, device: torch.device
    ) -> float:
        frames, labels = clip.frames[None].to(device), clip.labels[None].to(device)
        arguments = (frames, first_masks(labels, clip.objects))
        if state is None:
            logits = model(*arguments)
        else:
            logits = torch.func.functional_call(model, dict(state), arguments)
        found = logits[0].argmax(1).cpu().numpy()  # [T - 1, H, W]
        truth = clip.labels[1:].numpy()
        found = np.where(truth == 255, 0, found)
        ids = range(1, clip.objects + 1)
        return float(np.mean([region_similarity(truth == i, found == i) for i in ids]))


def contact_sheet(frames: Tensor, labels: Tensor, predicted: Tensor) -> NDArray[np.uint8]:
    """A picture of clips: for each a row of frames with their labels, and one below with what was predicted.

    Args:
        frames: (B, T, 3, H, W) in [0, 1].
        labels: (B, T, H, W) uint8.
        predicted: (B, T - 1, H, W) integer labels of the frames after the first.

    Returns:
        (2 B H, T W, 3) uint8 RGB.
    """
    palette = davis_palette()
    pixels = (frames.detach().cpu() * 255).round().byte().permute(0, 1, 3, 4, 2).numpy()
    truth = labels.cpu().numpy()
    below = np.concatenate((truth[:, :1], predicted.cpu().numpy().astype(np.uint8)), 1)
    rows = []
    for clip, *maps in zip(pixels, truth, below, strict=True):
        for row in maps:
            shown = [overlay(frame, mask, palette) for frame, mask in zip(clip, row, strict=True)]
            rows.append(np.concatenate(shown, 1))
    return np.concatenate(rows)
