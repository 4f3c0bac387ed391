# SPDX-License-Identifier: Apache-2.0
"""Keypoints of the objects followed from frame to frame: what tells members of an ensemble apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Frame = NDArray[np.uint8]
Labels = NDArray[np.int64]  # [H, W] object ids

_MOST = 4096  # keypoints of a frame, the strongest


class Keypoints(NamedTuple):
    """Keypoints of a frame.

    points: (N, 2) float32 x, y in pixels, the centre of the first pixel at 0, 0.
    descriptors: (N, D), as their matcher likes them.
    size: (H, W) of the frame.
    """

    points: NDArray[np.float32]
    descriptors: Any
    size: tuple[int, int]


class KeypointMatcher(Protocol):
    """Finds keypoints and matches those of two frames; its `repr` tells its options."""

    def detect(self, frame: Frame) -> Keypoints:
        """Keypoints of a frame (H, W, 3) uint8 RGB; the same for the same frame."""

    def match(self, previous: Keypoints, current: Keypoints, chosen: NDArray[np.intp]) -> NDArray[np.intp]:
        """Matches some of the previous keypoints.

        Args:
            previous, current: of `detect`.
            chosen: (C,) indices into previous, ascending; the others still compete for the current ones.

        Returns:
            (M, 2) indices into previous and current; each at most once, those of previous among chosen.
        """


@dataclass(frozen=True)
class SiftMatcher:
    """OpenCV's SIFT, matched by mutual nearest neighbours that pass the ratio test.

    Args:
        ratio: a match counts if its distance is below this share of the distance to the second neighbour.

    Raises:
        TypeError, ValueError: ratio is no number in (0, 1].

    Note:
        Cost at 854x480 on one core: 0.1 to 0.2 s for the keypoints of a frame (900 to 3,900 of them).
        At most 4,096 keypoints of a frame.

    Source: Lowe, Distinctive Image Features from Scale-Invariant Keypoints, IJCV 2004 (ratio 0.8: sec. 7.1).
    """

    ratio: float = 0.8

    def __post_init__(self) -> None:
        if isinstance(self.ratio, bool) or not isinstance(self.ratio, int | float):
            raise TypeError(f"ratio must be a number, got {type(self.ratio).__name__}")
        if not 0 < self.ratio <= 1:
            raise ValueError(f"ratio must lie in (0, 1], got {self.ratio}")

    def detect(self, frame: Frame) -> Keypoints:
        """Keypoints with descriptors (N, 128) float32; see `KeypointMatcher.detect`."""
        grey = cv2.cvtColor(np.ascontiguousarray(frame), cv2.COLOR_RGB2GRAY)
        found, descriptors = cv2.SIFT.create(nfeatures=_MOST).detectAndCompute(grey, None)
        points = np.array([point.pt for point in found], np.float32).reshape(-1, 2)
        if descriptors is None:
            descriptors = np.empty((0, 128), np.float32)
        return Keypoints(points, descriptors, (frame.shape[0], frame.shape[1]))

    def match(self, previous: Keypoints, current: Keypoints, chosen: NDArray[np.intp]) -> NDArray[np.intp]:
        """Index pairs (M, 2); none if the current frame has fewer than two keypoints to compare."""
        if not len(chosen) or len(current.points) < 2:
            return np.empty((0, 2), np.intp)
        squared = _squared_distances(previous.descriptors[chosen], current.descriptors)  # [C, N]
        best = squared.argmin(1)
        nearest, second = np.partition(squared, 1, axis=1)[:, :2].T
        passed = nearest < self.ratio**2 * second
        # Only the current keypoints in question have to be compared with all previous ones.
        back = _squared_distances(current.descriptors[best[passed]], previous.descriptors).argmin(1)
        pairs = np.stack((chosen[passed], best[passed]), 1)
        return pairs[back == pairs[:, 0]]


class LightGlueMatcher:
    """DISK keypoints matched by LightGlue, both of kornia, which must be installed.

    Args:
        disk: a `kornia.feature.DISK`; None takes kornia's "depth" weights, which torch.hub downloads.
        lightglue: a `kornia.feature.LightGlueMatcher`; None takes kornia's for DISK, downloaded likewise.
        device: to run on.

    Raises:
        ImportError: kornia is not installed.

    Note:
        At most 4,096 keypoints of a frame. LightGlue matches all keypoints at once and decides by itself
        what is a match.

    Source: Tyszkiewicz et al., DISK, NeurIPS 2020; Lindenberger et al., LightGlue, ICCV 2023.
    """

    def __init__(
        self, disk: Any = None, lightglue: Any = None, *, device: torch.device | str = "cpu"
    ) -> None:
        try:
            import kornia.feature as kornia_feature
        except ImportError as error:
            raise ImportError(
                "LightGlueMatcher needs kornia, which is not installed (pip install kornia)"
            ) from error
        self._kornia = kornia_feature
        self._device = torch.device(device)
        disk = kornia_feature.DISK.from_pretrained("depth") if disk is None else disk
        lightglue = kornia_feature.LightGlueMatcher("disk") if lightglue is None else lightglue
        self._disk = disk.to(self._device).eval()
        self._lightglue = lightglue.to(self._device).eval()

    def __repr__(self) -> str:
        return "LightGlueMatcher()"

    @torch.no_grad()
    def detect(self, frame: Frame) -> Keypoints:
        """Keypoints with descriptors (N, 128), a tensor; see `KeypointMatcher.detect`."""
        image = torch.from_numpy(frame.copy()).to(self._device).permute(2, 0, 1)[None].float() / 255
        found = self._disk(image, _MOST, pad_if_not_divisible=True)[0]
        points = found.keypoints.float().cpu().numpy()
        return Keypoints(points, found.descriptors, (frame.shape[0], frame.shape[1]))

    @torch.no_grad()
    def match(self, previous: Keypoints, current: Keypoints, chosen: NDArray[np.intp]) -> NDArray[np.intp]:
        """Index pairs (M, 2); see `KeypointMatcher.match`."""
        if not len(chosen) or not len(current.points):
            return np.empty((0, 2), np.intp)
        frames = [
            self._kornia.laf_from_center_scale_ori(torch.from_numpy(found.points)[None].to(self._device))
            for found in (previous, current)
        ]
        _, pairs = self._lightglue(
            previous.descriptors, current.descriptors, *frames, hw1=previous.size, hw2=current.size
        )
        found = np.asarray(pairs.cpu().numpy(), np.intp).reshape(-1, 2)
        return found[np.isin(found[:, 0], chosen)]


class Followed(NamedTuple):
    """Keypoints of objects found again on a frame.

    points: (K, 2) integer row, column on that frame.
    owners: (K,) id of the object whose mask held each on the frame before.
    """

    points: NDArray[np.intp]
    owners: NDArray[np.int64]

    def kept(self, probabilities: Tensor, object_ids: Sequence[int]) -> dict[int, float]:
        """Share of each object's keypoints that lie inside its mask.

        Args:
            probabilities: (1+O, H, W) of the frame, background first; a pixel belongs to the largest.
            object_ids: O ids, of channels 1..O.

        Returns:
            By id, 0 to 1; objects without a keypoint are left out.
        """
        rows, columns = (torch.from_numpy(x).to(probabilities.device) for x in self.points.T)
        labels = np.array([0, *object_ids])[probabilities[:, rows, columns].argmax(0).cpu().numpy()]
        mine = {i: self.owners == i for i in object_ids}
        return {i: float((labels[own] == i).mean()) for i, own in mine.items() if own.any()}


class KeypointTrail:
    """The keypoints inside the objects of the frame seen last, and where they are on the next one.

    Args:
        matcher: finds and matches keypoints.

    Note:
        Keypoints are detected once on each frame that has objects before it. Memory: one frame, its labels
        and its keypoints.
    """

    def __init__(self, matcher: KeypointMatcher) -> None:
        self.matcher = matcher
        self._frame: Frame | None = None
        self._labels: Labels | None = None
        self._keypoints: Keypoints | None = None  # of _frame, once needed
        self._next: tuple[Frame, Keypoints] | None = None  # of the frame that `follow` was given

    def shows(self, frame: Frame) -> bool:
        """Whether this is the frame seen last."""
        return self._frame is not None and np.array_equal(self._frame, frame)

    def see(self, frame: Frame, labels: Labels) -> None:
        """Takes a frame (H, W, 3) uint8 RGB with its label map (H, W), 0 background."""
        if not self.shows(frame):
            known = self._next is not None and np.array_equal(self._next[0], frame)
            self._keypoints = self._next[1] if known and self._next is not None else None
            self._frame = frame.copy()
        self._labels, self._next = labels, None

    def lay(self, mask: Labels) -> None:
        """Lays given labels (H, W), 0 where nothing was given, over those of the frame seen last."""
        assert self._labels is not None
        self._labels = np.where(mask != 0, mask, self._labels)

    def follow(self, frame: Frame) -> Followed:
        """Finds the objects' keypoints of the frame seen last on the next one (H, W, 3) uint8 RGB."""
        none = Followed(np.empty((0, 2), np.intp), np.empty(0, np.int64))
        if self._frame is None or self._labels is None or not self._labels.any():
            return none
        if self._keypoints is None:
            self._keypoints = self.matcher.detect(self._frame)
        previous, current = self._keypoints, self.matcher.detect(frame)
        self._next = (frame.copy(), current)
        owners = self._labels[tuple(_pixels(previous).T)]
        pairs = self.matcher.match(previous, current, np.flatnonzero(owners))
        return Followed(_pixels(current)[pairs[:, 1]], owners[pairs[:, 0]])

    def state_dict(self) -> dict[str, Any]:
        """Frame and labels; keypoints are found again."""
        if self._frame is None or self._labels is None:
            return {"frame": None, "labels": None}
        return {
            "frame": torch.from_numpy(self._frame.copy()),
            "labels": torch.from_numpy(self._labels.copy()),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes a state back, exactly."""
        frame, labels = state["frame"], state["labels"]
        self._frame = None if frame is None else frame.numpy().copy()
        self._labels = None if labels is None else labels.numpy().copy()
        self._keypoints = self._next = None


def _pixels(keypoints: Keypoints) -> NDArray[np.intp]:
    """The pixel of each point.  # [N, 2] row, column"""
    last = np.array(keypoints.size) - 1
    nearest = np.rint(keypoints.points[:, ::-1]).astype(np.intp)
    return np.asarray(nearest.clip(0, last), np.intp)


def _squared_distances(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float32]:
    """[N, M] of descriptors (N, D) and (M, D)."""
    squares = (a * a).sum(1)[:, None] + (b * b).sum(1)
    return np.asarray(np.maximum(squares - 2 * (a @ b.T), 0), np.float32)
