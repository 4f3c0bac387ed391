# SPDX-License-Identifier: Apache-2.0
"""The DAVIS 2017 semi-supervised protocol on one sequence, and the statistics of its scores."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .metrics import contour_accuracy, region_similarity

VOID = 255  # label of pixels that belong to no object and are scored as background
Scores = NDArray[np.float64]
LabelMap = NDArray[np.integer]


class Statistics(NamedTuple):
    """Mean, recall (share of frames above 0.5) and decay (first quarter minus last) of per-frame scores."""

    mean: float
    recall: float
    decay: float


def statistics(values: ArrayLike) -> Statistics:
    """Mean, recall and decay of the scores of one object.

    Args:
        values: (T,) scores of the scored frames in their order, T >= 1.

    Returns:
        Statistics: mean; recall, the share of frames with a score above 0.5; decay, the mean over the first
        quarter of the frames minus the mean over the last (quarters share their end frames).

    Raises:
        ValueError: no values, or more than one dimension.

    Note:
        The official code keeps the quarters' ends in 8 bits, which gives another decay (or NaN) beyond 256
        scored frames, more than any DAVIS sequence has. Here the definition holds at every length.
        Source: Perazzi et al., CVPR 2016, sec. 5.2; DAVIS 2017 benchmark.
    """
    scores = np.asarray(values, dtype=np.float64)
    if scores.ndim != 1 or scores.size == 0:
        raise ValueError(f"values must be the scores (T,) of T >= 1 frames, got shape {scores.shape}")
    ends = np.round(np.linspace(1, scores.size, 5) + 1e-10).astype(int) - 1
    decay = scores[: ends[1] + 1].mean() - scores[ends[3] :].mean()
    return Statistics(float(scores.mean()), float((scores > 0.5).mean()), float(decay))


@dataclass(frozen=True)
class SequenceScore:
    """Scores of one sequence.

    Attributes:
        name: of the sequence.
        frames: names of the T scored frames.
        j: (objects, T) float64 region similarity.
        f: (objects, T) float64 contour accuracy.
    """

    name: str
    frames: tuple[str, ...]
    j: Scores
    f: Scores

    @property
    def num_objects(self) -> int:
        """Number of objects."""
        return len(self.j)

    @property
    def object_names(self) -> list[str]:
        """`<sequence>_<object>`, the names of the benchmark's per-sequence table."""
        return [f"{self.name}_{label}" for label in range(1, self.num_objects + 1)]

    @property
    def j_statistics(self) -> list[Statistics]:
        """Statistics of J, one entry per object."""
        return [statistics(values) for values in self.j]

    @property
    def f_statistics(self) -> list[Statistics]:
        """Statistics of F, one entry per object."""
        return [statistics(values) for values in self.f]

    @property
    def j_mean(self) -> float:
        """Mean J over objects and frames."""
        return float(self.j.mean())

    @property
    def f_mean(self) -> float:
        """Mean F over objects and frames."""
        return float(self.f.mean())

    @property
    def jf_mean(self) -> float:
        """J&F: the mean of the mean J and the mean F."""
        return (self.j_mean + self.f_mean) / 2


