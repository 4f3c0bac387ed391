# SPDX-License-Identifier: Apache-2.0
"""Where an object is, as a box: from a tracker and from preliminary masks, smoothed over time."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

Frame = NDArray[np.uint8]
Mask = NDArray[np.bool_]

_PATCH = 160  # pixels a side of the picture that a tracker works on
_REACH = 5  # sides of that picture in longer sides of the box: it may move by two of its own sides a frame
_GRID = 16  # points a side, of which those on the object are followed,
_POINTS = 64  # at most so many
_FEWEST = 4  # points of a mask too thin for the grid; then all of the box counts
_RETURN = 2.0  # pixels of the patch (1/16 of the box) off which a point may return
_FOLLOWED = 0.25  # share of the points that must return
_GROWTH = 1.25  # most change of the box's sides between two frames
_FLOW_WINDOW, _FLOW_LEVELS = (11, 11), 3  # pixels of the patch, and halvings of it
_REPLAYED = 10  # frames between two starts of an OpenCV tracker

_ALPHA = 0.6  # share of the position's error that is corrected
_BETA = 2 * (2 - _ALPHA) - 4 * math.sqrt(1 - _ALPHA)  # of the velocity's
_GAMMA = 0.3  # of the size's
_OVERLAP = 0.3  # IoU from which tracker and mask mean the same thing
_PATIENCE = 10  # frames without a mask after which an object is lost


class Box(NamedTuple):
    """A rectangle of a frame, in pixels; it covers columns [left, left + width) and rows alike."""

    left: float
    top: float
    width: float
    height: float

    @property
    def center(self) -> tuple[float, float]:
        """(x, y)."""
        return self.left + self.width / 2, self.top + self.height / 2

    def holds(self, other: Box) -> bool:
        """Whether `other` lies in it."""
        return (
            self.left <= other.left
            and self.top <= other.top
            and other.left + other.width <= self.left + self.width
            and other.top + other.height <= self.top + self.height
        )

    @property
    def side(self) -> float:
        """The longer one."""
        return max(self.width, self.height)

    def scaled(self, factor: float) -> Box:
        """The box enlarged about its centre."""
        return around(self.center, self.width * factor, self.height * factor)

    def iou(self, other: Box) -> float:
        """Intersection over union, 0 if either is empty."""
        width = min(self.left + self.width, other.left + other.width) - max(self.left, other.left)
        height = min(self.top + self.height, other.top + other.height) - max(self.top, other.top)
        if width <= 0 or height <= 0:
            return 0.0
        common = width * height
        return common / (self.width * self.height + other.width * other.height - common)


def around(center: tuple[float, float], width: float, height: float) -> Box:
    """The box of that size around a centre (x, y)."""
    return Box(center[0] - width / 2, center[1] - height / 2, width, height)


def joined(boxes: Iterable[Box]) -> Box:
    """The smallest box around one or more boxes."""
    left, top, right, bottom = zip(
        *((b.left, b.top, b.left + b.width, b.top + b.height) for b in boxes), strict=True
    )
    return Box(min(left), min(top), max(right) - min(left), max(bottom) - min(top))


def mask_box(mask: Mask) -> Box | None:
    """The box of all of a mask (H, W) bool, None if it is empty."""
    left, top, width, height = cv2.boundingRect(np.ascontiguousarray(mask).view(np.uint8))
    return Box(left, top, width, height) if width else None


def object_box(mask: Mask, near: Box | None) -> Box | None:
    """The box of an object in a predicted mask, specks elsewhere in the frame left out.

    Args:
        mask: (H, W) bool.
        near: where the object is expected, None if nowhere.

    Returns:
        The box of the connected parts that touch `near` enlarged to twice its sides; where none does, or
        without `near`, of the largest part. None if the mask is empty.

    Note:
        Cost: one pass over the mask and one over its bounding box.
    """
    whole = mask_box(mask)
    if whole is None:
        return None
    left, top, width, height = (int(x) for x in whole)
    inside = np.ascontiguousarray(mask[top : top + height, left : left + width]).view(np.uint8)
    _, _, stats, _ = cv2.connectedComponentsWithStats(inside, connectivity=8)
    parts = [(Box(left + x, top + y, w, h), int(area)) for x, y, w, h, area in stats[1:].tolist()]
    if near is not None:
        reach = near.scaled(2)
        touching = [part for part, _ in parts if part.iou(reach) > 0]
        if touching:
            return joined(touching)
    return max(parts, key=lambda part: part[1])[0]


class BoxTracker(Protocol):
    """What follows an object's box from frame to frame. Frames are (H, W, 3) uint8 RGB, of one size."""

    def start(self, frame: Frame, box: Box, mask: Mask) -> None:
        """Follows what is in `box` from here on; what was followed before is forgotten.

        Args:
            frame: the present one.
            box: of the object.
            mask: (H, W) bool, the object's pixels.
        """

    def update(self, frame: Frame) -> Box | None:
        """The box on the next frame; None if it is lost, and from then on until the next start."""

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on exactly: tensors and plain values."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes a state back."""


