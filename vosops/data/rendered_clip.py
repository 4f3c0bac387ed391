# SPDX-License-Identifier: Apache-2.0
"""Clips with exact ground truth, rendered from photographs that ship inside scikit-image."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from os import PathLike
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
import skimage.data
from numpy.typing import NDArray
from PIL import Image

from .files import write_file
from .masks import write_mask

Scene = Literal["passing", "pillar"]
Photograph = NDArray[np.uint8]  # [H, W, 3] RGB
Rgba = NDArray[np.float32]  # [H, W, 4], 0..255 and alpha 0..1

_SMALLEST = 64  # pixels a side; below, an object is a handful of pixels
_NOISE = 2.0  # grey levels of sensor noise
_JPEG_QUALITY = 95
_PILLAR_HEIGHT = 1.3  # in frame heights

# Outlines (x, y) in pixels of the photographs: the astronaut with her helmet, the cup on its saucer.
_ASTRONAUT = """
205,17 192,28 185,38 163,51 156,58 153,68 154,92 157,104 170,116 170,121 174,128 182,132 182,147 153,151
140,158 123,178 120,189 120,201 113,202 113,205 90,227 76,235 65,246 44,282 39,306 34,315 26,342 25,374
23,375 19,390 20,419 24,432 23,460 25,478 29,493 37,502 39,511 511,511 511,491 506,490 500,478 493,477
493,468 498,463 501,463 502,455 498,455 495,452 493,421 478,384 455,361 436,351 418,345 393,344 364,348
360,344 360,328 357,323 356,302 352,287 347,282 340,262 311,238 304,224 284,197 256,174 256,159 253,156
253,147 256,144 265,142 267,136 275,134 290,117 296,107 300,92 296,58 288,43 276,31 242,15 210,15
"""
_CUP = """
239,25 223,32 205,44 190,59 180,74 175,77 158,79 135,95 104,127 91,150 78,186 75,232 77,248 81,258
88,273 101,297 115,316 130,332 146,344 170,358 190,367 220,375 232,378 271,382 314,381 348,375 370,369
393,360 422,341 442,322 461,295 472,270 478,240 479,218 476,197 467,172 460,157 442,133 419,111 406,105
403,91 392,69 364,41 337,27 299,18 269,18
"""


@dataclass(frozen=True)
class RenderedClip:
    """A clip and its ground truth.

    Attributes:
        name: the scene's name.
        frames: (T, H, W, 3) uint8 RGB.
        masks: (T, H, W) uint8 labels of what is visible: 0 background and occluders, 1..n objects.
    """

    name: str
    frames: NDArray[np.uint8]
    masks: NDArray[np.uint8]


@dataclass(frozen=True)
class _Pose:
    """Where a layer is in a frame: its centre and its height in frame heights, its angle in degrees."""

    x: float
    y: float
    height: float
    angle: float = 0.0


@dataclass(frozen=True)
class _Layer:
    label: int  # 0: hides what is behind it and is not annotated
    sprite: Rgba
    pose: Callable[[float], _Pose]  # of the time in the clip, 0 to 1


def render_clip(
    frames: int = 40, size: tuple[int, int] = (240, 432), seed: int = 0, scene: Scene = "passing"
) -> RenderedClip:
    """Render a clip: objects cut out of photographs move over a panning one, and the ground truth is exact.

    - "passing": in a garage with a red motorcycle an astronaut (object 1) drifts to the right; a red cup on
      its saucer (object 2) turns, grows and passes in front of her to the left.
    - "pillar": before a launch pad at dusk the astronaut (object 1) moves to the right, growing, and
      passes behind a brick pillar, which is not annotated.

    Every object is in sight in the first frame. The camera sways, the exposure drifts, and sensor noise is
    added. A pixel belongs to the frontmost layer that covers at least half of it.

    Args:
        frames: number of frames T, at least 2; the same motion in more frames is slower.
        size: (H, W) in pixels, each at least 64.
        seed: varies positions, speeds, sway and noise; the same seed gives the same clip.
        scene: "passing" or "pillar".

    Returns:
        RenderedClip.

    Raises:
        TypeError, ValueError: a bad argument, named.

    Note:
        Cost: about 15 ms a frame at 240x432; the whole clip is held in memory, 4 T H W bytes.
        Photographs: skimage.data astronaut (NASA), coffee, rocket, brick and stereo_motorcycle (Middlebury),
        public domain or CC0; they are files of the package, nothing is downloaded.
    """
    _check_arguments(frames, size, seed, scene)
    rng = np.random.default_rng(seed)
    height, width = size
    background, layers = _SCENES[scene](height, width / height, rng)
    sway = _sway(rng)
    gains = 1 + 0.05 * np.sin(
        2 * np.pi * (np.arange(frames) / frames * rng.uniform(0.5, 1.5) + rng.uniform())
    )
    clip = RenderedClip(
        scene, np.empty((frames, height, width, 3), np.uint8), np.zeros((frames, height, width), np.uint8)
    )
    for index in range(frames):
        time = index / (frames - 1)
        shift = sway(time)  # x, y in frame heights
        image = _view(background, size, time, shift)
        for layer in layers:
            colour, alpha = _place(layer.sprite, layer.pose(time), shift, size)
            image += alpha[..., None] * (colour - image)
            clip.masks[index][alpha >= 0.5] = layer.label
        noise = rng.normal(0, _NOISE, image.shape).astype(np.float32)
        clip.frames[index] = np.clip(np.rint(image * gains[index] + noise), 0, 255).astype(np.uint8)
    return clip


def write_clip(clip: RenderedClip, folder: str | PathLike[str]) -> tuple[Path, Path]:
    """Write a clip in the DAVIS layout, which `vosops eval` and `vosops segment` read.

    Args:
        clip: of `render_clip`.
        folder: made if it is not there. Frames become `JPEGImages/480p/<name>/00000.jpg` (quality 95), masks
            `Annotations/480p/<name>/00000.png` (indexed, DAVIS palette); files of these names are replaced.

    Returns:
        The folder of the frames and the folder of the masks.

    Raises:
        OSError: a file cannot be written; names it.
    """
    images = Path(folder) / "JPEGImages" / "480p" / clip.name
    annotations = Path(folder) / "Annotations" / "480p" / clip.name
    images.mkdir(parents=True, exist_ok=True)
    annotations.mkdir(parents=True, exist_ok=True)
    for index, (frame, mask) in enumerate(zip(clip.frames, clip.masks, strict=True)):
        image = Image.fromarray(frame)
        write_file(images / f"{index:05d}.jpg", partial(image.save, format="JPEG", quality=_JPEG_QUALITY))
        write_mask(annotations / f"{index:05d}.png", mask)
    return images, annotations


def _passing(height: int, aspect: float, rng: np.random.Generator) -> tuple[Photograph, list[_Layer]]:
    unit = _unit(aspect)
    start, speed, bob = rng.uniform(0.30, 0.36), rng.uniform(0.38, 0.46), rng.uniform(0.01, 0.03)
    phase, turn = rng.uniform(0, 2 * np.pi, 2)

    def astronaut(time: float) -> _Pose:
        size = unit * (0.74 + 0.06 * time)
        y = _bust(unit) - size / 2 + unit * bob * np.sin(2 * np.pi * 2 * time + phase)
        return _Pose(aspect * (start + speed * time), y, size, 3 * np.sin(4 * time + phase))

    cup_start, cup_speed = rng.uniform(0.80, 0.84), rng.uniform(0.58, 0.66)

    def cup(time: float) -> _Pose:
        y = 1 - unit * (0.38 - 0.12 * np.sin(np.pi * time) + 0.04 * time)
        angle = 18 * np.sin(2 * np.pi * 0.7 * time + turn)
        return _Pose(aspect * (cup_start - cup_speed * time), y, unit * (0.36 + 0.12 * time), angle)

    layers = [
        _Layer(1, _sprite("astronaut", _ASTRONAUT, unit * 0.8 * height), astronaut),
        _Layer(2, _sprite("coffee", _CUP, unit * 0.48 * height), cup),
    ]
    return _photograph("garage"), layers


def _pillar(height: int, aspect: float, rng: np.random.Generator) -> tuple[Photograph, list[_Layer]]:
    unit = _unit(aspect)
    start, speed = rng.uniform(0.22, 0.27), rng.uniform(0.50, 0.58)
    phase, where = rng.uniform(0, 2 * np.pi), rng.uniform(0.58, 0.66)

    def astronaut(time: float) -> _Pose:
        size = unit * (0.64 + 0.16 * time)
        y = _bust(unit) - size / 2 + unit * 0.015 * np.sin(2 * np.pi * 3 * time + phase)
        return _Pose(aspect * (start + speed * time), y, size, 4 * np.sin(5 * time + phase))

    def pillar(time: float) -> _Pose:
        return _Pose(aspect * (where - 0.12 * time), 0.5, _PILLAR_HEIGHT)

    layers = [
        _Layer(1, _sprite("astronaut", _ASTRONAUT, unit * 0.8 * height), astronaut),
        _Layer(0, _brick_pillar(_PILLAR_HEIGHT * height, unit * 0.21 * height), pillar),
    ]
    return _photograph("rocket"), layers


def _unit(aspect: float) -> float:
    """Size of the objects: 1 in a wide frame, less in a square or upright one, where they must still pass."""
    return min(1.0, aspect / 1.8)


def _bust(unit: float) -> float:
    """Where the astronaut ends, in frame heights: out of sight, since the photograph cuts her off there."""
    return 1.04 + 0.08 * unit


_SCENES = {"passing": _passing, "pillar": _pillar}

_LOADERS: dict[str, Callable[[], Photograph]] = {
    "astronaut": skimage.data.astronaut,
    "brick": skimage.data.brick,
    "coffee": skimage.data.coffee,
    "garage": lambda: skimage.data.stereo_motorcycle()[0],  # type: ignore[no-untyped-call]
    "rocket": skimage.data.rocket,
}


@lru_cache(maxsize=len(_LOADERS))
def _photograph(name: str) -> Photograph:
    image = _LOADERS[name]()
    return image if image.ndim == 3 else np.stack((image,) * 3, axis=-1)


def _sprite(name: str, outline: str, height: float) -> Rgba:
    """A part of a photograph, about `height` pixels high, with an antialiased outline."""
    photograph = _photograph(name)
    points = np.array([pair.split(",") for pair in outline.split()], dtype=np.int32)
    alpha = np.zeros(photograph.shape[:2], np.uint8)
    cv2.fillPoly(alpha, [points], 255, lineType=cv2.LINE_AA)
    left, top, width, rows = cv2.boundingRect(points)
    rgba = np.dstack((photograph, alpha))[top : top + rows, left : left + width].astype(np.float32)
    rgba[..., 3] /= 255
    # Averaged down once, here: linear sampling in the warp of each frame is good only at a scale near 1.
    resized = cv2.resize(rgba, None, fx=height / rows, fy=height / rows, interpolation=cv2.INTER_AREA)
    return _with_margin(np.asarray(resized, np.float32))


def _brick_pillar(height: float, width: float) -> Rgba:
    """A round pillar of bricks, darker towards its sides."""
    rows, columns = round(height), round(width)
    courses = np.ascontiguousarray(_photograph("brick").transpose(1, 0, 2))  # they stand on end there
    bricks = cv2.resize(courses, (rows, rows), interpolation=cv2.INTER_AREA)[:, :columns]
    across = np.linspace(-1, 1, columns)[None, :, None]
    tint = np.array([1.25, 1.0, 0.85])
    rgba = np.dstack((bricks * tint * (1.1 - 0.6 * across**2), np.ones((rows, columns))))
    return _with_margin(rgba.astype(np.float32))


def _with_margin(rgba: Rgba) -> Rgba:
    """One clear pixel on every side, so that sampling between pixels fades out instead of stopping."""
    padded = np.pad(rgba, ((1, 1), (1, 1), (0, 0)), mode="edge")
    padded[[0, -1], :, 3] = 0
    padded[:, [0, -1], 3] = 0
    return padded


def _sway(rng: np.random.Generator) -> Callable[[float], NDArray[np.float64]]:
    """The camera's smooth shake: time -> (x, y) in frame heights."""
    rates, phases = rng.uniform(1.0, 3.5, (3, 2)), rng.uniform(0, 2 * np.pi, (3, 2))
    return lambda time: 0.006 * np.sin(2 * np.pi * rates * time + phases).sum(0)


