# SPDX-License-Identifier: Apache-2.0
"""Crop-then-zoom: small objects are segmented a second time, enlarged, with a memory of their own."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from vosops.models.session import check_saved

from .boxes import Box, BoxFollower, BoxTracker, MedianFlow, Sighting, joined, mask_box, object_box
from .run import VideoSegmenter
from .tracker import check_labels

Frame = NDArray[np.uint8]
Labels = NDArray[np.int64]

_SMALLEST_SIZE = 64  # pixels a side of an enlarged window
_MOST_ENLARGED, _LEAST_ENLARGED = 8, 1.25  # times
_LEAST_CONTEXT = 1.25  # sides of the window in sides of the box, where `context` does not fit
_KEPT = 1.25  # change of the wanted side up to which a window keeps its own: the same sampling every frame
_TOGETHER = 1.5  # side of a common window, in sides of the larger of their own, up to which objects share it
_APART = 2.0  # from which they no longer do
_LARGE = 2.0  # times the share up to which an object is small, above which it no longer is
_FEWEST = 16  # pixels of a predicted mask that a second pass may begin from
_TRACKED = 0.5  # IoU of a mask's box with the expected one from which it is where it is expected
_DISAGREEMENTS = 5  # frames after which the second pass takes the first one's mask


class _Window(NamedTuple):
    """A square of the frame, inside of it."""

    left: int
    top: int
    side: int

    @property
    def slices(self) -> tuple[slice, slice]:
        """Rows and columns."""
        return slice(self.top, self.top + self.side), slice(self.left, self.left + self.side)

    @property
    def box(self) -> Box:
        return Box(self.left, self.top, self.side, self.side)


@dataclass
class _Crop:
    """What is segmented in one moving window."""

    ids: list[int]  # whose masks are taken from here; the segmenter may know others, from before a split
    segmenter: VideoSegmenter
    window: _Window


class _Second(NamedTuple):
    """What the second pass says of one object."""

    window: _Window
    probability: Tensor  # [side, side]
    mask: NDArray[np.bool_]  # [H, W], where it is likelier than all else
    alone: bool = (
        False  # the first pass is wrong about the object, so it does not count outside of the window
    )


class ZoomSegmenter:
    """Segments small objects again in an enlarged window that follows them.

    The first pass, `segmenter`, segments the whole frame. An object whose mask takes at most the share
    `small` of the frame (until it takes more than twice that) is followed by a `BoxFollower`, from a tracker
    and the first pass's masks. A square window around its smoothed box, `context` times the longer side, is
    enlarged to `size` pixels a side and segmented by a segmenter of its own from `make`. That one starts from
    the given mask where the object is small on that frame, else from the first pass's mask where it becomes
    small. The window's side follows the object's in steps, so that its memory sees the object at one size.

    The second pass's mask replaces the first one's

    - in the window, where the two agree: their IoU is at least `agreement`;
    - everywhere, where it alone lies where the tracker is: the IoU of its box with the tracker's is at least
      0.5, and that of the first mask, which may be empty, is not.

    Else the first pass stays. Where it stays for 5 frames running, its mask is given to the second pass as a
    correction. The other objects and the background share what is left in proportion to the first pass.

    Objects whose common window is at most 1.5 times as large as their own start in one window and are
    segmented together; when it takes more than twice their own, each goes on in its own with a copy of the
    memory. Windows may overlap, and stay inside of the frame. An object that is lost rests with its memory,
    and goes on when the first pass shows it again, wherever that is. A window is enlarged 1.25 to 8 times;
    a long object takes a window with less context, and is not segmented again where even 1.25 times its
    length does not fit.

    Args:
        segmenter: new; the first pass.
        make: makes a new segmenter, a new one each time; Trackers may share one model.
        small: largest share of the frame of an object that is small.
        size: pixels a side of an enlarged window, at least 64.
        context: sides of the window in longer sides of the object's box, above 1.
        agreement: IoU of the two passes' masks from which they agree.
        make_tracker: makes a `BoxTracker` per object.

    Raises:
        TypeError, ValueError: a bad argument, named.

    Note:
        Cost: the first pass, and per window in use a frame of size x size. Memory: that of the first pass,
        and of one such segmenter per small object (per group of objects that share a window). Frames without
        small objects are those of the first pass, bit for bit.

    Source: crop-then-zoom of the challenge solutions; box, window and acceptance rules are ours.

    Example:
        >>> model = vosops.models.load("stcn", "stcn.pth")
        >>> segmenter = ZoomSegmenter(Tracker(model), lambda: Tracker(model))
    """

    def __init__(
        self,
        segmenter: VideoSegmenter,
        make: Callable[[], VideoSegmenter],
        *,
        small: float = 0.01,
        size: int = 384,
        context: float = 2.0,
        agreement: float = 0.3,
        make_tracker: Callable[[], BoxTracker] = MedianFlow,
    ) -> None:
        for name, function in (("make", make), ("make_tracker", make_tracker)):
            if not callable(function):
                raise TypeError(f"{name} must be a function, got {type(function).__name__}")
        for name, number, low, high in (
            ("small", small, 0.0, 1.0),
            ("context", context, 1.0, 100.0),
            ("agreement", agreement, 0.0, 1.0),
        ):
            if isinstance(number, bool) or not isinstance(number, int | float):
                raise TypeError(f"{name} must be a number, got {type(number).__name__}")
            if not low < number <= high:
                raise ValueError(f"{name} must be above {low} and at most {high}, got {number}")
        if isinstance(size, bool) or not isinstance(size, int):
            raise TypeError(f"size must be an integer, got {type(size).__name__}")
        if size < _SMALLEST_SIZE:
            raise ValueError(f"size must be at least {_SMALLEST_SIZE} pixels, got {size}")
        self._segmenter: Any = segmenter
        self._make = make
        self._make_tracker = make_tracker
        self._small, self._context, self._agreement = float(small), float(context), float(agreement)
        self._enlarged = size
        self._tracker_name = type(make_tracker()).__name__
        self._followers: dict[int, BoxFollower] = {}  # of the objects that are small
        self._crops: list[_Crop] = []
        self._disagreed: dict[int, int] = {}  # frames running
        self._last: Frame | None = None

    @property
    def object_ids(self) -> list[int]:
        """Ids of the objects, in the order of channels 1..O: the first pass's."""
        return list(self._segmenter.object_ids)

    @property
    def memory_nbytes(self) -> int:
        """Bytes of memory allocated by both passes (by segmenters that tell, like `Tracker`)."""
        segmenters: list[Any] = [self._segmenter, *(crop.segmenter for crop in self._crops)]
        return sum(segmenter.memory_nbytes for segmenter in segmenters)

    def add(self, frame: Frame, mask: NDArray[Any]) -> None:
        """Takes a frame with its mask, as the first pass's own `add`; small objects start or are corrected.

        Args:
            frame: (H, W, 3) uint8 RGB: the frame of the last `step`, or the next one of the video (which is
                then stepped to first, for the objects known).
            mask: (H, W) integer ids, 0 background, 255 void.

        Raises:
            TypeError, ValueError: a bad frame or mask; nothing has changed. And what the segmenters refuse.
        """
        height, width = self._check_frame(frame)
        labels = check_labels(mask, (height, width))
        if self._last is not None and not np.array_equal(frame, self._last):
            self.step(frame)
        self._segmenter.add(frame, mask)
        self._last = frame.copy()
        boxes = {}
        for object_id in (int(i) for i in np.unique(labels) if i):
            self._followers.pop(object_id, None)
            self._disagreed.pop(object_id, None)
            given = labels == object_id
            box = mask_box(given)
            if box is not None and given.mean() <= self._small:
                boxes[object_id] = box
                self._followers[object_id] = self._follow(frame, box, given)
        for crop in self._crops:
            self._correct(crop, frame, labels, {i: box for i, box in boxes.items() if i in crop.ids})
        self._begin(frame, labels, boxes)

    def step(self, frame: Frame) -> Tensor:
        """Segments the next frame.

        Args:
            frame: (H, W, 3) uint8 RGB, of the first frame's size.

        Returns:
            (1 + O, H, W) probabilities, background first, summing to 1.

        Raises:
            TypeError, ValueError: a bad frame; nothing has changed. And what the segmenters raise.
        """
        self._check_frame(frame)
        first = self._segmenter.step(frame)
        ids = self.object_ids
        labels = _labels(first, ids)
        sightings, waiting = self._sight(frame, labels, ids)
        found = self._second_pass(frame, sightings)
        accepted = {}
        for object_id, second in found.items():
            verdict = self._judge(labels == object_id, second, sightings[object_id])
            if verdict != "first":
                accepted[object_id] = second._replace(alone=verdict == "second")
        if accepted:
            first = _pasted(first, {ids.index(i) + 1: second for i, second in accepted.items()})
        final = _labels(first, ids) if accepted else labels
        for object_id in sightings:
            self._followers[object_id].correct(frame, final == object_id)
        self._correct_disagreeing(frame, labels, found, accepted)
        self._begin(frame, final, self._boxes(final, [*sightings, *waiting]))
        self._last = frame.copy()
        return first

    def remove(self, object_ids: Iterable[int]) -> None:
        """Forgets objects, for a first pass that can (`Tracker.remove`); windows without objects go.

        Raises:
            TypeError: the first pass has no `remove`; and what that raises.
        """
        if not hasattr(self._segmenter, "remove"):
            raise TypeError(f"{type(self._segmenter).__name__} cannot remove objects")
        ids = list(object_ids)
        self._segmenter.remove(ids)
        for object_id in ids:
            self._followers.pop(object_id, None)
            self._disagreed.pop(object_id, None)
        for crop in self._crops:
            crop.ids = [i for i in crop.ids if i not in ids]
        self._crops = [crop for crop in self._crops if crop.ids]

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on exactly: the states of both passes, boxes and windows."""
        return {
            **self._settings(),
            "last": None if self._last is None else torch.from_numpy(self._last.copy()),
            "segmenter": self._segmenter.state_dict(),
            "followers": {i: follower.state_dict() for i, follower in self._followers.items()},
            "disagreed": dict(self._disagreed),
            "crops": [
                {"ids": list(crop.ids), "window": list(crop.window), "segmenter": crop.segmenter.state_dict()}
                for crop in self._crops
            ],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes a state back, in a new object with the same segmenters and settings.

        Raises:
            ValueError: the settings differ; nothing has changed.
            KeyError: `state` is not of `state_dict`.
        """
        check_saved(state, self._settings())
        followers, crops, last = {}, [], state["last"]
        for object_id, saved in state["followers"].items():
            followers[int(object_id)] = BoxFollower(self._make_tracker())
            followers[int(object_id)].load_state_dict(saved)
        for saved in state["crops"]:
            segmenter = self._make()
            segmenter.load_state_dict(saved["segmenter"])
            crops.append(_Crop(list(saved["ids"]), segmenter, _Window(*saved["window"])))
        self._segmenter.load_state_dict(state["segmenter"])
        self._followers, self._crops, self._disagreed = followers, crops, dict(state["disagreed"])
        self._last = None if last is None else last.numpy().copy()

    def _settings(self) -> dict[str, Any]:
        """What a state must share with the segmenter that takes it back."""
        return {
            "small": self._small,
            "size": self._enlarged,
            "context": self._context,
            "agreement": self._agreement,
            "tracker": self._tracker_name,
        }

    def _follow(self, frame: Frame, box: Box, mask: NDArray[np.bool_]) -> BoxFollower:
        follower = BoxFollower(self._make_tracker())
        follower.start(frame, box, mask)
        return follower

    def _sight(
        self, frame: Frame, labels: Labels, ids: Sequence[int]
    ) -> tuple[dict[int, Sighting], list[int]]:
        """Where the small objects are, and those that have just become small."""
        sightings, new = {}, []
        for object_id in ids:
            mask = labels == object_id
            pixels = int(np.count_nonzero(mask))
            if object_id in self._followers:
                if pixels > _LARGE * self._small * mask.size:
                    del self._followers[object_id]
                    self._disagreed.pop(object_id, None)
                else:
                    sightings[object_id] = self._followers[object_id].predict(frame, mask)
            elif _FEWEST <= pixels <= self._small * mask.size:
                box = object_box(mask, None)
                assert box is not None
                self._followers[object_id] = self._follow(frame, box, mask)
                new.append(object_id)
        return sightings, new

    def _second_pass(self, frame: Frame, sightings: dict[int, Sighting]) -> dict[int, _Second]:
        """Segments in all windows whose objects are not lost."""
        found: dict[int, _Second] = {}
        for crop in list(self._crops):
            boxes = {i: sightings[i].box for i in crop.ids if i in sightings}
            known = {i: box for i, box in boxes.items() if box is not None}
            for part in self._split(crop, known):
                mine = [box for i, box in known.items() if i in part.ids]
                window = self._window(mine, frame, part.window) if mine else None
                if window is None:
                    continue
                part.window = window
                found |= self._segment(part, frame, [i for i in part.ids if i in known])
        return found

    def _segment(self, crop: _Crop, frame: Frame, ids: Sequence[int]) -> dict[int, _Second]:
        """What a window's segmenter says of objects."""
        side = crop.window.side
        small = crop.segmenter.step(self._cut(frame, crop.window)).float().cpu()
        # Averages instead of samples: a pixel of the frame is several of the enlarged window.
        probabilities = F.interpolate(
            small[None], (side, side), mode="bilinear", align_corners=False, antialias=True
        )[0]
        known = crop.segmenter.object_ids
        inside = _labels(probabilities, known)
        found = {}
        for object_id in ids:
            mask = np.zeros(frame.shape[:2], np.bool_)
            mask[crop.window.slices] = inside == object_id
            found[object_id] = _Second(crop.window, probabilities[known.index(object_id) + 1], mask)
        return found

    def _judge(
        self, first: NDArray[np.bool_], second: _Second, sighting: Sighting
    ) -> Literal["first", "both", "second"]:
        """Which pass is right about an object."""
        if not second.mask.any():
            return "first"
        union = np.count_nonzero(first | second.mask)
        if np.count_nonzero(first & second.mask) / union >= self._agreement:
            return "both"
        tracked = sighting.tracked
        if tracked is None:
            return "first"
        boxes = [object_box(mask, tracked) for mask in (first, second.mask)]
        near = [box is not None and box.iou(tracked) >= _TRACKED for box in boxes]
        return "second" if near[1] and not near[0] else "first"

    def _correct_disagreeing(
        self, frame: Frame, labels: Labels, found: dict[int, _Second], accepted: dict[int, _Second]
    ) -> None:
        """Counts the frames on which the first pass stayed, and gives its mask where they are too many."""
        for object_id in found:
            stayed = object_id not in accepted and np.count_nonzero(labels == object_id) >= _FEWEST
            self._disagreed[object_id] = self._disagreed.get(object_id, 0) + 1 if stayed else 0
        late = self._boxes(labels, [i for i, count in self._disagreed.items() if count >= _DISAGREEMENTS])
        for crop in self._crops:
            # What reaches out of the window would be cut: it waits until the window has come to it.
            mine = {i: box for i, box in late.items() if i in crop.ids and crop.window.box.holds(box)}
            self._correct(crop, frame, labels, mine)
            self._disagreed.update(dict.fromkeys(mine, 0))

    def _boxes(self, labels: Labels, ids: Iterable[int]) -> dict[int, Box]:
        """Boxes of those objects whose predicted masks are large enough to begin from."""
        masks = {i: labels == i for i in ids}
        boxes = {i: object_box(mask, None) for i, mask in masks.items() if np.count_nonzero(mask) >= _FEWEST}
        return {i: box for i, box in boxes.items() if box is not None}

    def _correct(self, crop: _Crop, frame: Frame, labels: Labels, boxes: dict[int, Box]) -> None:
        """Gives masks of objects to the segmenter of their window, which moves if it does not hold them."""
        if not boxes:
            return
        window = crop.window
        if not all(window.box.holds(box) for box in boxes.values()):
            moved = self._window(list(boxes.values()), frame, window)
            if moved is None:
                return
            window = moved
        inside = self._cut_labels(labels, window, list(boxes))
        if inside.any():
            crop.window = window
            crop.segmenter.add(self._cut(frame, window), inside)

    def _begin(self, frame: Frame, labels: Labels, boxes: dict[int, Box]) -> None:
        """Starts windows for those small objects that have none."""
        cropped = {i for crop in self._crops for i in crop.ids}
        boxes = {i: box for i, box in boxes.items() if i not in cropped}
        for group in self._groups(boxes):
            window = self._window([boxes[i] for i in group], frame, None)
            if window is None:
                continue
            inside = self._cut_labels(labels, window, group)
            known = [i for i in group if (inside == i).any()]
            if known:
                segmenter = self._make()
                segmenter.add(self._cut(frame, window), inside)
                self._crops.append(_Crop(known, segmenter, window))

    def _groups(self, boxes: dict[int, Box]) -> list[list[int]]:
        """Objects that are to share a window."""
        groups: list[list[int]] = []
        for object_id, box in boxes.items():
            for group in groups:
                both = [*(boxes[i] for i in group), box]
                if self._spread(both) <= _TOGETHER:
                    group.append(object_id)
                    break
            else:
                groups.append([object_id])
        return groups

    def _split(self, crop: _Crop, boxes: dict[int, Box]) -> list[_Crop]:
        """The window, or one for each of its objects if they have gone apart."""
        if len(boxes) < 2 or self._spread(list(boxes.values())) <= _APART:
            return [crop]
        parts = [crop]
        for object_id in crop.ids[1:]:
            segmenter = self._make()
            segmenter.load_state_dict(crop.segmenter.state_dict())
            parts.append(_Crop([object_id], segmenter, crop.window))
        crop.ids = crop.ids[:1]
        self._crops += parts[1:]
        return parts

    def _spread(self, boxes: Sequence[Box]) -> float:
        """Side of the boxes' common window, in sides of the largest of their own."""
        return self._side(joined(boxes)) / max(self._side(box) for box in boxes)

    def _side(self, box: Box) -> float:
        return max(self._context * box.side, self._enlarged / _MOST_ENLARGED)

    def _window(self, boxes: Sequence[Box], frame: Frame, before: _Window | None) -> _Window | None:
        """The window around boxes; None if it would hardly be enlarged, or does not fit into the frame."""
        height, width = frame.shape[:2]
        box = joined(boxes)
        side = round(min(self._side(box), self._enlarged / _LEAST_ENLARGED, height, width))
        least = _LEAST_CONTEXT * box.side
        if side < least:
            return None
        if before is not None and before.side >= least and 1 / _KEPT <= side / before.side <= _KEPT:
            side = before.side
        x, y = box.center
        left = min(max(math.floor(x - side / 2 + 0.5), 0), width - side)
        top = min(max(math.floor(y - side / 2 + 0.5), 0), height - side)
        return _Window(left, top, side)

    def _cut(self, frame: Frame, window: _Window) -> Frame:
        """The window, enlarged.  # [size, size, 3]"""
        size = (self._enlarged, self._enlarged)
        inside = np.ascontiguousarray(frame[window.slices])
        return np.asarray(cv2.resize(inside, size, interpolation=cv2.INTER_CUBIC), np.uint8)

    def _cut_labels(self, labels: Labels, window: _Window, ids: Sequence[int]) -> Labels:
        """The labels of `ids` in the window, enlarged with smooth outlines.  # [size, size]"""
        size = (self._enlarged, self._enlarged)
        inside = labels[window.slices]
        masks = [(inside == i).astype(np.float32) for i in ids]
        masks = [cv2.resize(mask, size, interpolation=cv2.INTER_LINEAR).astype(np.float32) for mask in masks]
        background = 1 - np.sum(masks, 0)
        return np.array([0, *ids], np.int64)[np.argmax([background, *masks], 0)]

    def _check_frame(self, frame: object) -> tuple[int, int]:
        if not isinstance(frame, np.ndarray) or frame.dtype != np.uint8:
            got = str(frame.dtype) if isinstance(frame, np.ndarray) else type(frame).__name__
            raise TypeError(f"frame must be an array (H, W, 3) uint8 RGB, got {got}")
        if frame.ndim != 3 or frame.shape[2] != 3 or 0 in frame.shape:
            raise ValueError(f"frame must have shape (H, W, 3), RGB, got {list(frame.shape)}")
        size = (frame.shape[0], frame.shape[1])
        if self._last is not None and size != self._last.shape[:2]:
            raise ValueError(
                f"frame must have the first frame's size {list(self._last.shape[:2])}, got {list(size)}"
            )
        return size


def _labels(probabilities: Tensor, ids: Sequence[int]) -> Labels:
    """The likeliest ids of probabilities (1+O, H, W).  # [H, W]"""
    # argmax over channels takes eight times as long.
    places = probabilities.max(0).indices.cpu().numpy()
    return np.array([0, *ids], np.int64)[places]


def _pasted(first: Tensor, seconds: dict[int, _Second]) -> Tensor:
    """Probabilities (1+O, H, W) with channels replaced; the others share what is left as they did."""
    channels = list(seconds)
    others = [c for c in range(len(first)) if c not in seconds]
    claimed = first.new_zeros(len(channels), *first.shape[1:])
    for place, (channel, second) in zip(claimed, seconds.items(), strict=True):
        if not second.alone:
            place.copy_(first[channel])
        place[second.window.slices] = second.probability.to(first)
    claimed = claimed / claimed.sum(0).clamp(min=1)
    left = (1 - claimed.sum(0)).clamp(min=0)
    before = first[others].sum(0)
    known = before > 1e-6
    pasted = torch.empty_like(first)
    pasted[channels] = claimed
    pasted[others] = first[others] * torch.where(known, left / before.clamp(min=1e-6), 0)
    pasted[0] += torch.where(known, 0, left)
    return pasted