class MedianFlow:
    """Follows a box by the median motion of points on the object that flow brings back to their place.

    Up to 64 points of a grid on the mask go to the next frame and back by pyramidal Lucas-Kanade flow; those
    that do not return within 1/16 of the box's longer side are left out. The box moves by the median
    displacement of the others and grows by the median ratio of their distances, at most 1.25 a frame, and
    all points move with it. It is lost when less than a quarter of the points return, or when its centre
    leaves the frame. It works on a picture of 160 x 160 pixels, five boxes wide, so that all sizes are
    followed alike.

    Note:
        Cost: about a millisecond a frame. State: that picture and the points.

    Source: Kalal, Mikolajczyk, Matas: Forward-Backward Error, ICPR 2010; there the points are on all of the
        box. Flow: OpenCV.
    """

    def __init__(self) -> None:
        self._box: Box | None = None
        self._points = np.empty((0, 2))  # [N, 2] (x, y) in pixels of the frame
        self._patch: Frame | None = None  # [160, 160] grey, around _box

    def start(self, frame: Frame, box: Box, mask: Mask) -> None:
        """As `BoxTracker.start`."""
        self._keep(frame, box, _points(box, mask))

    def update(self, frame: Frame) -> Box | None:
        """As `BoxTracker.update`."""
        box, patch, points = self._box, self._patch, self._points
        self._box = self._patch = None
        if box is None or patch is None:
            return None
        left, top, side = _region(box)
        scale = side / _PATCH
        inside = ((points - (left, top)) / scale - 0.5).astype(np.float32)
        moved = _moved(patch, _cut(frame, left, top, side), inside)
        if moved is None:
            return None
        before, after = moved
        growth, shift = _growth(before, after), np.median(after - before, 0).astype(np.float64) * scale
        # The median moves with the points about their own middle, which is not the box's centre.
        middle = np.median(before, 0).astype(np.float64) * scale + (left, top)
        points = (points - middle) * growth + middle + shift
        x, y = (np.array(box.center) - middle) * growth + middle + shift
        if not (0 <= x < frame.shape[1] and 0 <= y < frame.shape[0]):
            return None
        width, height = max(1.0, box.width * growth), max(1.0, box.height * growth)
        found = around((float(x), float(y)), width, height)
        self._keep(frame, found, points)
        return found

    def state_dict(self) -> dict[str, Any]:
        """As `BoxTracker.state_dict`."""
        return {
            "box": None if self._box is None else list(self._box),
            "points": torch.from_numpy(self._points.copy()),
            "patch": None if self._patch is None else torch.from_numpy(self._patch.copy()),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As `BoxTracker.load_state_dict`."""
        box, patch = state["box"], state["patch"]
        self._box = None if box is None else Box(*box)
        self._points = state["points"].numpy().copy()
        self._patch = None if patch is None else patch.numpy().copy()

    def _keep(self, frame: Frame, box: Box, points: NDArray[np.float64]) -> None:
        self._box, self._points, self._patch = box, points, _cut(frame, *_region(box))


class OpenCVTracker:
    """Follows a box by one of OpenCV's own trackers.

    OpenCV's trackers cannot be saved. So this one starts again every 10 frames, and when the box nears the
    edge of the region five boxes wide that it works on, and keeps that region of the frames since: taking a
    state back runs through them again, which is exact for trackers that draw no random numbers (CSRT).

    Args:
        name: of the tracker, as in `cv2.TrackerCSRT_create`; CSRT comes with opencv-contrib-python.

    Raises:
        ImportError: the installed OpenCV has no such tracker.

    Source: CSRT: Lukezic et al., CVPR 2017.
    """

    def __init__(self, name: str = "CSRT") -> None:
        make = getattr(cv2, f"Tracker{name}_create", None)
        if make is None:
            raise ImportError(
                f"OpenCV {cv2.__version__} has no tracker {name!r}; CSRT needs opencv-contrib-python-headless"
            )
        self._make = make
        self._tracker: Any = None
        self._corner = (0, 0)  # (left, top) of the region
        self._first = [0, 0, 1, 1]  # the box in the first of the regions
        self._regions: list[Frame] = []

    def start(self, frame: Frame, box: Box, mask: Mask) -> None:
        """As `BoxTracker.start`; the mask is not used."""
        self._start(frame, box)

    def update(self, frame: Frame) -> Box | None:
        """As `BoxTracker.update`."""
        if self._tracker is None:
            return None
        (left, top), (height, width) = self._corner, self._regions[0].shape[:2]
        self._regions.append(np.ascontiguousarray(frame[top : top + height, left : left + width]))
        followed, found = self._tracker.update(self._regions[-1])
        if not followed:
            self._tracker, self._regions = None, []
            return None
        x, y, w, h = (float(value) for value in found)
        box = Box(left + x, top + y, w, h)
        near_edge = min(x - w / 2, y - h / 2, width - x - 1.5 * w, height - y - 1.5 * h) < 0
        if near_edge or len(self._regions) > _REPLAYED:
            self._start(frame, box)
        return box

    def state_dict(self) -> dict[str, Any]:
        """As `BoxTracker.state_dict`."""
        regions = torch.from_numpy(np.stack(self._regions)) if self._regions else None
        return {"corner": list(self._corner), "first": list(self._first), "regions": regions}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As `BoxTracker.load_state_dict`."""
        self._tracker, self._regions = None, []
        if state["regions"] is not None:
            first, *others = state["regions"].numpy().copy()
            self._begin((state["corner"][0], state["corner"][1]), list(state["first"]), first)
            for region in others:
                self._regions.append(region)
                self._tracker.update(region)

    def _start(self, frame: Frame, box: Box) -> None:
        height, width = frame.shape[:2]
        left, top, side = _region(box)
        columns = slice(max(0, left), min(width, left + side))
        rows = slice(max(0, top), min(height, top + side))
        size = [max(1, round(length)) for length in box[2:]]
        self._begin(
            (columns.start, rows.start),
            [round(box.left) - columns.start, round(box.top) - rows.start, *size],
            np.ascontiguousarray(frame[rows, columns]),
        )

    def _begin(self, corner: tuple[int, int], first: list[int], region: Frame) -> None:
        self._corner, self._first, self._regions = corner, first, [region]
        self._tracker = self._make()
        self._tracker.init(region, tuple(first))


@dataclass(frozen=True)
class SmoothBox:
    """An alpha-beta filter: a box that goes on at constant velocity and is pulled towards what is measured.

    Per frame, with the residual r of a measured centre to the predicted one: centre += 0.6 r and
    velocity += 0.27 r (Kalata's relation, which makes it the steady state of a Kalman filter for constant
    velocity: no lag behind steady motion); sides are multiplied by (measured / own)^0.3.

    Attributes:
        box: on the present frame.
        velocity: (x, y) of its centre, pixels a frame.

    Source: Kalata, "The Tracking Index", IEEE Trans. Aerospace and Electronic Systems 20(2), 1984.
    """

    box: Box
    velocity: tuple[float, float] = (0.0, 0.0)

    def predict(self) -> Box:
        """The box on the next frame if it goes on as before."""
        return self.box._replace(left=self.box.left + self.velocity[0], top=self.box.top + self.velocity[1])

    def update(self, measured: Box) -> SmoothBox:
        """The filter on the next frame, where the box was measured."""
        x, y = self.predict().center
        across, down = measured.center[0] - x, measured.center[1] - y
        width, height = (
            own * (new / own) ** _GAMMA for own, new in zip(self.box[2:], measured[2:], strict=True)
        )
        velocity = (self.velocity[0] + _BETA * across, self.velocity[1] + _BETA * down)
        return SmoothBox(around((x + _ALPHA * across, y + _ALPHA * down), width, height), velocity)


class Sighting(NamedTuple):
    """Where an object is thought to be, before it has been segmented for good.

    box: smoothed; None if the object is lost.
    tracked: the tracker's; None if it lost the object.
    """

    box: Box | None
    tracked: Box | None


class BoxFollower:
    """The box of one object over time: per frame `predict` with a preliminary mask, `correct` with the final.

    - Tracker and mask agree (IoU of the boxes at least 0.3): their mean is measured.
    - They do not: the tracker's box, or the mask's where the tracker has lost the object.
    - Only one of them knows: that one. Neither: the box goes on at constant velocity.
    - 10 frames without a final mask: the object is lost until a mask shows it again, wherever that is.

    What is measured goes through `SmoothBox`. The box of the final mask then replaces the measurement, and
    the tracker starts again from it: on its own it has only frames without a mask to go through.

    Args:
        tracker: new, of its own.
    """

    def __init__(self, tracker: BoxTracker) -> None:
        self._tracker = tracker
        self._smooth: SmoothBox | None = None
        self._unseen = 0  # frames since the last final mask
        self._measured: Box | None = None  # from predict to correct

    def start(self, frame: Frame, box: Box, mask: Mask) -> None:
        """Takes the object's box and mask (H, W) bool on the present frame for certain."""
        self._smooth, self._unseen = SmoothBox(box), 0
        self._tracker.start(frame, box, mask)

    def predict(self, frame: Frame, mask: Mask) -> Sighting:
        """Goes on to the next frame.

        Args:
            frame: (H, W, 3) uint8 RGB.
            mask: (H, W) bool, preliminary; may be empty.

        Raises:
            RuntimeError: before `start`.
        """
        if self._smooth is None:
            raise RuntimeError("predict needs a box to go on from: call start(frame, box, mask) first")
        known = self._unseen < _PATIENCE
        tracked = self._tracker.update(frame) if known else None
        expected = tracked
        if known and tracked is None:
            expected = _clamped(self._smooth.predict(), frame)
        measured = seen = object_box(mask, expected)
        if seen is None:
            measured = expected
        elif tracked is not None:
            measured = _mean(tracked, seen) if tracked.iou(seen) >= _OVERLAP else tracked
        self._measured = measured
        return Sighting(None if measured is None else self._updated(measured).box, tracked)

    def correct(self, frame: Frame, mask: Mask) -> None:
        """Takes the final mask (H, W) bool of the frame that was predicted; may be empty."""
        found = object_box(mask, self._measured)
        if found is not None:
            self._smooth, self._unseen = self._updated(found), 0
            self._tracker.start(frame, found, mask)
            return
        self._unseen += 1
        if self._measured is not None:
            self._smooth = self._updated(self._measured)

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on exactly after `start` or `correct`."""
        smooth = None if self._smooth is None else [*self._smooth.box, *self._smooth.velocity]
        return {"smooth": smooth, "unseen": self._unseen, "tracker": self._tracker.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes a state back, in a new follower with the same kind of tracker."""
        smooth = state["smooth"]
        self._tracker.load_state_dict(state["tracker"])
        self._smooth = None if smooth is None else SmoothBox(Box(*smooth[:4]), (smooth[4], smooth[5]))
        self._unseen = int(state["unseen"])

    def _updated(self, measured: Box) -> SmoothBox:
        """The filter with what was measured; it does not glide to where an object has jumped."""
        assert self._smooth is not None
        jumped = self._smooth.predict().scaled(2).iou(measured) == 0
        return SmoothBox(measured) if jumped else self._smooth.update(measured)


def _clamped(box: Box, frame: Frame) -> Box:
    """The box with its centre inside of the frame."""
    x, y = box.center
    inside = (min(max(x, 0.0), frame.shape[1] - 1.0), min(max(y, 0.0), frame.shape[0] - 1.0))
    return around(inside, box.width, box.height)


def _mean(a: Box, b: Box) -> Box:
    return Box(*((x + y) / 2 for x, y in zip(a, b, strict=True)))


def _region(box: Box) -> tuple[int, int, int]:
    """(left, top, side) of the square around a box that a tracker works on; may reach out of the frame."""
    side = max(8, math.ceil(_REACH * box.side))
    x, y = box.center
    return round(x - side / 2), round(y - side / 2), side


def _cut(frame: Frame, left: int, top: int, side: int) -> Frame:
    """The square in grey at 160 x 160; beyond the border the nearest pixel counts."""
    height, width = frame.shape[:2]
    rows = np.clip(np.arange(top, top + side), 0, height - 1)
    columns = np.clip(np.arange(left, left + side), 0, width - 1)
    gray = cv2.cvtColor(np.ascontiguousarray(frame[np.ix_(rows, columns)]), cv2.COLOR_RGB2GRAY)
    method = cv2.INTER_AREA if side > _PATCH else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(gray, (_PATCH, _PATCH), interpolation=method), np.uint8)


