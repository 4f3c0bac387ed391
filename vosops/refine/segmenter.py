# SPDX-License-Identifier: Apache-2.0
"""Refinement as a part of segmentation: what a refiner is, and a segmenter whose masks go through one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vosops.models.session import check_saved
from vosops.propagate.run import VideoSegmenter

Frame = NDArray[np.uint8]


class Refiner(Protocol):
    """What corrects the masks of a frame against its image; `BoundaryRefiner` and `FrameRefiner` do."""

    @property
    def settings(self) -> dict[str, Any]:
        """What it is, weights included, as plain values: refiners with equal settings give equal results."""

    def __call__(self, frame: Frame, probabilities: Tensor) -> Tensor:
        """Refines the probabilities of a frame.

        Args:
            frame: (H, W, 3) uint8 RGB.
            probabilities: (1 + O, H, W) float32, background first, summing to 1.

        Returns:
            The same, refined; a new tensor, or `probabilities` itself where nothing is to be refined.
        """


class RefinedSegmenter:
    """A segmenter whose probabilities go through a refiner. It is a `VideoSegmenter` itself.

    Refinement comes after the segmenter: what that remembers are its own masks, so a wrong correction in one
    frame does no harm to the next, and refining changes no later frame.

    Args:
        segmenter: any, new or in the middle of a video.
        refiner: any.

    Note:
        Cost: the segmenter's and the refiner's; no memory of its own.

    Example:
        >>> segmenter = RefinedSegmenter(Tracker(model), BoundaryRefiner.load())
    """

    def __init__(self, segmenter: VideoSegmenter, refiner: Refiner) -> None:
        if not callable(getattr(segmenter, "step", None)):
            raise TypeError(f"segmenter must be a VideoSegmenter, got {type(segmenter).__name__}")
        if not callable(refiner):
            raise TypeError(f"refiner must be a Refiner, got {type(refiner).__name__}")
        self._segmenter: Any = segmenter
        self._refiner = refiner

    @property
    def object_ids(self) -> list[int]:
        """Ids of the objects, in the order of channels 1..O."""
        return list(self._segmenter.object_ids)

    @property
    def memory_nbytes(self) -> int:
        """Bytes of memory that the segmenter has allocated (for segmenters that tell, like `Tracker`)."""
        return int(self._segmenter.memory_nbytes)

    def add(self, frame: Frame, mask: NDArray[Any]) -> None:
        """Takes a frame with its mask, as the segmenter's own `add`."""
        self._segmenter.add(frame, mask)

    def step(self, frame: Frame) -> Tensor:
        """Segments the next frame and refines its masks.

        Args:
            frame: (H, W, 3) uint8 RGB.

        Returns:
            (1 + O, H, W) probabilities, background first.

        Raises:
            What the segmenter raises.
        """
        return self._refiner(frame, self._segmenter.step(frame))

    def remove(self, object_ids: Iterable[int]) -> None:
        """Forgets objects, for segmenters that can (`Tracker.remove`).

        Raises:
            TypeError: the segmenter has no `remove`; and what that raises.
        """
        if not hasattr(self._segmenter, "remove"):
            raise TypeError(f"{type(self._segmenter).__name__} cannot remove objects")
        self._segmenter.remove(object_ids)

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on exactly: the segmenter's state, and what refines."""
        return {"refiner": self._refiner.settings, "segmenter": self._segmenter.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes a state back, in a new object with the same segmenter and refiner.

        Raises:
            ValueError: the refiner's settings or weights differ; nothing has changed.
        """
        check_saved(state, {"refiner": self._refiner.settings})
        self._segmenter.load_state_dict(state["segmenter"])


def combine(objects: Tensor) -> Tensor:
    """Probabilities (1 + O, ...), background first, from those of objects (O, ...) that were refined apart.

    The background is what no object claims, the product of 1 - p; then all are divided by their sum, which is
    at least 1. One object keeps its probability.

    Source: the soft aggregation of STM (Oh et al., ICCV 2019), on probabilities in place of odds.
    """
    found = torch.cat(((1 - objects).prod(0, keepdim=True), objects))
    return found / found.sum(0)


def check_frame(frame: Frame, probabilities: Tensor) -> None:
    """Checks the arguments of a refiner.

    Raises:
        TypeError, ValueError: names the argument at fault.
    """
    if not isinstance(frame, np.ndarray) or frame.dtype != np.uint8:
        got = str(frame.dtype) if isinstance(frame, np.ndarray) else type(frame).__name__
        raise TypeError(f"frame must be an array (H, W, 3) uint8 RGB, got {got}")
    if frame.ndim != 3 or frame.shape[2] != 3:
        raise ValueError(f"frame must have shape (H, W, 3), RGB, got {list(frame.shape)}")
    if not isinstance(probabilities, Tensor) or probabilities.dtype != torch.float32:
        got = str(probabilities.dtype) if isinstance(probabilities, Tensor) else type(probabilities).__name__
        raise TypeError(f"probabilities must be a float32 tensor (1 + O, H, W), got {got}")
    if probabilities.dim() != 3 or tuple(probabilities.shape[1:]) != frame.shape[:2]:
        expected = ["1 + O", *frame.shape[:2]]
        raise ValueError(f"probabilities must have shape {expected}, got {list(probabilities.shape)}")
