# SPDX-License-Identifier: Apache-2.0
"""Test-time augmentation: a video segmented at several scales and mirrored, the probabilities averaged."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from .run import VideoSegmenter

Frame = NDArray[np.uint8]

_VOID = 255
_SMALLEST = 16  # pixels a side


@dataclass(frozen=True)
class _Variant:
    """One way to look at a video."""

    scale: float
    mirrored: bool

    def size(self, size: Sequence[int]) -> tuple[int, int]:
        return max(1, round(size[0] * self.scale)), max(1, round(size[1] * self.scale))

    def frame(self, frame: Frame) -> Frame:
        height, width = self.size(frame.shape)
        if (height, width) != frame.shape[:2]:
            method = cv2.INTER_AREA if self.scale < 1 else cv2.INTER_LINEAR
            frame = np.asarray(cv2.resize(frame, (width, height), interpolation=method), np.uint8)
        return np.ascontiguousarray(frame[:, ::-1]) if self.mirrored else frame

    def mask(self, mask: NDArray[Any]) -> NDArray[Any]:
        """Labels at the nearest pixel's centre."""
        height, width = self.size(mask.shape)
        if (height, width) != mask.shape:
            rows = (np.arange(height) + 0.5) * (mask.shape[0] / height)
            columns = (np.arange(width) + 0.5) * (mask.shape[1] / width)
            mask = mask[np.ix_(rows.astype(np.intp), columns.astype(np.intp))]
        return np.ascontiguousarray(mask[:, ::-1]) if self.mirrored else mask

    def restore(self, probabilities: Tensor, size: tuple[int, int]) -> Tensor:
        """Probabilities (1+O, h, w) at the frame's size again."""
        found = probabilities.flip(-1) if self.mirrored else probabilities
        if tuple(found.shape[1:]) == size:
            return found
        # Averages of larger maps instead of samples of them; either way the channels go on summing to 1.
        return F.interpolate(
            found[None], size, mode="bilinear", align_corners=False, antialias=self.scale > 1
        )[0]


