# SPDX-License-Identifier: Apache-2.0
"""What any propagation must beat: the first mask copied, and the previous mask moved by optical flow.

Both follow the protocol of `LabelPropagator`: add, step, object_ids, state_dict.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .motion import dense_flow, warp_back

Frame = NDArray[np.uint8]


class CopyFirstMask:
    """Every frame has the first frame's mask: what standing still scores."""

    def __init__(self) -> None:
        self._object_ids: list[int] = []
        self._probabilities: Tensor | None = None

    @property
    def object_ids(self) -> list[int]:
        """Ids of the objects, ascending, in the order of channels 1..O."""
        return list(self._object_ids)

    def add(self, frame: Frame, mask: NDArray[Any]) -> None:
        """Takes the first frame's mask; a later one replaces all objects.

        Args:
            frame: (H, W, 3) uint8 RGB.
            mask: (H, W) integer ids, 0 background, 255 void (taken as background).

        Raises:
            ValueError: the sizes differ, or the mask holds no object.
        """
        size, got = list(frame.shape[:2]), list(mask.shape)
        if size != got:
            raise ValueError(f"mask must have the frame's size {size}, got {got}")
        ids = [int(i) for i in np.unique(mask) if i not in (0, 255)]
        if not ids:
            raise ValueError("mask must hold at least one object (an id other than 0 and 255), got none")
        masks = torch.stack([torch.from_numpy(mask == i).float() for i in ids])
        self._object_ids = ids
        self._probabilities = torch.cat((1 - masks.sum(0, keepdim=True), masks))

    def step(self, frame: Frame) -> Tensor:
        """(1 + O, H, W) float32: the first mask, background first.

        Raises:
            RuntimeError: no mask was added yet.
        """
        if self._probabilities is None:
            raise RuntimeError("step needs objects to follow: call add(frame, mask) with the first frame")
        return self._probabilities.clone()

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on exactly: tensors and plain values."""
        found = self._probabilities
        return {
            "object_ids": list(self._object_ids),
            "probabilities": None if found is None else found.clone(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes a state back, exactly."""
        found = state["probabilities"]
        self._object_ids = list(state["object_ids"])
        self._probabilities = None if found is None else found.clone()


class WarpPreviousMask(CopyFirstMask):
    """Every frame has the previous frame's soft mask, moved by dense optical flow (`motion.dense_flow`)."""

    def __init__(self) -> None:
        super().__init__()
        self._frame: Frame | None = None

    def add(self, frame: Frame, mask: NDArray[Any]) -> None:
        """Takes a frame and its mask, as `CopyFirstMask.add`."""
        super().add(frame, mask)
        self._frame = frame.copy()

    def step(self, frame: Frame) -> Tensor:
        """(1 + O, H, W) float32: the previous probabilities where the flow to the previous frame leads.

        Raises:
            RuntimeError: no mask was added yet.

        Note:
            Cost: one flow, and one bilinear warp per object.
        """
        previous = super().step(frame)
        assert self._frame is not None
        flow = dense_flow(frame, self._frame)
        warped = [warp_back(np.ascontiguousarray(p.numpy(), np.float32), flow) for p in previous.unbind(0)]
        self._probabilities = torch.from_numpy(np.stack(warped))
        self._frame = frame.copy()
        return self._probabilities.clone()

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on exactly: tensors and plain values."""
        frame = None if self._frame is None else torch.from_numpy(self._frame.copy())
        return {**super().state_dict(), "frame": frame}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes a state back, exactly."""
        frame = state["frame"]
        super().load_state_dict(state)
        self._frame = None if frame is None else frame.numpy().copy()