def _view(
    photograph: Photograph, size: tuple[int, int], time: float, shift: NDArray[np.float64]
) -> NDArray[np.float32]:
    """What the camera sees of the background while it pans to the right.  # [H, W, 3]"""
    height, width = size
    rows, columns = photograph.shape[:2]
    # The view is 80 % of the largest window of this aspect; the pan uses what remains.
    scale = 0.8 * min(rows / height, columns / width)
    x = (columns - 1) / 2 + (0.7 * time - 0.35) * (columns - scale * width) + shift[0] * scale * height
    y = (rows - 1) / 2 + shift[1] * scale * height
    blurred = cv2.GaussianBlur(photograph, (0, 0), 0.4 * scale) if scale > 1.2 else photograph
    matrix = np.array([[scale, 0, x - scale * (width - 1) / 2], [0, scale, y - scale * (height - 1) / 2]])
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    view = cv2.warpAffine(blurred, matrix, (width, height), flags=flags, borderMode=cv2.BORDER_REFLECT)
    return view.astype(np.float32)


def _place(
    sprite: Rgba, pose: _Pose, shift: NDArray[np.float64], size: tuple[int, int]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The sprite in the frame: colour and alpha.  # [H, W, 3], [H, W]"""
    height, width = size
    rows, columns = sprite.shape[:2]
    matrix = cv2.getRotationMatrix2D(
        ((columns - 1) / 2, (rows - 1) / 2), pose.angle, pose.height * height / rows
    )
    # Nearer than the background, a layer sways more.
    center = np.array([pose.x, pose.y]) * height - 1.5 * shift * height
    matrix[:, 2] = matrix[:, 2] + center - np.array([columns - 1, rows - 1]) / 2
    # Colours go on beyond the sprite, alpha does not: an edge pixel must not mix with the warp's black.
    colour = cv2.warpAffine(sprite[..., :3], matrix, (width, height), borderMode=cv2.BORDER_REPLICATE)
    alpha = cv2.warpAffine(sprite[..., 3], matrix, (width, height))
    return np.asarray(colour, np.float32), np.asarray(alpha, np.float32)


def _check_arguments(frames: int, size: tuple[int, int], seed: int, scene: str) -> None:
    for name, value in (("frames", frames), ("size[0]", size[0]), ("size[1]", size[1]), ("seed", seed)):
        if not isinstance(value, (int, np.integer)) or isinstance(value, bool):
            raise TypeError(f"{name} must be an integer, got {value!r}")
    if frames < 2:
        raise ValueError(f"frames must be at least 2, got {frames}")
    if len(size) != 2 or min(size) < _SMALLEST:
        raise ValueError(f"size must be (H, W) with both at least {_SMALLEST} pixels, got {tuple(size)}")
    if seed < 0:
        raise ValueError(f"seed must not be negative, got {seed}")
    if scene not in _SCENES:
        raise ValueError(f"scene must be one of {', '.join(_SCENES)}, got '{scene}'")
