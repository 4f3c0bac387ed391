# SPDX-License-Identifier: Apache-2.0
"""Clips from still images: a few regions become objects, random warps become motion."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torchvision import tv_tensors

from vosops.data.frames import IMAGE_SUFFIXES, Frame
from vosops.data.layouts import (
    REGION_FOLDERS,
    SALIENCY_FOLDERS,
    LayoutError,
    image_files,
    mask_files,
    static_folders,
)
from vosops.data.masks import VOID, LabelMap

from .clips import DataError
from .sources import MIN_PIXELS, Phase, Sample, Source, object_pixels, read_label_map, read_photograph
from .transforms import RandomColour, RandomWarp, seeded

_MOST_REGIONS = 3
_LEAST_SHARE, _MOST_SHARE = 0.005, 0.5  # of the image, that a region may cover to become an object
_TRIES = 10  # images drawn until one shows an object


class StaticSource(Source):
    """Photographs beside masks of the same names, as a source of clips (AOT and STCN, first stage).

    Each frame of a clip is the image under its own random warp and colours; the first one is not warped, only
    cropped.

    Args:
        root: folder that holds one of the pairs of folders.
        layout: "regions": indexed PNGs whose labels 1..254 are regions, a partition of the image or not; one
            to three of those that cover 0.5 to 50 % of it become objects. "saliency": grey PNGs of one
            object, which is where they are above half; folders images and masks, or those of ECSSD and DUTS.

    Raises:
        DataError: no such folders, no images, or images without masks; names them.
    """

    def __init__(self, root: Path, layout: Literal["regions", "saliency"]) -> None:
        self.root, self.layout = root, layout
        folders = REGION_FOLDERS if layout == "regions" else SALIENCY_FOLDERS
        try:
            images, masks = static_folders(root, folders)
        except LayoutError as error:
            raise DataError(str(error)) from error
        self.images = list(image_files(images).values())
        if not self.images:
            raise DataError(f"{images}: holds no {'/'.join(IMAGE_SUFFIXES)} images")
        there = mask_files(masks)
        missing = [image.stem for image in self.images if image.stem not in there]
        if missing:
            raise DataError(
                f"{masks / missing[0]}.png: no such mask; {len(missing)} of {len(self.images)} are missing"
            )
        self.masks = [there[image.stem] for image in self.images]

    def draw(self, rng: np.random.Generator, *, frames: int, crop: int, phase: Phase) -> Sample:
        """A clip of one random image; see `Source.draw`."""
        for _ in range(_TRIES):
            number = int(rng.integers(len(self.images)))
            image, labels = self._read(number, crop, rng)
            if not labels.any():
                continue
            sample = _warped(image, labels, frames, crop, phase, rng, self.images[number].stem)
            if object_pixels(sample.labels[0].numpy()).max() >= MIN_PIXELS:
                return sample
        raise DataError(f"{self.root}: {_TRIES} random images show no object in a crop of {crop} pixels")

    def _read(self, number: int, crop: int, rng: np.random.Generator) -> tuple[Frame, LabelMap]:
        labels = read_label_map(self.masks[number])
        height, width = size = labels.shape
        reduction = max(r for r in (1, 2, 4, 8) if r == 1 or min(size) >= r * crop)
        image = read_photograph(self.images[number], (height, width), reduction)
        objects = choose_regions(labels, rng) if self.layout == "regions" else _half(labels)
        # The warp has no low-pass filter: images come to it with about the size of the result.
        factor = min(1.0, 1.2 * crop / min(size))
        target = (round(width * factor), round(height * factor))
        if factor < 1 or reduction > 1:
            image = np.asarray(cv2.resize(image, target, interpolation=cv2.INTER_AREA), np.uint8)
            objects = np.asarray(cv2.resize(objects, target, interpolation=cv2.INTER_NEAREST_EXACT), np.uint8)
        return image, objects


def choose_regions(labels: LabelMap, rng: np.random.Generator) -> LabelMap:
    """One to three random regions of a label map (H, W) as objects 1..3; the rest is background, void stays.

    Regions that cover less than 0.5 % or more than half of the image are not chosen; without others the
    result has no object.
    """
    share = object_pixels(labels) / labels.size
    candidates = np.flatnonzero((share >= _LEAST_SHARE) & (share <= _MOST_SHARE))
    chosen = rng.permutation(candidates)[: int(rng.integers(1, _MOST_REGIONS + 1))]
    table = np.zeros(256, np.uint8)
    table[VOID] = VOID
    table[chosen] = np.arange(1, len(chosen) + 1, dtype=np.uint8)
    return table[labels]


def _half(grey: NDArray[np.uint8]) -> LabelMap:
    """Object 1 where a grey mask is above half of its greatest value: 255, or 1 in a file of one bit."""
    return np.asarray(grey > grey.max(initial=0) / 2, np.uint8)


def _warped(
    image: Frame,
    labels: NDArray[np.uint8],
    frames: int,
    crop: int,
    phase: Phase,
    rng: np.random.Generator,
    name: str,
) -> Sample:
    if rng.random() < 0.5:
        image, labels = np.ascontiguousarray(image[:, ::-1]), np.ascontiguousarray(labels[:, ::-1])
    picture = tv_tensors.Image(torch.from_numpy(image).permute(2, 0, 1))
    mask = tv_tensors.Mask(torch.from_numpy(labels))
    colour = RandomColour(strong=phase.strong)
    images, masks = [], []
    with seeded(rng):
        for number in range(frames):
            warp = RandomWarp(crop, affine=number > 0, flip=0.3 if number else 0.0)
            warped, moved = warp(picture, mask)
            # Indexing a tv_tensor gives a plain tensor, which the transform would let through unchanged.
            images.append(colour(tv_tensors.Image(warped[None]))[0])
            masks.append(moved)
    return Sample(tv_tensors.Image(torch.stack(images)), tv_tensors.Mask(torch.stack(masks)), name)
