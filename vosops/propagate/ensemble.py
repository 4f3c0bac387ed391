# SPDX-License-Identifier: Apache-2.0
"""Ensembles: several segmenters follow the same objects; their probabilities are merged per frame."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .augment import check_frame
from .keypoints import Followed, KeypointMatcher, KeypointTrail, SiftMatcher
from .probabilities import with_background
from .run import VideoSegmenter
from .tracker import check_labels

Frame = NDArray[np.uint8]
_Result = tuple[list[int], Tensor]  # a member's object ids, and its probabilities [1+O, H, W]

MERGES = ("average", "maximum", "weighted", "keypoints")
"""The ways in which an `EnsembleSegmenter` merges."""


class EnsembleSegmenter:
    """Runs several segmenters side by side and merges the probabilities; it is a `VideoSegmenter` itself.

    Each member has its own memory, in which it remembers its own masks; only the results are merged. Members
    may differ in everything: model, stride, options, augmentation; a `SavedProbabilities` among them is a
    run read from disk, and an ensemble of those alone is an offline one.

    Objects are matched by id. A member that does not know an object has no part in its probability: that is
    merged over the members that do.

    - "average": an object's probability is the mean over the members, and the background what objects leave.
    - "weighted": the same with one weight per member.
    - "maximum": an object's score is the greatest of its probabilities, and the background's likewise; scores
      are divided by their sum. A member's background counts less what others give objects it does not know.
    - "keypoints": keypoints inside an object's mask on the frame before (the merged one) are found again on
      the frame. Each member weighs, for this object, as many of them as its own mask keeps inside. Without
      keypoints, or where no member keeps any (all masks are empty, say), the object is averaged.

    Args:
        members: one or more segmenters, new, each its own.
        merge: of `MERGES`.
        weights: of the members, above 0, with merge="weighted" and only then.
        matcher: finds and matches keypoints with merge="keypoints"; SIFT by default.

    Raises:
        TypeError, ValueError: a bad argument, named.

    Note:
        Cost: the members' own, one after the other, and one pass over each result; with keypoints, theirs on
        one frame besides. Memory: the members' own, and a few results, whatever the number of members.

    Example:
        >>> members = [Tracker(models.load("stcn", "stcn.pth")), LabelPropagator()]
        >>> ensemble = EnsembleSegmenter(members, merge="keypoints")
        >>> offline = EnsembleSegmenter([SavedProbabilities(folder) for folder in folders])
    """

    def __init__(
        self,
        members: Sequence[VideoSegmenter],
        merge: str = "average",
        weights: Sequence[float] | None = None,
        matcher: KeypointMatcher | None = None,
    ) -> None:
        self._members: list[Any] = list(members)
        if not self._members or len({id(member) for member in self._members}) < len(self._members):
            raise ValueError("members must be one or more segmenters, each of them once")
        for member in self._members:
            if isinstance(member, type) or not hasattr(member, "step"):
                raise TypeError(f"members must be segmenters (add, step, ...), got {member!r}")
        if merge not in MERGES:
            raise ValueError(f"merge must be one of {', '.join(MERGES)}, got {merge!r}")
        if (weights is not None) != (merge == "weighted"):
            raise ValueError(f"weights go with merge='weighted', got weights={weights} with {merge!r}")
        if matcher is not None and merge != "keypoints":
            raise ValueError(f"matcher goes with merge='keypoints', got {merge!r}")
        self._merge = merge
        self._weights = [1.0] * len(self._members) if weights is None else _check_weights(weights)
        if len(self._weights) != len(self._members):
            raise ValueError(
                f"weights must be {len(self._members)}, one per member, got {len(self._weights)}"
            )
        self._trail = KeypointTrail(matcher or SiftMatcher()) if merge == "keypoints" else None
        self._size: tuple[int, int] | None = None

    @property
    def object_ids(self) -> list[int]:
        """Ids of the objects that any member follows, in the order of channels 1..O: by member."""
        return list(dict.fromkeys(i for member in self._members for i in member.object_ids))

    @property
    def memory_nbytes(self) -> int:
        """Bytes of memory allocated by all members (by segmenters that tell, like `Tracker`)."""
        return sum(int(member.memory_nbytes) for member in self._members)

    def add(self, frame: Frame, mask: NDArray[Any]) -> None:
        """Takes a frame with its mask, as every member's own `add`.

        Args:
            frame: (H, W, 3) uint8 RGB: the frame of the last `step`, or the next one.
            mask: (H, W) integer ids, 0 background, 255 void.

        Raises:
            TypeError, ValueError: a bad frame or mask; nothing has changed. What a member refuses beyond that
                leaves the members before it changed.
        """
        size = check_frame(frame, self._size)
        labels = check_labels(mask, frame.shape[:2])
        trail = self._trail
        if trail is not None and self._size is not None and not trail.shows(frame):
            self.step(frame)
        for member in self._members:
            member.add(frame, mask)
        self._size = size
        if trail is not None:
            if trail.shows(frame):
                trail.lay(labels)
            else:
                trail.see(frame, labels)

    def step(self, frame: Frame) -> Tensor:
        """Segments the next frame with every member.

        Args:
            frame: (H, W, 3) uint8 RGB, of the first frame's size.

        Returns:
            (1 + O, H, W) float32 probabilities, background first, summing to 1.

        Raises:
            RuntimeError: no mask was added yet.
            TypeError, ValueError: a bad frame, nothing has changed; or a member's probabilities have another
                shape than its objects and the frame ask for. And what the members raise.
        """
        size = check_frame(frame, self._size)
        if self._size is None:
            raise RuntimeError("step needs objects to follow: call add(frame, mask) with the first frame")
        followed = None if self._trail is None else self._trail.follow(frame)
        results = self._results(frame, size)
        if self._merge == "maximum":
            probabilities = _maximum(results)
        else:
            probabilities = _mean(results, self._weights, followed)
        if self._trail is not None:
            ids = np.array([0, *self.object_ids])
            self._trail.see(frame, ids[probabilities.argmax(0).cpu().numpy()])
        return probabilities

    def remove(self, object_ids: Iterable[int]) -> None:
        """Forgets objects in every member that follows them.

        Raises:
            TypeError: a member that follows one cannot remove it (no `remove`); nothing has changed.
            ValueError: an id that no member follows; nothing has changed.
        """
        ids = list(object_ids)
        unknown = [i for i in ids if i not in self.object_ids]
        if unknown:
            raise ValueError(f"object_ids must be ids of {self.object_ids}, got {ids}")
        mine = [[i for i in ids if i in member.object_ids] for member in self._members]
        for member, leaving in zip(self._members, mine, strict=True):
            if leaving and not hasattr(member, "remove"):
                raise TypeError(f"{type(member).__name__} cannot remove objects")
        for member, leaving in zip(self._members, mine, strict=True):
            if leaving:
                member.remove(leaving)

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on exactly: the states of all members, and what keypoints start from."""
        return {
            **self._settings(),
            "size": None if self._size is None else list(self._size),
            "trail": None if self._trail is None else self._trail.state_dict(),
            "states": [member.state_dict() for member in self._members],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes a state back, in a new object with the same members and options.

        Raises:
            ValueError: members or options differ; nothing has changed. What a member refuses leaves the
                members before it changed.
        """
        for name, mine in self._settings().items():
            if state[name] != mine:
                raise ValueError(f"state was saved with {name} {state[name]}, this ensemble has {mine}")
        size, trail = state["size"], state["trail"]
        for member, saved in zip(self._members, state["states"], strict=True):
            member.load_state_dict(saved)
        if self._trail is not None:
            self._trail.load_state_dict(trail)
        self._size = None if size is None else (size[0], size[1])

    def _results(self, frame: Frame, size: tuple[int, int]) -> Iterator[_Result]:
        """What each member finds, one after the other, on the device of the first."""
        device: torch.device | None = None
        for number, member in enumerate(self._members):
            found: Tensor = member.step(frame)
            ids = list(member.object_ids)
            expected = (1 + len(ids), *size)
            if tuple(found.shape) != expected:
                raise ValueError(
                    f"member {number} ({type(member).__name__}) must return probabilities {list(expected)}, "
                    f"got {list(found.shape)}"
                )
            device = found.device if device is None else device
            yield ids, found.to(device, torch.float32)

    def _settings(self) -> dict[str, Any]:
        """What a state must share with the ensemble that takes it back."""
        return {
            "members": [type(member).__name__ for member in self._members],
            "merge": self._merge,
            "weights": list(self._weights),
            "matcher": None if self._trail is None else repr(self._trail.matcher),
        }


class _Sums:
    """Weighted sums of the objects' probabilities."""

    def __init__(self) -> None:
        self._sums: dict[int, Tensor] = {}  # [H, W]
        self._weights: dict[int, float] = {}

    def take(self, ids: Sequence[int], found: Tensor, weights: Mapping[int, float]) -> None:
        """Adds probabilities (1+O, H, W) of the objects that have a weight above 0."""
        for i, probability in zip(ids, found[1:], strict=True):
            weight = weights.get(i, 0.0)
            if not weight:
                continue
            if i in self._sums:
                self._sums[i].add_(probability, alpha=weight)
            else:
                self._sums[i] = probability * weight
            self._weights[i] = self._weights.get(i, 0.0) + weight

    def means(self) -> dict[int, Tensor]:
        """The mean (H, W) of every object that has a weight."""
        return {i: total / self._weights[i] for i, total in self._sums.items()}


def _mean(results: Iterable[_Result], weights: Sequence[float], followed: Followed | None) -> Tensor:
    """Probabilities (1+O, H, W): of each object the mean by votes, or by weights where none were cast."""
    weighted, voted = _Sums(), _Sums()
    for weight, (ids, found) in zip(weights, results, strict=True):
        weighted.take(ids, found, dict.fromkeys(ids, weight))
        if followed is not None:
            voted.take(ids, found, followed.kept(found, ids))
    objects = [*(weighted.means() | voted.means()).values()]
    return with_background(torch.stack(objects) if objects else found[:0])


def _maximum(results: Iterable[_Result]) -> Tensor:
    """Probabilities (1+O, H, W): the greatest scores of objects and background, over their sum."""
    objects: dict[int, Tensor] = {}  # [H, W]
    backgrounds: dict[frozenset[int], Tensor] = {}  # [H, W] of the members that know these objects
    for ids, found in results:
        _raise_to(backgrounds, frozenset(ids), found[0])
        for i, probability in zip(ids, found[1:], strict=True):
            _raise_to(objects, i, probability)
    background = torch.zeros_like(next(iter(backgrounds.values())))
    for known, score in backgrounds.items():
        for i in objects.keys() - known:
            score = score - objects[i]
        background = torch.maximum(background, score)
    scores = torch.stack([background, *objects.values()])
    return scores / scores.sum(0, keepdim=True)


def _raise_to(scores: dict[Any, Tensor], key: Any, probability: Tensor) -> None:
    """Takes the greater of a score and a probability, both (H, W)."""
    if key in scores:
        scores[key] = torch.maximum(scores[key], probability)
    else:
        scores[key] = probability.clone()


def _check_weights(weights: object) -> list[float]:
    if isinstance(weights, str) or not isinstance(weights, Sequence):
        raise TypeError(f"weights must be a sequence of numbers, got {type(weights).__name__}")
    for weight in weights:
        if isinstance(weight, bool) or not isinstance(weight, int | float):
            raise TypeError(f"weights must be numbers, got {weight!r}")
        if not math.isfinite(weight) or weight <= 0:
            raise ValueError(f"weights must be finite and above 0, got {weight}")
    return [float(weight) for weight in weights]