class AugmentedSegmenter:
    """Runs a segmenter at every scale, and mirrored, side by side, and averages the probabilities.

    Each variant has a segmenter and so a memory of its own, in which it remembers its own masks; only the
    results are merged: the mean of the probabilities at the frame's size. It is a `VideoSegmenter` itself.

    Args:
        make_segmenter: makes a new segmenter (a Tracker, a LabelPropagator, ...), the same each time; called
            once for every variant. Trackers may share one model.
        scales: factors on the frame's sides.
        flip: run every scale mirrored left to right as well.

    Raises:
        TypeError, ValueError: a bad argument, or make_segmenter gave the same segmenter twice.

    Note:
        Cost and memory: those of one segmenter times the sum of scale^2 (what is quadratic in the number of
        positions, like a dense read, times scale^4), times two with flip. The variants run one after the
        other, so only one of them works at a time. scales=(1.0,) without flip changes nothing, bit for bit.

    Source: multi-scale and flip inference, as the champion solution of the Media AI challenge uses it and
        most entries of the DAVIS and YouTube-VOS challenges.

    Example:
        >>> model = vosops.models.load("stm", "stm.pth")
        >>> segmenter = AugmentedSegmenter(lambda: Tracker(model), scales=(0.75, 1.0, 1.25), flip=True)
    """

    def __init__(
        self,
        make_segmenter: Callable[[], VideoSegmenter],
        scales: Sequence[float] = (1.0,),
        flip: bool = False,
    ) -> None:
        self._variants = _variants(make_segmenter, scales, flip)
        self._segmenters: list[Any] = [make_segmenter() for _ in self._variants]
        if len({id(segmenter) for segmenter in self._segmenters}) < len(self._segmenters):
            raise ValueError("make_segmenter must make a new segmenter at every call, got the same one twice")
        self._size: tuple[int, int] | None = None

    @property
    def object_ids(self) -> list[int]:
        """Ids of the objects, in the order of channels 1..O."""
        return list(self._segmenters[0].object_ids)

    @property
    def memory_nbytes(self) -> int:
        """Bytes of memory allocated by all variants (by segmenters that tell, like `Tracker`)."""
        return sum(segmenter.memory_nbytes for segmenter in self._segmenters)

    def add(self, frame: Frame, mask: NDArray[Any]) -> None:
        """Takes a frame with its mask, as the segmenter's own `add`; masks are resized to the nearest label.

        Args:
            frame: (H, W, 3) uint8 RGB.
            mask: (H, W) integer ids, 0 background, 255 void.

        Raises:
            TypeError, ValueError: a bad frame, or a mask of another size or with an object that vanishes at
                a scale; nothing has changed. What the segmenters refuse, the first of them refuses before
                any has changed.
        """
        size = self._check_frame(frame)
        if not isinstance(mask, np.ndarray) or mask.dtype.kind not in "iu":
            got = str(mask.dtype) if isinstance(mask, np.ndarray) else type(mask).__name__
            raise TypeError(f"mask must be an array (H, W) of integer ids, got {got}")
        if mask.shape != size:
            raise ValueError(f"mask must have the frame's size {list(size)}, got {list(mask.shape)}")
        masks = [variant.mask(mask) for variant in self._variants]
        ids = _object_ids(mask)
        for variant, small in zip(self._variants, masks, strict=True):
            lost = sorted(ids - _object_ids(small))
            if lost:
                raise ValueError(f"scale {variant.scale} is too small for the mask: objects {lost} vanish")
        for variant, segmenter, small in zip(self._variants, self._segmenters, masks, strict=True):
            segmenter.add(variant.frame(frame), small)
        self._size = size

    def step(self, frame: Frame) -> Tensor:
        """Segments the next frame with every variant.

        Args:
            frame: (H, W, 3) uint8 RGB, of the first frame's size.

        Returns:
            (1 + O, H, W) probabilities, background first: the variants' mean.

        Raises:
            TypeError, ValueError: a bad frame; nothing has changed.
            RuntimeError: the variants disagree on the objects; and what the segmenters raise.
        """
        size = self._check_frame(frame)
        self._check_objects()
        total: Tensor | None = None
        for variant, segmenter in zip(self._variants, self._segmenters, strict=True):
            found = variant.restore(segmenter.step(variant.frame(frame)), size)
            total = found if total is None else total + found
        assert total is not None
        return total if len(self._variants) == 1 else total / len(self._variants)

    def remove(self, object_ids: Iterable[int]) -> None:
        """Forgets objects in every variant, for segmenters that can (`Tracker.remove`).

        Raises:
            TypeError: the segmenters have no `remove`; and what that raises.
        """
        if not hasattr(self._segmenters[0], "remove"):
            raise TypeError(f"{type(self._segmenters[0]).__name__} cannot remove objects")
        ids = list(object_ids)
        for segmenter in self._segmenters:
            segmenter.remove(ids)

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on exactly: the states of all variants."""
        return {
            "variants": [[variant.scale, variant.mirrored] for variant in self._variants],
            "size": None if self._size is None else list(self._size),
            "segmenters": [segmenter.state_dict() for segmenter in self._segmenters],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes a state back, in a new object with the same segmenter, scales and flip.

        Raises:
            ValueError: scales or flip differ; nothing has changed.
        """
        mine = [[variant.scale, variant.mirrored] for variant in self._variants]
        if [list(variant) for variant in state["variants"]] != mine:
            raise ValueError(
                f"state was saved with (scale, mirrored) {state['variants']}, this segmenter has {mine}"
            )
        size, states = state["size"], state["segmenters"]
        for segmenter, saved in zip(self._segmenters, states, strict=True):
            segmenter.load_state_dict(saved)
        self._size = None if size is None else (size[0], size[1])

    def _check_objects(self) -> None:
        """The channels of all variants must mean the same objects, or their mean has no meaning."""
        for variant, segmenter in zip(self._variants, self._segmenters, strict=True):
            if segmenter.object_ids != self.object_ids:
                raise RuntimeError(
                    f"the variants follow different objects: {self.object_ids}, and at {variant} "
                    f"{segmenter.object_ids}"
                )

    def _check_frame(self, frame: object) -> tuple[int, int]:
        size = check_frame(frame, self._size)
        least = min(min(variant.size(size)) for variant in self._variants)
        if least < _SMALLEST:
            raise ValueError(
                f"frame must have at least {_SMALLEST} pixels a side at every scale, "
                f"got {least} for a frame of {list(size)}"
            )
        return size


def check_frame(frame: object, size: tuple[int, int] | None) -> tuple[int, int]:
    """The size (H, W) of a frame.

    Args:
        frame: to be (H, W, 3) uint8 RGB.
        size: of the first frame, None if there is none yet.

    Raises:
        TypeError, ValueError: it is none, or of another size than the first.
    """
    if not isinstance(frame, np.ndarray) or frame.dtype != np.uint8:
        got = str(frame.dtype) if isinstance(frame, np.ndarray) else type(frame).__name__
        raise TypeError(f"frame must be an array (H, W, 3) uint8 RGB, got {got}")
    if frame.ndim != 3 or frame.shape[2] != 3 or 0 in frame.shape:
        raise ValueError(f"frame must have shape (H, W, 3), RGB, got {list(frame.shape)}")
    if size is not None and frame.shape[:2] != size:
        raise ValueError(f"frame must have the first frame's size {list(size)}, got {list(frame.shape[:2])}")
    return frame.shape[0], frame.shape[1]


