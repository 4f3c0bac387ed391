# SPDX-License-Identifier: Apache-2.0
"""Random changes of frames and masks, as transforms of torchvision.transforms.v2 with OpenCV's kernels.

v2's own RandomAffine, ColorJitter with hue and GaussianBlur take 15, 20 and 12 ms a frame of 384 x 384 on one
core; these take about 1 ms each, so that a CPU decodes and changes clips faster than it trains on them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from math import pi, radians, tan
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from vosops.models.kmn import hide_and_seek

Matrix = NDArray[np.float64]

_GREY = np.array([0.299, 0.587, 0.114])  # luma of ITU-R BT.601


@contextmanager
def seeded(rng: np.random.Generator) -> Iterator[None]:
    """Draws torch's CPU random numbers from `rng` inside the block, and leaves torch's generator untouched.

    v2 transforms draw from torch's global generator, which belongs to the caller.
    """
    before = torch.get_rng_state()
    torch.default_generator.manual_seed(int(rng.integers(2**63)))
    try:
        yield
    finally:
        torch.set_rng_state(before)


class RandomWarp(v2.Transform):  # type: ignore[misc]
    """Flip, affine map, perspective and resized crop in one homography, so that pixels are resampled once.

    Images (3, H, W) uint8 are sampled linearly, masks (H, W) uint8 by nearest neighbour. Beyond the border
    image and mask go on mirrored: no frame shows an artificial edge that a model could learn.

    Args:
        size: sides of the result, pixels.
        affine: without, only flip and crop.
        flip: probability.

    Note:
        Ranges: rotation 20 degrees, translation 0.1 of the sides, scale 0.9 to 1.1, shear 10 degrees, crop of
        0.8 to 1 of the area at aspect 3/4 to 4/3, as AOT's stage on still images; corners move by up to 0.05
        of the sides. No low-pass filter: give images of about the size of the result.
    """

    def __init__(self, size: int, *, affine: bool, flip: float) -> None:
        super().__init__()
        self.size, self.flip = size, flip
        self._crop = v2.RandomResizedCrop(size, scale=(0.8, 1.0), ratio=(3 / 4, 4 / 3))
        self._affine = v2.RandomAffine(20, (0.1, 0.1), (0.9, 1.1), (-10, 10, -10, 10)) if affine else None
        self._perspective = v2.RandomPerspective(0.1) if affine else None

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draws the map from result pixels to source pixels, 3 x 3."""
        box = self._crop.make_params(flat_inputs)
        height, width = v2.functional.get_size(flat_inputs[0])
        crop = _crop_map(box["left"], box["top"], box["width"], box["height"], self.size)
        if torch.rand(()) < self.flip:
            crop = crop @ np.array([[-1.0, 0, self.size - 1], [0, 1, 0], [0, 0, 1]])
        if self._affine is not None and self._perspective is not None:
            corners = np.append(self._perspective.make_params(flat_inputs)["coefficients"], 1).reshape(3, 3)
            drawn = self._affine.make_params(flat_inputs)
            centre = ((width - 1) / 2, (height - 1) / 2)
            crop = np.linalg.inv(_affine_map(centre=centre, **drawn)) @ corners @ crop
        return {"matrix": crop}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Warps an image or a mask; anything else passes through."""
        if not isinstance(inpt, (tv_tensors.Image, tv_tensors.Mask)):
            return inpt
        image = isinstance(inpt, tv_tensors.Image)
        source = inpt.permute(1, 2, 0).numpy() if image else inpt.numpy()
        flags = cv2.WARP_INVERSE_MAP | (cv2.INTER_LINEAR if image else cv2.INTER_NEAREST)
        size = (self.size, self.size)
        warped = cv2.warpPerspective(
            source, params["matrix"], size, flags=flags, borderMode=cv2.BORDER_REFLECT_101
        )
        result = torch.from_numpy(warped)
        return tv_tensors.wrap(result.permute(2, 0, 1) if image else result, like=inpt)


class RandomColour(v2.Transform):  # type: ignore[misc]
    """Changes brightness, contrast, saturation and hue of images (T, 3, H, W) uint8, of all T alike.

    The four changes are one affine map of the colours; hue turns them around the grey axis. Values are cut
    off once, at the end.

    Args:
        strong: AOT's version 2: factors 0.6 to 1.4 (saturation 0.8 to 1.2), hue a turn of 0.1, with
            probability 0.8; grey with probability 0.2, Gaussian blur with 0.3. Else version 1: factors 0.9 to
            1.1, hue 0.03, always.
    """

    def __init__(self, *, strong: bool) -> None:
        super().__init__()
        self.strong = strong
        self._ranges = (0.4, 0.4, 0.2, 0.1) if strong else (0.1, 0.1, 0.1, 0.03)

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draws the colour map, 3 x 4, and the blur's sigma in pixels (0: none)."""
        mean = np.mean([cv2.mean(_pixels(frame))[:3] for frame in flat_inputs[0]], 0)
        chances, changes = torch.rand(3).tolist(), (2 * torch.rand(4) - 1).tolist()
        brightness, contrast, saturation, hue = (c * r for c, r in zip(changes, self._ranges, strict=True))
        colours, offset = np.eye(3), np.zeros(3)
        if not self.strong or chances[0] < 0.8:
            colours *= 1 + brightness
            offset = -contrast * np.full(3, _GREY @ (colours @ mean))
            colours *= 1 + contrast
            turn = _saturation_map(1 + saturation) @ _hue_map(hue)
            colours, offset = turn @ colours, turn @ offset
        if self.strong and chances[1] < 0.2:
            colours, offset = _saturation_map(0.0) @ colours, _saturation_map(0.0) @ offset
        sigma = float(torch.empty(()).uniform_(0.1, 2.0)) if self.strong and chances[2] < 0.3 else 0.0
        return {"colours": np.hstack((colours, offset[:, None])), "sigma": sigma}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Changes an image; masks pass through."""
        if not isinstance(inpt, tv_tensors.Image):
            return inpt
        changed = np.stack([cv2.transform(_pixels(frame), params["colours"]) for frame in inpt])
        if params["sigma"] > 0:
            changed = np.stack([cv2.GaussianBlur(frame, (0, 0), params["sigma"]) for frame in changed])
        return tv_tensors.wrap(torch.from_numpy(changed).permute(0, 3, 1, 2), like=inpt)


def hide(frames: Tensor, labels: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Hide-and-Seek (`vosops.models.kmn.hide_and_seek`) on a clip: hidden cells show no object.

    Args:
        frames: (T, 3, H, W) float in [0, 1].
        labels: (T, H, W) uint8.
        rng: draws the hidden cells.
    """
    generator = torch.Generator().manual_seed(int(rng.integers(2**63)))
    hidden, masks = hide_and_seek(frames[None], labels[None, :, None], generator=generator)
    return hidden[0], masks[0, :, 0]