def evaluate_sequence(
    gt_label_maps: Iterable[ArrayLike],
    predicted_label_maps: Iterable[ArrayLike],
    *,
    name: str = "sequence",
    frames: Sequence[str] | None = None,
    single_object: bool = False,
) -> SequenceScore:
    """Score the predicted label maps of one sequence under the semi-supervised protocol.

    The first frame gives the number of objects (its largest label); it and the last frame are not scored.
    Void (255) counts as background, in the ground truth and in the prediction. An object that a frame does
    not show is scored as empty.

    Args:
        gt_label_maps: (H, W) integer label maps of every frame, 0 = background, 1..n = objects, 255 = void.
        predicted_label_maps: label maps of the same frames. Those of the first and of the last frame are
            not looked at.
        name: of the sequence.
        frames: names of all frames; 00000, 00001, ... by default.
        single_object: score the union of the objects (every label above 0) as one object.

    Returns:
        SequenceScore over the T - 2 frames between the first and the last.

    Raises:
        ValueError: fewer than three frames; as many predictions as ground-truth frames are not there; no
            object in the first frame; a size that differs; a predicted label above the number of objects.
        TypeError: a label map that is not an integer array.

    Note:
        Cost: a few ms per frame and object at 854x480. Both iterables are read one frame at a time, at
        most two frames are held.
        Source: Pont-Tuset et al., The 2017 DAVIS Challenge on Video Object Segmentation, arXiv:1704.00675.

    Example:
        >>> score = evaluate_sequence(gt_label_maps, predicted_label_maps, name="camel")
        >>> score.j_mean, score.f_mean, score.j_statistics[0].decay
    """
    rows: list[tuple[Scores, Scores]] = []
    pending: tuple[str, LabelMap, ArrayLike] | None = None
    num_objects, count = 0, 0
    for count, (gt, prediction) in enumerate(zip_longest(gt_label_maps, predicted_label_maps), start=1):
        frame = f"{count - 1:05d}" if frames is None else frames[count - 1] if count <= len(frames) else "?"
        if gt is None or prediction is None:
            missing = "predicted_label_maps" if prediction is None else "gt_label_maps"
            raise ValueError(f"{name}: {missing} ends before frame {frame}, the other goes on")
        labels = _check_labels(f"{name}, frame {frame}: ground truth", gt)
        if count == 1:
            num_objects = min(int(labels.max()), 1) if single_object else int(labels.max())
            if num_objects == 0:
                raise ValueError(f"{name}, frame {frame}: the ground truth of the first frame has no object")
        # A frame is scored once its successor has come: the last one never is.
        if pending is not None:
            rows.append(_score_frame(name, *pending, num_objects, single_object))
        pending = (frame, labels, prediction) if count > 1 else None
    if not rows:
        raise ValueError(
            f"{name}: has {count} frames; at least 3 are needed, since the first and the last are not scored"
        )
    if frames is not None and len(frames) != count:
        raise ValueError(f"frames must name the {count} frames of {name}, got {len(frames)} names")
    names = [f"{index:05d}" for index in range(count)] if frames is None else frames
    j, f = (np.stack(scores, axis=1) for scores in zip(*rows, strict=True))
    return SequenceScore(name, tuple(names[1:-1]), j, f)


def _score_frame(
    name: str, frame: str, gt: LabelMap, prediction: ArrayLike, num_objects: int, single_object: bool
) -> tuple[Scores, Scores]:
    """J and F of every object of a frame.  # [objects], [objects]"""
    labels = _check_labels(f"{name}, frame {frame}: prediction", prediction)
    if labels.shape != gt.shape:
        raise ValueError(
            f"{name}, frame {frame}: prediction must have the size of the ground truth, "
            f"{gt.shape[1]}x{gt.shape[0]}, got {labels.shape[1]}x{labels.shape[0]}"
        )
    if single_object:
        pairs = [(gt > 0, labels > 0)]
    else:
        largest = int(labels.max())
        if largest > num_objects:
            raise ValueError(
                f"{name}, frame {frame}: prediction has label {largest}, the ground truth of the first frame "
                f"has {num_objects} object{'s' * (num_objects > 1)}"
            )
        pairs = [(gt == label, labels == label) for label in range(1, num_objects + 1)]
    j = np.array([region_similarity(*pair) for pair in pairs], dtype=np.float64)
    f = np.array([contour_accuracy(*pair) for pair in pairs], dtype=np.float64)
    return j, f


def _check_labels(what: str, label_map: ArrayLike) -> LabelMap:
    """The label map with void made background."""
    labels = np.asarray(label_map)
    if labels.ndim != 2 or labels.size == 0:
        raise ValueError(f"{what} must be a label map (H, W), got shape {labels.shape}")
    if not np.issubdtype(labels.dtype, np.integer):
        raise TypeError(f"{what} must hold integer labels, got {labels.dtype}")
    if labels.min() < 0:
        raise ValueError(f"{what} must hold labels 0 to 255, got {labels.min()}")
    return np.where(labels == VOID, labels.dtype.type(0), labels)
