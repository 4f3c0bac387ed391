# SPDX-License-Identifier: Apache-2.0
"""Objects that enter a video later, as YouTube-VOS gives them: their masks come with the frames."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vosops.data.masks import LabelMap, object_ids
from vosops.propagate.run import VideoSegmenter


class LateObjects:
    """A segmenter that is given masks of new objects when their frames come. It is a `VideoSegmenter` itself.

    On a frame with a given mask the segmenter steps, takes the mask (`add`), and the result holds the new
    objects as given: other objects and the background keep what is left.

    Args:
        segmenter: of the video.
        masks: number of a frame, counted from the one of the first `add`, to its label map (H, W) uint8 of
            the objects that enter on it, 0 elsewhere. Of another size than the frames, it is resized to the
            nearest label.

    Raises:
        ValueError: a mask of a frame before the second, or without an object.

    Note:
        Cost: the segmenter's; a pass over the probabilities on frames with a mask.
    """

    def __init__(self, segmenter: VideoSegmenter, masks: Mapping[int, LabelMap]) -> None:
        for frame, labels in masks.items():
            if frame < 1 or not object_ids(labels):
                raise ValueError(
                    f"masks must hold objects, on frames from 1 on; got frame {frame} with objects "
                    f"{object_ids(labels)}"
                )
        self._segmenter, self._masks, self._frame = segmenter, dict(masks), 0

    @property
    def object_ids(self) -> list[int]:
        """Ids of the objects known so far, in the order of channels 1..O."""
        return self._segmenter.object_ids

    def add(self, frame: NDArray[np.uint8], mask: NDArray[Any]) -> None:
        """As the segmenter's own."""
        self._segmenter.add(frame, mask)

    def step(self, frame: NDArray[np.uint8]) -> Tensor:
        """Probabilities (1+O, H, W) of the next frame, the objects that enter on it included.

        Raises:
            ValueError: objects of the frame's mask vanish at the frame's size; and what the segmenter raises.
        """
        given = self._masks.get(self._frame + 1)
        if given is not None:
            given = _resized(given, frame.shape[:2], self._frame + 1)
        found = self._segmenter.step(frame)
        if given is not None:
            known = self._segmenter.object_ids
            self._segmenter.add(frame, given)
            labels = torch.from_numpy(given.astype(np.int64)).to(found.device)
            channels = dict(zip((0, *known), found * (labels == 0), strict=True))
            channels |= {i: (labels == i).to(found.dtype) for i in object_ids(given)}
            found = torch.stack([channels[i] for i in (0, *self._segmenter.object_ids)])
        self._frame += 1
        return found

    def state_dict(self) -> dict[str, Any]:
        """The segmenter's state and the number of the last frame."""
        return {
            "masks": sorted(self._masks),
            "frame": self._frame,
            "segmenter": self._segmenter.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes a state back, in a new object with the same segmenter and masks.

        Raises:
            ValueError: masks on other frames; nothing has changed.
        """
        if list(state["masks"]) != sorted(self._masks):
            raise ValueError(
                f"state was saved with masks on frames {state['masks']}, this segmenter has "
                f"{sorted(self._masks)}"
            )
        self._segmenter.load_state_dict(state["segmenter"])
        self._frame = int(state["frame"])


def _resized(labels: LabelMap, size: tuple[int, ...], frame: int) -> LabelMap:
    if labels.shape == tuple(size):
        return labels
    small = np.asarray(cv2.resize(labels, size[::-1], interpolation=cv2.INTER_NEAREST_EXACT), np.uint8)
    lost = sorted(set(object_ids(labels)) - set(object_ids(small)))
    if lost:
        raise ValueError(f"frame number {frame}: objects {lost} of its mask vanish at size {list(size)}")
    return small
