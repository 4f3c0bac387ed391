# SPDX-License-Identifier: Apache-2.0
"""What people look at: overlays of masks on frames, as a video and as a contact sheet."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from math import ceil
from pathlib import Path
from typing import cast

import av
import cv2
import numpy as np
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from PIL import Image, ImageDraw, ImageFont

from .files import WriteError, replacing
from .frames import Frame
from .masks import VOID, LabelMap, Palette

_OPACITY = 0.5
_CAPTION = 18


def overlay(frame: Frame, labels: LabelMap, palette: Palette) -> Frame:
    """Blends each object's palette colour over the frame at half opacity, its contour in full colour.

    Args:
        frame: (H, W, 3) uint8 RGB.
        labels: (H, W) uint8 object ids; background and void (255) stay as they are.
        palette: (256, 3) uint8 RGB.

    Returns:
        A new frame. Cost: O(H W), a few milliseconds at 854x480.

    Raises:
        ValueError: the mask has another size than the frame.
    """
    if labels.shape != frame.shape[:2]:
        raise ValueError(
            f"labels must have the frame's size {list(frame.shape[:2])}, got {list(labels.shape)}"
        )
    labels = np.where(labels == VOID, 0, labels).astype(np.uint8)
    colours = palette[labels]
    blended = cv2.addWeighted(frame, 1 - _OPACITY, colours, _OPACITY, 0)
    # Two pixels wide at 480p, inside the object, so that thin objects keep their colour.
    width = max(1, round(min(labels.shape) / 240))
    box = np.ones((2 * width + 1, 2 * width + 1), np.uint8)
    contour = (cv2.erode(labels, box) != labels) | (cv2.dilate(labels, box) != labels)
    result = np.where((labels > 0)[..., None], blended, frame)
    result[contour & (labels > 0)] = colours[contour & (labels > 0)]
    return np.asarray(result, np.uint8)


@contextmanager
def video_writer(path: str | Path, size: tuple[int, int], fps: float = 24.0) -> Iterator[VideoWriter]:
    """Opens an mp4 for writing: H.264 where this FFmpeg has an encoder for it, else MPEG-4; yuv420p.

    The file takes its place when the block ends; on an error it is removed. An odd width or height is padded
    by one pixel, as yuv420p needs even sizes.

    Args:
        path: the mp4.
        size: (H, W) of the frames, pixels.
        fps: frames per second, above 0.

    Yields:
        A VideoWriter.

    Raises:
        ValueError: fps is not above 0, or a frame of another size.
        WriteError: the file cannot be written; names it.
    """
    if not fps > 0:
        raise ValueError(f"fps must be above 0, got {fps}")
    path = Path(path)
    try:
        with (
            replacing(path) as temporary,
            av.open(temporary, "w", options={"movflags": "faststart"}) as container,
        ):
            writer = VideoWriter(container, size, fps)
            yield writer
            writer._finish()
    except av.FFmpegError as error:
        raise WriteError(error.errno, f"cannot write {path}: {error.strerror}") from error


class VideoWriter:
    """Writes frames to the container that `video_writer` opened."""

    def __init__(self, container: av.container.OutputContainer, size: tuple[int, int], fps: float) -> None:
        self.size = size
        self._container = container
        encoder = "libx264" if "libx264" in av.codecs_available else "mpeg4"
        rate = Fraction(fps).limit_denominator(1001)
        # Without mbtree: its lookahead reads memory it never set, and the same frames give different files.
        x264 = {"crf": "20", "preset": "veryfast", "x264-params": "mbtree=0"}
        options = x264 if encoder == "libx264" else {"q": "3"}
        self._stream = cast(VideoStream, container.add_stream(encoder, rate=rate, options=options))
        self._stream.height, self._stream.width = (side + side % 2 for side in size)
        self._stream.pix_fmt = "yuv420p"

    def write(self, frame: Frame) -> None:
        """Appends a frame (H, W, 3) uint8 RGB.

        Raises:
            ValueError: another size than the writer's.
        """
        if frame.shape != (*self.size, 3):
            raise ValueError(f"frame must have shape {[*self.size, 3]}, got {list(frame.shape)}")
        height, width = self.size
        padded = np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        self._container.mux(self._stream.encode(VideoFrame.from_ndarray(padded, format="rgb24")))

    def _finish(self) -> None:
        self._container.mux(self._stream.encode())


def evenly_spaced(length: int, count: int) -> list[int]:
    """At most `count` frame numbers from 0 to length - 1, both ends included."""
    if length <= 0 or count <= 0:
        return []
    return sorted({round(i) for i in np.linspace(0, length - 1, min(count, length))})


def write_contact_sheet(
    path: str | Path, pictures: Iterable[tuple[str, Frame]], *, columns: int = 4, width: int = 320
) -> None:
    """Writes pictures of one video, captioned with their frame names, as one PNG in rows.

    Args:
        path: the PNG.
        pictures: (name, (H, W, 3) uint8 RGB), at least one; consumed one at a time.
        columns: pictures per row.
        width: of a picture on the sheet, pixels; smaller pictures are not enlarged.

    Raises:
        ValueError: no pictures.
        WriteError: the file cannot be written; names it.
    """
    tiles = [_tile(name, picture, width) for name, picture in pictures]
    if not tiles:
        raise ValueError("pictures must hold at least one picture, got none")
    columns = min(columns, len(tiles))
    step_x, step_y = max(tile.width for tile in tiles) + 4, max(tile.height for tile in tiles) + 4
    sheet = Image.new("RGB", (columns * step_x + 4, ceil(len(tiles) / columns) * step_y + 4), "white")
    for number, tile in enumerate(tiles):
        row, column = divmod(number, columns)
        sheet.paste(tile, (4 + column * step_x, 4 + row * step_y))
    with replacing(Path(path)) as temporary:
        sheet.save(temporary, "PNG")


def _tile(name: str, picture: Frame, width: int) -> Image.Image:
    image = Image.fromarray(picture)
    if image.width > width:
        image = image.resize((width, max(1, round(image.height * width / image.width))), Image.Resampling.BOX)
    tile = Image.new("RGB", (image.width, image.height + _CAPTION), "white")
    tile.paste(image, (0, _CAPTION))
    ImageDraw.Draw(tile).text((2, 2), name, fill="black", font=ImageFont.load_default(13))
    return tile
