# SPDX-License-Identifier: Apache-2.0
"""What a boundary refiner trains on: patches along boundaries of masks that are wrong as predictions are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torchvision import tv_tensors

from vosops.data.masks import VOID, LabelMap
from vosops.refine.patches import boundary

from .clips import DataError
from .sources import MIN_PIXELS, Phase, Sample, Source, object_pixels, read_label_map, read_photograph
from .static import StaticSource, choose_regions
from .transforms import RandomColour, seeded
from .video import VideoSource

_TRIES = 20  # patches drawn until one shows both the object and its surroundings
_PREDICTED = 0.5  # share of patches with a real prediction, where there is one for the frame
_ZOOM = 1.4  # greatest factor by which a patch is enlarged or reduced
_REACH = 12.0  # pixels: greatest distance by which a degraded boundary is moved as a whole
_COARSE = (4, 8, 16)  # strides of the feature maps of VOS models


@dataclass(frozen=True)
class _Still:
    """A frame with its mask, and masks that models predicted for it."""

    image: Path
    mask: Path
    predictions: tuple[Path, ...]

    @property
    def name(self) -> str:
        return f"{self.mask.parent.name}/{self.mask.stem}"


class PatchSource(Source):
    """Patches of the frames of another source, each with a degraded mask and the true one.

    A patch is centred near a random pixel of the boundary of one object's degraded mask, which is a real
    prediction in half of the patches whose frame has one, else the true mask through `degrade`. Patches are
    mirrored, enlarged or reduced by up to 1.4, and changed in colour.

    Args:
        source: of videos or still images, whose files are read.
        predictions: folders of masks <sequence>/<frame>.png with the ids of the true masks, as
            `vosops segment` writes masks; a frame that a folder lacks has none.

    Raises:
        DataError: a folder of predictions that is missing, or has none for any frame; names it.
    """

    def __init__(self, source: StaticSource | VideoSource, predictions: Sequence[Path] = ()) -> None:
        self._regions = isinstance(source, StaticSource) and source.layout == "regions"
        self._half = isinstance(source, StaticSource) and source.layout == "saliency"
        if isinstance(source, StaticSource):
            pairs = list(zip(source.images, source.masks, strict=True))
        else:
            pairs = [
                (s.images / file, s.masks / f"{frame}.png")
                for s in source.sequences
                for frame, file in zip(s.frames, s.files, strict=True)
            ]
        for folder in predictions:
            if not folder.is_dir():
                raise DataError(f"{folder}: no such folder of predictions")
        self.stills = [_Still(image, mask, _predicted(mask, predictions)) for image, mask in pairs]
        for folder in predictions:
            if not any(p.is_relative_to(folder) for still in self.stills for p in still.predictions):
                raise DataError(f"{folder}: holds no mask <sequence>/<frame>.png of the frames trained on")

    def draw(self, rng: np.random.Generator, *, frames: int, crop: int, phase: Phase) -> Sample:
        """A patch as a clip: one image several times, its first label map degraded, the others true.

        See `Source.draw`.
        """
        for _ in range(_TRIES):
            still = self.stills[int(rng.integers(len(self.stills)))]
            sample = self._patch(still, rng, frames, crop, phase)
            if sample is not None:
                return sample
        raise DataError(f"{self.stills[0].mask.parent}: {_TRIES} random patches show no boundary")

    def _patch(
        self, still: _Still, rng: np.random.Generator, frames: int, crop: int, phase: Phase
    ) -> Sample | None:
        labels = read_label_map(still.mask)
        if self._half:
            labels = np.asarray(labels > labels.max(initial=0) / 2, np.uint8)
        elif self._regions:
            labels = choose_regions(labels, rng)
        ids = np.flatnonzero(object_pixels(labels) >= MIN_PIXELS)
        if not len(ids):
            return None
        chosen = int(rng.choice(ids))
        truth = np.asarray(labels == chosen, np.uint8)
        if still.predictions and rng.random() < _PREDICTED:
            path = still.predictions[int(rng.integers(len(still.predictions)))]
            predicted = read_label_map(path)
            if predicted.shape != labels.shape:
                raise DataError(f"{path}: has another size than its true mask {still.mask}")
            wrong = np.asarray(predicted == chosen, np.uint8)
        else:
            wrong = _degrade_around(truth, 3 * crop, rng)
        edge = boundary(wrong)
        if not len(edge):
            return None
        centre = edge[int(rng.integers(len(edge)))] + rng.uniform(-crop / 4, crop / 4, 2)
        truth[labels == VOID] = VOID
        image = read_photograph(still.image, (labels.shape[0], labels.shape[1]))
        matrix = _patch_map(centre, labels.shape, crop, rng)
        size, flags = (crop, crop), cv2.WARP_INVERSE_MAP
        cut = cv2.warpAffine(
            image, matrix, size, flags=flags | cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
        )
        maps = [
            cv2.warpAffine(m, matrix, size, flags=flags | cv2.INTER_NEAREST, borderMode=cv2.BORDER_REPLICATE)
            for m in (wrong, truth)
        ]
        picture = tv_tensors.Image(torch.from_numpy(cut).permute(2, 0, 1)[None])
        with seeded(rng):
            picture = RandomColour(strong=phase.strong)(picture)
        masks = torch.from_numpy(np.stack([maps[0], *[maps[1]] * (frames - 1)]))
        images = picture.as_subclass(torch.Tensor).expand(frames, -1, -1, -1)
        return Sample(tv_tensors.Image(images), tv_tensors.Mask(masks), still.name)


def _predicted(mask: Path, folders: Sequence[Path]) -> tuple[Path, ...]:
    files = (folder / mask.parent.name / mask.name for folder in folders)
    return tuple(file for file in files if file.is_file())


def _patch_map(
    centre: NDArray[np.float64], shape: tuple[int, ...], crop: int, rng: np.random.Generator
) -> NDArray[np.float64]:
    """From pixels (x, y) of the patch to those of the frame; the patch is moved into the frame if it fits."""
    factor = np.exp(rng.uniform(-np.log(_ZOOM), np.log(_ZOOM)))
    side = crop * factor
    top, left = (
        np.clip(c - side / 2, 0, max(length - side, 0)) for c, length in zip(centre, shape, strict=True)
    )
    mirrored = -1.0 if rng.random() < 0.5 else 1.0
    right = left + (side if mirrored < 0 else 0.0)
    return np.array(
        [
            [mirrored * factor, 0, right + mirrored * factor / 2 - 0.5],
            [0, factor, top + factor / 2 - 0.5],
        ]
    )


def _degrade_around(truth: LabelMap, side: int, rng: np.random.Generator) -> LabelMap:
    """A mask degraded within a window around a random boundary pixel, and empty elsewhere."""
    result = np.zeros_like(truth)
    edge = boundary(truth)
    if not len(edge):
        return result
    row, column = edge[int(rng.integers(len(edge)))]
    rows = slice(max(row - side // 2, 0), row + side // 2)
    columns = slice(max(column - side // 2, 0), column + side // 2)
    result[rows, columns] = degrade(truth[rows, columns], rng)
    return result


def degrade(mask: LabelMap, rng: np.random.Generator) -> LabelMap:
    """A mask (H, W) uint8, 0 or 1, made wrong as predictions are.

    Each with probability one half: the boundary moves out or in by up to 12 pixels (dilation, erosion),
    it moves by a smooth random field, the mask is averaged to a stride of 4, 8 or 16 and enlarged again,
    and it is smoothed; the last two are cut at a random level.

    Note:
        Cost: about 2 ms at 288 x 288.
    """
    inside = cv2.distanceTransform(mask, cv2.DIST_L2, 3)
    outside = cv2.distanceTransform(1 - mask, cv2.DIST_L2, 3)
    level = inside - outside
    chances = rng.random(4) < 0.5
    if chances[0]:
        level += rng.uniform(-_REACH, _REACH) * rng.random()
    if chances[1]:
        level += _smooth_noise(mask.shape, rng)
    found = np.asarray(level > 0, np.float32)
    height, width = mask.shape
    if chances[2]:
        stride = int(rng.choice(_COARSE))
        small = cv2.resize(found, (-(-width // stride), -(-height // stride)), interpolation=cv2.INTER_AREA)
        found = np.asarray(cv2.resize(small, (width, height), interpolation=cv2.INTER_LINEAR), np.float32)
    if chances[3]:
        found = np.asarray(cv2.GaussianBlur(found, (0, 0), rng.uniform(1, 8)), np.float32)
    return np.asarray(found > rng.uniform(0.35, 0.65), np.uint8)


def _smooth_noise(shape: tuple[int, ...], rng: np.random.Generator) -> NDArray[np.float32]:
    """A random field (H, W) of random smoothness, 3 to 24 pixels, and strength, up to 12 pixels."""
    cell = rng.uniform(3, 24)
    grid = (int(shape[0] / cell) + 2, int(shape[1] / cell) + 2)
    noise = rng.standard_normal(grid, np.float32) * np.float32(rng.uniform(1, _REACH))
    return np.asarray(cv2.resize(noise, (shape[1], shape[0]), interpolation=cv2.INTER_CUBIC), np.float32)
