# SPDX-License-Identifier: Apache-2.0
"""Clips from annotated videos in the layouts of DAVIS and YouTube-VOS."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil, sqrt
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torchvision import tv_tensors

from vosops.data.layouts import LayoutError, image_files, mask_files, subfolders, video_folders
from vosops.data.masks import VOID, LabelMap

from .clips import DataError
from .sources import (
    MIN_PIXELS,
    Phase,
    Sample,
    Source,
    as_sample,
    object_pixels,
    read_label_map,
    read_photograph,
)
from .transforms import RandomColour, RandomWarp, seeded

_FRAME_TRIES = 5  # choices of frames until all objects are in the first one, as in AOT
_SEQUENCE_TRIES = 20
_CROP_TRIES = 5
_GAP_GROWS = 0.5  # share of the training in which the greatest gap grows from 1 to max_gap


@dataclass(frozen=True)
class Sequence:
    """An annotated video: the frames that have a mask.

    Attributes:
        images, masks: the folders.
        frames: names of the annotated frames, in order.
        files: image file names of the same frames.
    """

    images: Path
    masks: Path
    frames: tuple[str, ...]
    files: tuple[str, ...]

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.masks.name


@dataclass(frozen=True)
class _Window:
    """A part of every frame of a clip, pixels of the full frame."""

    left: int
    top: int
    width: int
    height: int

    def of(self, labels: LabelMap) -> LabelMap:
        return labels[self.top : self.top + self.height, self.left : self.left + self.width]


def find_sequences(root: Path, layout: Literal["davis", "youtube"], listed: str | None) -> list[Sequence]:
    """The annotated sequences of a data set, by name.

    Args:
        root: holds `JPEGImages` and `Annotations`. In both, "davis" has a folder of the resolution between
            (480p if there, else the only one), "youtube" has the sequences. A frame belongs to a sequence if
            it has a mask, so labels on every fifth frame give every fifth frame.
        layout: as above.
        listed: file of sequence names under `ImageSets`; without one every sequence with a mask.

    Raises:
        DataError: a missing folder, list or sequence, a mask without its image, or no sequence; names it.

    Note:
        Lists folders and opens no file but `listed`: about 0.3 ms a sequence.
    """
    try:
        folders = video_folders(root, dense=layout == "davis")
    except LayoutError as error:
        raise DataError(str(error)) from error
    if listed is None:
        names = [folder.name for folder in subfolders(folders.masks)]
    else:
        path = root / "ImageSets" / listed
        if not path.is_file():
            raise DataError(f"{path}: no such list of sequences")
        names = path.read_text(encoding="utf-8").split()
    sequences = [_sequence(folders.images / name, folders.masks / name) for name in names]
    if not any(sequence.frames for sequence in sequences):
        raise DataError(f"{folders.masks}: holds no sequence with masks (<sequence>/<frame>.png)")
    return [sequence for sequence in sequences if sequence.frames]


def _sequence(images: Path, masks: Path) -> Sequence:
    for folder in (images, masks):
        if not folder.is_dir():
            raise DataError(f"{folder}: no such sequence")
    files, frames = image_files(images), list(mask_files(masks))
    missing = [frame for frame in frames if frame not in files]
    if missing:
        raise DataError(
            f"{masks / missing[0]}.png: has no image in {images} ({len(missing)} of {len(frames)} have none)"
        )
    return Sequence(images, masks, tuple(frames), tuple(files[frame].name for frame in frames))


class VideoSource(Source):
    """Annotated sequences as a source of clips (second stage of STM, STCN and AOT).

    A clip is a random sequence's frames with random gaps from 1 to a greatest one, which grows from 1 to
    `max_gap` over the first half of the training; at the ends of the sequence they turn back. Half of the
    clips run backwards. The first frame shows an object, and if five choices allow it every object that the
    later frames show. One window of random size (the short side over 1 to 1.6, aspect 0.9 to 1.1), drawn so
    that the first frame keeps object pixels, is cut from all frames and resized; half of the clips are
    mirrored; colours change alike in all frames. A phase with `warp` warps all but the first frame besides,
    each on its own, as STCN does: more motion than a few sequences have.

    Args:
        sequences: from `find_sequences`.
        max_gap: greatest distance of successive frames, counted in annotated frames.
    """

    def __init__(self, sequences: list[Sequence], max_gap: int) -> None:
        self.sequences, self.max_gap = sequences, max_gap

    def draw(self, rng: np.random.Generator, *, frames: int, crop: int, phase: Phase) -> Sample:
        """A clip of one random sequence; see `Source.draw`."""
        gap = 1 + round((self.max_gap - 1) * min(1.0, phase.progress / _GAP_GROWS))
        for _ in range(_SEQUENCE_TRIES):
            sequence = self.sequences[int(rng.integers(len(self.sequences)))]
            chosen = _choose_frames(sequence, frames, gap, rng)
            if chosen is not None:
                return _cut(sequence, *chosen, crop, phase, rng)
        root = self.sequences[0].masks.parent
        raise DataError(
            f"{root}: {_SEQUENCE_TRIES} random sequences show no object in {_FRAME_TRIES} frames each"
        )


def frame_numbers(length: int, frames: int, gap: int, rng: np.random.Generator) -> list[int]:
    """Random numbers of successive frames, 1 to `gap` apart, forwards or backwards, turning at the ends."""
    steps = np.concatenate(([0], np.cumsum(rng.integers(1, gap + 1, frames - 1))))
    positions = int(rng.integers(length)) + (1 if rng.random() < 0.5 else -1) * steps
    if length == 1:
        return [0] * frames
    folded = positions % (2 * (length - 1))
    return [int(i) for i in np.minimum(folded, 2 * (length - 1) - folded)]


def _choose_frames(
    sequence: Sequence, frames: int, gap: int, rng: np.random.Generator
) -> tuple[list[int], list[LabelMap]] | None:
    """Frame numbers and their masks, the first of which shows an object; None where no try gave that."""
    best = None
    for _ in range(_FRAME_TRIES):
        numbers = frame_numbers(len(sequence.frames), frames, gap, rng)
        first = _read_mask(sequence, numbers[0])
        counts = object_pixels(first)
        if counts.max() < MIN_PIXELS:
            continue
        labels = [first, *(_read_mask(sequence, number, first.shape) for number in numbers[1:])]
        best = (numbers, labels)
        later = np.sum([object_pixels(mask) for mask in labels[1:]], 0)
        if not later[counts < MIN_PIXELS].any():
            break
    return best


def _read_mask(sequence: Sequence, number: int, size: tuple[int, ...] | None = None) -> LabelMap:
    path = sequence.masks / f"{sequence.frames[number]}.png"
    labels = read_label_map(path)
    if size is not None and labels.shape != size:
        height, width = labels.shape
        raise DataError(f"{path}: is {width}x{height}, other masks of its sequence {size[1]}x{size[0]} (WxH)")
    return labels


def _cut(
    sequence: Sequence,
    numbers: list[int],
    labels: list[LabelMap],
    crop: int,
    phase: Phase,
    rng: np.random.Generator,
) -> Sample:
    window = _balanced_window(labels[0], crop, rng)
    flip = rng.random() < 0.5
    cut = np.stack(list(_frames(sequence, numbers, labels[0].shape, window, crop)))
    masks = np.stack([_resize(window.of(mask), crop, cv2.INTER_NEAREST_EXACT) for mask in labels])
    if flip:
        cut, masks = cut[:, :, ::-1], masks[:, :, ::-1]
    name = f"{sequence.name}/{','.join(sequence.frames[number] for number in numbers)}"
    sample = as_sample(np.ascontiguousarray(cut), np.ascontiguousarray(masks), name)
    warp = rng.random() < phase.warp
    with seeded(rng):
        frames, moved = RandomColour(strong=phase.strong)(sample.frames, sample.labels)
        if warp:
            frames, moved = _warp_each(frames, moved, crop)
    return Sample(frames, moved, name)


def _warp_each(
    frames: tv_tensors.Image, labels: tv_tensors.Mask, crop: int
) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
    """Every frame but the first under a warp of its own."""
    warp = RandomWarp(crop, affine=True, flip=0.0)
    pairs = [(frames[0], labels[0])]
    pairs += [
        warp(tv_tensors.Image(f), tv_tensors.Mask(m)) for f, m in zip(frames[1:], labels[1:], strict=True)
    ]
    images, masks = zip(*pairs, strict=True)
    return tv_tensors.Image(torch.stack(images)), tv_tensors.Mask(torch.stack(masks))


def _frames(
    sequence: Sequence, numbers: list[int], size: tuple[int, ...], window: _Window, crop: int
) -> Iterator[NDArray[np.uint8]]:
    # The largest reduction in the decoder that still has the detail of the result.
    factor = max(r for r in (1, 2, 4, 8) if r == 1 or min(window.width, window.height) >= r * crop)
    for number in numbers:
        image = read_photograph(sequence.images / sequence.files[number], (size[0], size[1]), factor)
        rows = slice(window.top // factor, ceil((window.top + window.height) / factor))
        columns = slice(window.left // factor, ceil((window.left + window.width) / factor))
        part = image[rows, columns]
        # Averaging takes seven times as long, and shows only where several pixels become one.
        shrinks = min(part.shape[:2]) > 1.3 * crop
        yield _resize(part, crop, cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)


def _resize(picture: NDArray[np.uint8], side: int, interpolation: int) -> NDArray[np.uint8]:
    return np.asarray(cv2.resize(picture, (side, side), interpolation=interpolation), np.uint8)


def _balanced_window(labels: LabelMap, crop: int, rng: np.random.Generator) -> _Window:
    """A random window that keeps object pixels: of five the first with enough, else one around a pixel."""
    height, width = labels.shape
    side, aspect = min(height, width) / rng.uniform(1.0, 1.6), sqrt(rng.uniform(0.9, 1.1))
    across, down = min(width, round(side * aspect)), min(height, round(side / aspect))
    enough = MIN_PIXELS * across * down / crop**2
    for _ in range(_CROP_TRIES):
        left, top = int(rng.integers(width - across + 1)), int(rng.integers(height - down + 1))
        window = _Window(left, top, across, down)
        if object_pixels(window.of(labels)).max() >= enough:
            return window
    rows, columns = np.nonzero((labels > 0) & (labels < VOID))
    pixel = int(rng.integers(len(rows)))
    left, top = (
        columns[pixel] - rng.uniform(0.25, 0.75) * across,
        rows[pixel] - rng.uniform(0.25, 0.75) * down,
    )
    return _Window(int(np.clip(left, 0, width - across)), int(np.clip(top, 0, height - down)), across, down)
