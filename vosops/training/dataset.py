# SPDX-License-Identifier: Apache-2.0
"""The random clips that training draws, from one or several sources."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info
from torchvision.transforms.v2 import functional

from .clips import Clip, DataError, first_frame_objects
from .merge import merge_clips
from .refine import PatchSource
from .sources import MIN_PIXELS, Phase, Sample, Source
from .static import StaticSource
from .transforms import hide
from .video import VideoSource, find_sequences

Layout = Literal["regions", "saliency", "davis", "youtube"]
Colour = Literal["light", "strong"]

_DRAWS = 10  # clips drawn until one keeps an object


@dataclass(frozen=True)
class SourceConfig:
    """One data set.

    Attributes:
        layout: "regions": `images/*.jpg` beside label maps `regions/*.png`, of which one to three regions
            become objects. "saliency": images beside grey masks of one object, in the folders of DUTS, ECSSD
            or `images`, `masks`. "davis": `JPEGImages/480p/<sequence>`, `Annotations/480p/<sequence>`.
            "youtube": `JPEGImages/<sequence>`, `Annotations/<sequence>` (sparse labels), `meta.json` if any.
        path: the folder; a relative one starts at `train_data_root()`.
        ratio: of this source's clips to the others'.
        max_gap: greatest distance of two successive frames of a clip, in annotated frames; videos only.
        sequences: a list under `ImageSets`, as "2017/train.txt"; all annotated sequences without one.
        only, without: names of sequences, of those listed, to take and to leave out; videos only.
        predictions: folders of masks <sequence>/<frame>.png that models predicted, for `patches` alone;
            relative ones start at `train_data_root()`.
    """

    layout: Layout
    path: str = "."
    ratio: float = 1.0
    max_gap: int = 5
    sequences: str | None = None
    only: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    predictions: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.layout not in get_args(Layout):
            raise ValueError(f"layout must be one of {', '.join(get_args(Layout))}, got {self.layout!r}")
        if not self.ratio > 0:
            raise ValueError(f"ratio must be above 0, got {self.ratio}")
        if self.max_gap < 1:
            raise ValueError(f"max_gap must be at least 1 frame, got {self.max_gap}")


@dataclass(frozen=True)
class DataConfig:
    """What clips are drawn from, and how they are changed.

    Attributes:
        sources: at least one; mappings, as YAML gives them, become SourceConfig.
        patches: clips are patches of one frame with a degraded mask and the true one (`PatchSource`), which a
            boundary refiner is trained on.
        clips_per_epoch: length of the data set; clips are random, so an epoch is only a unit of counting.
        merge: probability that the objects of a second clip are pasted into a clip.
        distract: probability that a random number of the objects is asked for, from one to all allowed; the
            others stay in sight as background, so that not everything that stands out is an object.
        warp: probability that each frame of a video clip is warped on its own, as still images are.
        colour: "light" is AOT's jitter, "strong" that of its version 2 with grey and blur.
        hide: probability that a clip goes through KMN's Hide-and-Seek.
        calm_from: share of the training from which on strong colour, warps of videos and hiding are off.
    """

    sources: tuple[SourceConfig, ...]
    patches: bool = False
    clips_per_epoch: int = 1000
    merge: float = 0.5
    distract: float = 0.2
    warp: float = 0.0
    colour: Colour = "light"
    hide: float = 0.0
    calm_from: float = 0.9

    def __post_init__(self) -> None:
        sources = tuple(SourceConfig(**s) if isinstance(s, Mapping) else s for s in self.sources)
        object.__setattr__(self, "sources", sources)
        if not sources:
            raise ValueError("sources must name at least one data set, got none")
        if self.patches and self.merge:
            raise ValueError(f"merge must be 0 where clips are patches, got {self.merge}")
        if not self.patches and any(source.predictions for source in sources):
            raise ValueError("predictions of a source are for patches: true alone")
        if self.clips_per_epoch < 1:
            raise ValueError(f"clips_per_epoch must be at least 1, got {self.clips_per_epoch}")
        if self.colour not in get_args(Colour):
            raise ValueError(f"colour must be one of {', '.join(get_args(Colour))}, got {self.colour!r}")
        for name in ("merge", "distract", "warp", "hide", "calm_from"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name)}")


class ClipDataset(Dataset[Clip]):
    """Random clips. Item i is a function of (seed, epoch, progress, i), whoever computes it, in any order.

    So a loop that was stopped goes on exactly: it sets epoch and progress again and asks for the items that
    follow. Both live in shared memory; set them before the DataLoader's iterator of the epoch is made, and
    workers, persistent ones too, have them.

    Args:
        config: the sources and the changes.
        frames: T, at least 2.
        crop: H and W, pixels.
        max_objects: most objects in a clip, 1 to 254.
        seed: of everything random, not negative.

    Raises:
        TypeError, ValueError: an argument out of range, named.
        DataError: a source that cannot be used; names the file or folder.

    Note:
        Cost on one core: a clip of three frames of 384 x 384 takes about 15 ms from an image, 18 ms from
        video of 854x480, and twice that where two are merged. Making the data set only lists folders.
    """

    def __init__(self, config: DataConfig, *, frames: int, crop: int, max_objects: int, seed: int) -> None:
        for name, value, low, high in (
            ("frames", frames, 2, None),
            ("crop", crop, 32, None),
            ("max_objects", max_objects, 1, 254),
            ("seed", seed, 0, None),
        ):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
            if value < low or (high is not None and value > high):
                upper = "" if high is None else f" and at most {high}"
                raise ValueError(f"{name} must be at least {low}{upper}, got {value}")
        self.config, self.frames, self.crop = config, frames, crop
        self.max_objects, self.seed = max_objects, seed
        self.sources = [open_source(source, config.patches) for source in config.sources]
        ratios = np.array([source.ratio for source in config.sources])
        self._shares = ratios / ratios.sum()
        self._state = torch.zeros(2, dtype=torch.float64).share_memory_()  # epoch, progress

    def set_epoch(self, epoch: int) -> None:
        """Another epoch has other clips.

        Raises:
            ValueError: epoch is negative.
        """
        if epoch < 0:
            raise ValueError(f"epoch must not be negative, got {epoch}")
        self._state[0] = epoch

    def set_progress(self, fraction: float) -> None:
        """Tells the share of the training that is done, 0 to 1: gaps grow with it, strong changes end.

        Raises:
            ValueError: fraction lies outside [0, 1].
        """
        if not 0 <= fraction <= 1:
            raise ValueError(f"fraction must lie in [0, 1], got {fraction}")
        self._state[1] = fraction

    def __len__(self) -> int:
        return self.config.clips_per_epoch

    def __getitem__(self, index: int) -> Clip:
        if not 0 <= index < len(self):
            raise IndexError(f"index must lie in [0, {len(self)}), got {index}")
        if get_worker_info() is not None:
            # A forked worker must not enter OpenCV's thread pool, whose threads stayed in the parent.
            cv2.setNumThreads(0)
        epoch, progress = self._state.tolist()
        rng = np.random.default_rng([self.seed, int(epoch), index])
        calm = progress >= self.config.calm_from
        phase = Phase(
            progress,
            strong=self.config.colour == "strong" and not calm,
            warp=0.0 if calm else self.config.warp,
        )
        for _ in range(_DRAWS):
            sample = self._sample(rng, phase)
            frames = functional.to_dtype(sample.frames.as_subclass(Tensor), torch.float32, scale=True)
            labels = sample.labels.as_subclass(Tensor)
            if not calm and rng.random() < self.config.hide:
                frames, labels = hide(frames, labels, rng)
            most = self.max_objects
            if rng.random() < self.config.distract:
                most = int(rng.integers(1, most + 1))
            labels, objects = first_frame_objects(labels, max_objects=most, min_pixels=MIN_PIXELS, rng=rng)
            if objects:
                return Clip(frames.contiguous(), labels, objects, sample.name)
        raise DataError(
            f"{', '.join(str(s.path) for s in self.config.sources)}: {_DRAWS} clips with crop {self.crop} "
            "show no object in their first frame"
        )

    def _sample(self, rng: np.random.Generator, phase: Phase) -> Sample:
        """A clip of a random source; with the objects of another one pasted in, if the draw says so."""
        merge = rng.random() < self.config.merge
        below = self._draw(rng, phase)
        if not merge:
            return below
        return merge_clips(below, self._draw(rng, phase), rng) or below

    def _draw(self, rng: np.random.Generator, phase: Phase) -> Sample:
        source = self.sources[int(rng.choice(len(self.sources), p=self._shares))]
        return source.draw(rng, frames=self.frames, crop=self.crop, phase=phase)


def build_dataset(config: DataConfig, *, frames: int, crop: int, max_objects: int, seed: int) -> ClipDataset:
    """The random clips of a stage of training; the arguments are those of `ClipDataset`.

    Example:
        >>> data = build_dataset(config, frames=3, crop=384, max_objects=3, seed=0)  # doctest: +SKIP
        >>> data.set_epoch(4), data.set_progress(0.25)  # doctest: +SKIP
        >>> loader = DataLoader(data, 4, collate_fn=collate, num_workers=2)  # doctest: +SKIP
    """
    return ClipDataset(config, frames=frames, crop=crop, max_objects=max_objects, seed=seed)


def open_source(config: SourceConfig, patches: bool = False) -> Source:
    """The source that a configuration names, or the patches of its frames.

    Raises:
        DataError: it cannot be used; names the file or folder.
    """
    root = train_data_root() / config.path
    if not root.is_dir():
        raise DataError(f"{root}: no such folder of training data (VOSOPS_TRAIN_DATA is where paths start)")
    source: StaticSource | VideoSource
    if config.layout == "regions" or config.layout == "saliency":
        source = StaticSource(root, config.layout)
    else:
        sequences = find_sequences(root, config.layout, config.sequences)
        names = {sequence.name for sequence in sequences}
        for name in (*config.only, *config.without):
            if name not in names:
                raise DataError(f"{root}: has no sequence {name!r} to take or leave out")
        taken = (set(config.only) or names) - set(config.without)
        if not taken:
            raise DataError(f"{root}: only and without leave no sequence")
        source = VideoSource([s for s in sequences if s.name in taken], config.max_gap)
    return PatchSource(source, [train_data_root() / p for p in config.predictions]) if patches else source


def train_data_root() -> Path:
    """Where relative paths of training data start: VOSOPS_TRAIN_DATA, or `../shared/data_train`."""
    return Path(os.environ.get("VOSOPS_TRAIN_DATA", Path("..") / "shared" / "data_train"))