def _object_ids(mask: NDArray[Any]) -> set[int]:
    return {int(i) for i in np.unique(mask)} - {0, _VOID}


def _variants(make_segmenter: object, scales: object, flip: object) -> list[_Variant]:
    """The ways to look at a video, of arguments that are checked here."""
    if not callable(make_segmenter):
        raise TypeError(f"make_segmenter must be a function, got {type(make_segmenter).__name__}")
    if not isinstance(flip, bool):
        raise TypeError(f"flip must be a bool, got {type(flip).__name__}")
    if isinstance(scales, str) or not isinstance(scales, Sequence):
        raise TypeError(f"scales must be a sequence of numbers, got {type(scales).__name__}")
    for scale in scales:
        if isinstance(scale, bool) or not isinstance(scale, int | float):
            raise TypeError(f"scales must be numbers, got {scale!r}")
    if not scales or len(set(scales)) < len(scales):
        raise ValueError(f"scales must be one or more distinct numbers, got {list(scales)}")
    if not all(math.isfinite(scale) and scale > 0 for scale in scales):
        raise ValueError(f"scales must be finite and above 0, got {list(scales)}")
    return [_Variant(float(s), mirrored) for s in scales for mirrored in (False, True)[: 1 + flip]]


def estimate_memory(
    make_segmenter: Callable[[], VideoSegmenter],
    size: tuple[int, int],
    objects: int,
    frames: int,
    *,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
) -> int:
    """Bytes of memory that a segmenter, at every scale and mirrored, will have allocated after a video.

    What counts is `memory_nbytes`: what is kept of past frames, not weights, nor what a frame needs while it
    is worked on. What frames take is measured on two of the true size, how that grows on two videos of the
    true length in miniature, whatever the model and its policy.

    Args:
        make_segmenter, scales, flip: as `AugmentedSegmenter` takes them.
        size: (H, W) of the frames, pixels.
        objects: in the first frame's mask, at least 1; later ones are not foreseen.
        frames: of the video, at least 2.

    Returns:
        The bytes of all variants together. Exact for memories in proportion to the number of positions, with
        or without a limit; XMem's long-term memory fills as the video goes, and its estimate is rough.

    Raises:
        TypeError, ValueError: a bad argument; a segmenter that does not tell its memory, or refuses frames.

    Note:
        Cost: two frames at every scale, and `frames` frames of 64x64 pixels, and of 96x96 where memory grows
        (for up to 63 objects; more make the miniatures larger).
    """
    for name, value, low in (("objects", objects, 1), ("frames", frames, 2)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
        if value < low:
            raise ValueError(f"{name} must be at least {low}, got {value}")
    variants = _variants(make_segmenter, scales, flip)
    begun = {
        scale: _allocated(make_segmenter, _Variant(scale, False).size(size), objects, 2)[0]
        for scale in dict.fromkeys(variant.scale for variant in variants)
    }
    at_first = sum(begun[variant.scale] for variant in variants)
    side = 32 * max(2, math.ceil((objects + 1) ** 0.5 / 4))
    first, last = _allocated(make_segmenter, (side, side), objects, frames)
    if first == last:
        return at_first
    # Memory in use is linear in the number of positions, and so is what was allocated with the first frames.
    larger_first, larger_last = _allocated(make_segmenter, (3 * side // 2, 3 * side // 2), objects, frames)
    growth = (larger_last - last) / (larger_first - first)
    return round(growth * at_first + len(variants) * (last - growth * first))


def _allocated(
    make_segmenter: Callable[[], VideoSegmenter], size: tuple[int, int], objects: int, frames: int
) -> tuple[int, int]:
    """Bytes of memory after the second and after the last frame of a video of noise."""
    segmenter: Any = make_segmenter()
    if not hasattr(segmenter, "memory_nbytes"):
        raise TypeError(f"{type(segmenter).__name__} does not tell its memory (memory_nbytes)")
    frame = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    # Objects as fields of a chessboard, the last field background.
    fields = math.ceil((objects + 1) ** 0.5)
    rows, columns = (np.arange(side) * fields // side for side in size)
    number = rows[:, None] * fields + columns
    segmenter.add(frame, np.where(number < objects, number + 1, 0).astype(np.int64))
    segmenter.step(np.roll(frame, 1, 0))
    begun = int(segmenter.memory_nbytes)
    for shift in range(2, frames):
        segmenter.step(np.roll(frame, shift, 0))
    return begun, int(segmenter.memory_nbytes)