def _pixels(frame: Tensor) -> NDArray[np.uint8]:
    return np.asarray(frame.permute(1, 2, 0).numpy(), np.uint8)


def _crop_map(left: float, top: float, width: float, height: float, size: int) -> Matrix:
    """From pixels of the result to those of the source; pixel centres are at whole numbers."""
    across, down = width / size, height / size
    return np.array([[across, 0, left + across / 2 - 0.5], [0, down, top + down / 2 - 0.5], [0, 0, 1]])


def _affine_map(
    *,
    angle: float,
    translate: tuple[int, int],
    scale: float,
    shear: tuple[float, float],
    centre: tuple[float, float],
) -> Matrix:
    """Shears, turns and scales around the centre, then translates; angles in degrees."""
    cos, sin = np.cos(radians(angle)) * scale, np.sin(radians(angle)) * scale
    linear = np.array([[cos, -sin], [sin, cos]]) @ np.array(
        [[1, tan(radians(shear[0]))], [tan(radians(shear[1])), 1]]
    )
    offset = np.array(centre) + np.array(translate) - linear @ np.array(centre)
    return np.vstack((np.column_stack((linear, offset)), [0, 0, 1]))


def _saturation_map(factor: float) -> Matrix:
    return factor * np.eye(3) + (1 - factor) * np.tile(_GREY, (3, 1))


def _hue_map(turns: float) -> Matrix:
    """Rotation around the grey axis (Rodrigues), `turns` of a full turn."""
    cos, sin = np.cos(2 * pi * turns), np.sin(2 * pi * turns) / np.sqrt(3)
    cross = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]])
    return np.asarray(cos * np.eye(3) + sin * cross + (1 - cos) / 3)
