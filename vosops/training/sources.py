# SPDX-License-Identifier: Apache-2.0
"""What every source of clips shares: the samples it draws, and how their files are decoded."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torchvision import tv_tensors

from vosops.data.frames import Frame
from vosops.data.masks import VOID, LabelMap

from .clips import DataError

MIN_PIXELS = 100  # of an object in the first frame of a clip, as in AOT's balanced crop
_REDUCED = {
    1: cv2.IMREAD_COLOR_RGB,
    2: cv2.IMREAD_REDUCED_COLOR_2,
    4: cv2.IMREAD_REDUCED_COLOR_4,
    8: cv2.IMREAD_REDUCED_COLOR_8,
}


@dataclass(frozen=True)
class Phase:
    """Where the training is.

    Attributes:
        progress: share of the training that is done, 0 to 1.
        strong: whether strong colour changes are on.
        warp: probability that each frame of a video clip is warped on its own.
    """

    progress: float = 0.0
    strong: bool = False
    warp: float = 0.0


@dataclass(frozen=True)
class Sample:
    """A clip before it is merged and converted; what sources draw.

    Attributes:
        frames: (T, 3, H, W) uint8 RGB.
        labels: (T, H, W) uint8; 0 background, 255 void, any other ids.
        name: where it comes from.
    """

    frames: tv_tensors.Image
    labels: tv_tensors.Mask
    name: str


class Source(ABC):
    """A data set that clips are drawn from."""

    @abstractmethod
    def draw(self, rng: np.random.Generator, *, frames: int, crop: int, phase: Phase) -> Sample:
        """A random clip, a function of the arguments and of the generator's state alone.

        Args:
            rng: everything random comes from it.
            frames: T.
            crop: H and W, pixels.
            phase: of the training.

        Returns:
            A sample that shows an object in its first frame.

        Raises:
            DataError: a file cannot be used; names it.
        """


def read_photograph(path: Path, size: tuple[int, int] | None = None, reduction: int = 1) -> Frame:
    """Decodes an image, (H, W, 3) uint8 RGB; 3 ms for a JPEG of 854x480.

    Args:
        path: the image.
        size: (H, W) that it must have in full, its mask's.
        reduction: 1, 2, 4 or 8: decodes at that fraction of the size, which costs less in a JPEG.

    Raises:
        DataError: missing, truncated, not an image, or of another size; names it.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    # The decoder fills what is missing of a truncated JPEG with grey, and says so on stderr only.
    if data.startswith(b"\xff\xd8") and b"\xff\xd9" not in data[-64:]:
        raise DataError(f"{path}: is a truncated JPEG ({len(data)} bytes, no end marker)")
    image = cv2.imdecode(np.frombuffer(data, np.uint8), _REDUCED[reduction]) if data else None
    if image is None:
        raise DataError(f"{path}: cannot be decoded as an image ({len(data)} bytes)")
    if reduction > 1:
        image = cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
    if size is not None and image.shape[:2] != tuple(-(-side // reduction) for side in size):
        height, width = (reduction * side for side in image.shape[:2])
        raise DataError(f"{path}: is {width}x{height}, its mask {size[1]}x{size[0]} (WxH)")
    return np.asarray(image, np.uint8)


def read_label_map(path: Path) -> LabelMap:
    """Decodes an indexed or grey PNG of ids, (H, W) uint8; 2 ms at 854x480.

    Raises:
        DataError: missing, damaged, or neither indexed nor grey with 8 bits; names it.
    """
    try:
        with Image.open(path) as image:
            if image.format != "PNG" or image.mode not in ("P", "L", "1"):
                raise DataError(
                    f"{path}: is {image.format} with mode {image.mode}, "
                    "expected an indexed or grey PNG of object ids with 8 bits"
                )
            return np.asarray(image, np.uint8)
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such mask") from error
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: cannot be decoded as a mask ({error})") from error


def object_pixels(labels: LabelMap) -> NDArray[np.int64]:
    """Pixels of each id (256,) in a label map (H, W) uint8; none for background and void."""
    counts = cv2.calcHist([labels], [0], None, [256], [0, 256]).ravel().astype(np.int64)
    counts[0] = counts[VOID] = 0
    return counts


def as_sample(frames: NDArray[np.uint8], labels: NDArray[np.uint8], name: str) -> Sample:
    """A sample of arrays (T, H, W, 3) and (T, H, W); the memory is shared."""
    images = torch.from_numpy(frames).permute(0, 3, 1, 2)
    return Sample(tv_tensors.Image(images), tv_tensors.Mask(torch.from_numpy(labels)), name)