def _points(box: Box, mask: Mask) -> NDArray[np.float64]:
    """Points of a grid over the box, on the mask.  # [N, 2] (x, y), at most 64"""
    steps = (np.arange(_GRID) + 0.5) / _GRID
    x, y = np.meshgrid(box.left + steps * box.width, box.top + steps * box.height)
    points = np.stack((x.ravel(), y.ravel()), 1)
    rows = np.clip(points[:, 1].astype(np.intp), 0, mask.shape[0] - 1)
    columns = np.clip(points[:, 0].astype(np.intp), 0, mask.shape[1] - 1)
    on_object = points[mask[rows, columns]]
    chosen = on_object if len(on_object) >= _FEWEST else points
    return chosen[np.linspace(0, len(chosen) - 1, min(_POINTS, len(chosen))).astype(np.intp)]


def _moved(
    patch: Frame, target: Frame, points: NDArray[np.float32]
) -> tuple[NDArray[np.float32], NDArray[np.float32]] | None:
    """The points that flow brings back to their place, before and after; None if they are too few."""
    after, found = _flow(patch, target, points)
    back, again = _flow(target, patch, after)
    good = found & again & (np.linalg.norm(back - points, axis=1) < _RETURN)
    if good.mean() < _FOLLOWED:
        return None
    return points[good], after[good]


def _flow(
    patch: Frame, target: Frame, points: NDArray[np.float32]
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Where points (N, 2) go, and which of them were found there."""
    moved, found, _ = cv2.calcOpticalFlowPyrLK(  # type: ignore[call-overload]
        patch, target, points[:, None], None, winSize=_FLOW_WINDOW, maxLevel=_FLOW_LEVELS
    )
    return np.asarray(moved, np.float32)[:, 0], np.asarray(found)[:, 0] == 1


def _growth(before: NDArray[np.float32], after: NDArray[np.float32]) -> float:
    """The median ratio of the distances between points, limited."""
    if len(before) < _FEWEST:
        return 1.0
    first, second = np.triu_indices(len(before), 1)
    old = np.linalg.norm(before[first] - before[second], axis=1)
    new = np.linalg.norm(after[first] - after[second], axis=1)
    return float(np.clip(np.median(new / old), 1 / _GROWTH, _GROWTH))
