# SPDX-License-Identifier: Apache-2.0
"""Small clips for STM and the models built on it."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from vosops.models.session import Session
from vosops.models.stm import STM
from vosops.propagate.tracker import Tracker

from .weights import fill

CONFIG = {
    "gain": 1.1,
    "boost": {},
    "keep": ["Encoder_M.mean", "Encoder_M.std", "Encoder_Q.mean", "Encoder_Q.std"],
}


def filled(model: STM) -> STM:
    """The golden files' weights, which make a mask of 0 and one of 1 differ, unlike random ones."""
    return fill(model, CONFIG)


def clip(frames: int, height: int = 48, width: int = 80, seed: int = 0) -> Tensor:
    """Smooth random frames in [0, 1].  # [T, 3, H, W]"""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(frames, 3, height // 8, width // 8, generator=generator)
    return torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear", align_corners=False)


def boxes(objects: int, height: int = 48, width: int = 80) -> Tensor:
    """Masks of objects, one-hot with the background first.  # [1, 1 + O, H, W]"""
    masks = torch.zeros(1, 1 + objects, height, width)
    for i in range(objects):
        top, left = 4 + 3 * (i % 8), 6 + (11 * i) % (width - 24)
        masks[:, :, top : top + 16, left : left + 12] = 0
        masks[:, 1 + i, top : top + 16, left : left + 12] = 1
    masks[:, 0] = 1 - masks[:, 1:].sum(1)
    return masks


@torch.no_grad()
def run(session: Session, frames: Tensor, masks: Tensor, ids: Sequence[int]) -> Iterator[Tensor]:
    """Probabilities of frames 1 and on, each before the next is encoded."""
    features, probabilities = session.encode(frames[:1]), masks
    for t in range(1, len(frames)):
        session.remember(t - 1, frames[t - 1 : t], features, probabilities, ids, given=t == 1)
        features = session.encode(frames[t : t + 1])
        probabilities = session.segment(features)
        yield probabilities


def pictures(frames: Tensor) -> list[np.ndarray]:
    """Frames (H, W, 3) uint8, as a Tracker takes them."""
    return list((frames * 255).byte().permute(0, 2, 3, 1).numpy())


def labels(masks: Tensor, ids: Sequence[int]) -> np.ndarray:
    """Label map of one-hot masks (1, 1 + O, H, W)."""
    return np.asarray([0, *ids])[masks[0].argmax(0).numpy()]


def check_resume(make: Callable[[], Tracker], frames: Tensor, masks: Tensor, ids: Sequence[int]) -> None:
    """A tracker that takes a state goes on with the same bits."""
    images = pictures(frames)
    first = make()
    first.add(images[0], labels(masks, ids))
    half = len(images) // 2
    for image in images[1:half]:
        first.step(image)
    saved, second = io.BytesIO(), make()
    torch.save(first.state_dict(), saved)
    saved.seek(0)
    second.load_state_dict(torch.load(saved, weights_only=True))
    for image in images[half:]:
        torch.testing.assert_close(first.step(image), second.step(image), rtol=0, atol=0)
    assert first.memory_nbytes >= second.memory_nbytes > 0
