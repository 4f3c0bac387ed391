# SPDX-License-Identifier: Apache-2.0
"""Frames of a video, one at a time: a folder of images or a video file."""

from __future__ import annotations

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from itertools import islice, pairwise
from pathlib import Path

import av
import numpy as np
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from numpy.typing import NDArray
from PIL import Image, ImageOps

Frame = NDArray[np.uint8]  # [H, W, 3] RGB

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")


class FrameError(ValueError):
    """A frame, or a whole video, that cannot be read.

    Attributes:
        path: the image file, video file or folder at fault.
        frame: name of the frame at fault ("00012"), None when the whole video is.
    """

    def __init__(self, path: Path, frame: str | None, reason: str) -> None:
        super().__init__(f"frame {frame} ({path}): {reason}" if frame else f"{path}: {reason}")
        self.path, self.frame = path, frame


class FrameSource(ABC):
    """A video that is read frame by frame; at most a few frames are in memory at any time.

    Attributes:
        path: the folder or file.
        size: (H, W) of every frame, pixels.
        length: number of frames, None where the file does not tell.
        fps: frames per second, None for a folder.
    """

    path: Path
    size: tuple[int, int]
    length: int | None
    fps: float | None

    def __iter__(self) -> Iterator[tuple[str, Frame]]:
        return self.frames()

    @abstractmethod
    def frames(self, start: int = 0) -> Iterator[tuple[str, Frame]]:
        """Yields (name, RGB frame (H, W, 3) uint8) from frame number `start` (from 0) on.

        Raises:
            FrameError: a frame is missing, truncated, unreadable or of another size; named.
        """

    @abstractmethod
    def fingerprint(self, count: int) -> str:
        """A digest (hex) that tells whether the first `count` frames are the same ones; reads no pixel.

        In a folder of their names and sizes in bytes, in a video file of the file's beginning.
        """

    def _check_size(self, name: str, path: Path, frame: Frame) -> None:
        if frame.shape[:2] != self.size:
            raise FrameError(
                path,
                name,
                f"is {_size(frame.shape[:2])}, the frames before it are {_size(self.size)}: "
                "all frames of a video must have one size",
            )


def open_frames(path: str | Path) -> FrameSource:
    """Opens a folder of images (jpg, png; natural order) or a video file that FFmpeg can decode.

    Frames are named by the images' stems, in a video file by their number ("00000"). EXIF and video
    rotation are applied. Numbered file names must be numbered evenly (0, 1, 2 or 0, 5, 10): a gap is a
    missing frame.

    Returns:
        The FrameSource. Its first frame is decoded here, for its size.

    Raises:
        FrameError: no such path, no frames, missing frames by name, or an unreadable first frame.

    Note:
        Starting at frame n costs nothing in a folder; a video file decodes the n frames before, as seeking
        is not frame-exact in every container.
    """
    path = Path(path)
    if path.is_dir():
        return _Folder(path)
    if not path.exists():
        raise FrameError(path, None, "no such folder or video file")
    if path.suffix.lower() in IMAGE_SUFFIXES:
        raise FrameError(path, None, "is a single image: pass the folder of frames, or a video file")
    return _Video(path)


class _Folder(FrameSource):
    def __init__(self, path: Path) -> None:
        self.path, self.fps = path, None
        files = [p for p in path.iterdir() if not p.name.startswith(".")]
        images = [p for p in files if p.suffix.lower() in IMAGE_SUFFIXES]
        if not images:
            found = ", ".join(sorted(p.name for p in files)[:3]) or "nothing"
            raise FrameError(path, None, f"holds no {'/'.join(IMAGE_SUFFIXES)} frames; found {found}")
        self.files = sorted(images, key=lambda p: _natural(p.stem))
        _check_numbering(path, self.files)
        self.length = len(self.files)
        self.size = _read_image(self.files[0]).shape[:2]

    def frames(self, start: int = 0) -> Iterator[tuple[str, Frame]]:
        for file in self.files[start:]:
            frame = _read_image(file)
            self._check_size(file.stem, file, frame)
            yield file.stem, frame

    def fingerprint(self, count: int) -> str:
        digest = hashlib.sha256()
        for file in self.files[:count]:
            # A file that has vanished is reported by name when its turn comes, not here.
            size = file.stat().st_size if file.exists() else -1
            digest.update(f"{file.name} {size}\n".encode())
        return digest.hexdigest()


class _Video(FrameSource):
    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with av.open(path) as container:
                if not container.streams.video:
                    raise FrameError(path, None, "holds no video stream")
                stream = container.streams.video[0]
                rate = stream.average_rate
                self.fps = float(rate) if rate else None
                self.length = _indexed_frames(stream)
        except (av.FFmpegError, OSError) as error:
            raise FrameError(path, None, f"cannot be opened as a video ({_reason(error)})") from error
        self.size = (0, 0)
        for _, frame in self._decode(0):
            self.size = _upright(frame).shape[:2]
            break
        else:
            raise FrameError(path, None, "holds no frames")

    def frames(self, start: int = 0) -> Iterator[tuple[str, Frame]]:
        for number, decoded in self._decode(start):
            frame = _upright(decoded)
            self._check_size(f"{number:05d}", self.path, frame)
            yield f"{number:05d}", frame

    def _decode(self, start: int) -> Iterator[tuple[int, VideoFrame]]:
        """Yields (number, frame) from `start` on; an end before the announced one is an error."""
        number = 0
        seconds = 0.0
        try:
            with av.open(self.path) as container:
                stream = container.streams.video[0]
                stream.thread_type = "AUTO"
                for packet in container.demux(stream):
                    if packet.is_corrupt:
                        raise FrameError(self.path, f"{number:05d}", "the file is truncated or damaged here")
                    for frame in packet.decode():
                        if frame.is_corrupt:
                            raise FrameError(self.path, f"{number:05d}", "is damaged in the file")
                        seconds = frame.time or seconds
                        if number >= start:
                            yield number, frame
                        number += 1
                # mkv has no index of every frame, only a duration, that of its longest stream.
                known = container.duration if len(container.streams) == 1 else None
        except (av.FFmpegError, OSError) as error:
            raise FrameError(self.path, f"{number:05d}", f"cannot be decoded ({_reason(error)})") from error
        expected = self.length
        if expected is None and known is not None and self.fps:
            end, announced = seconds + 1 / self.fps, known / av.time_base
            expected = round(announced * self.fps) if end < 0.9 * announced - 3 / self.fps else None
        if expected is not None and number < expected:
            reason = f"the video ends here, though it announces {expected} frames: the file is truncated"
            raise FrameError(self.path, f"{number:05d}", reason)

    def fingerprint(self, count: int) -> str:
        # Its beginning holds an index or the first picture; a cut download that was completed stays the same.
        with self.path.open("rb") as file:
            return hashlib.sha256(file.read(4096)).hexdigest()


def _indexed_frames(stream: VideoStream) -> int | None:
    """The frames a file shows, where its index lists every one (mp4): an edit list hides some of them."""
    if not stream.frames or len(stream.index_entries) != stream.frames:
        return None
    return sum(not entry.is_discard for entry in stream.index_entries)


def _upright(frame: VideoFrame) -> Frame:
    rgb = frame.to_ndarray(format="rgb24")
    turns = round(frame.rotation / 90) % 4
    return np.ascontiguousarray(np.rot90(rgb, turns)) if turns else np.asarray(rgb, np.uint8)


def _read_image(path: Path) -> Frame:
    try:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):
                raise FrameError(path, path.stem, f"has {image.mode} pixels: save it with 8 bits per channel")
            # A copy, as Pillow's own array is read-only and torch warns about those.
            return np.array(ImageOps.exif_transpose(image).convert("RGB"))
    except FileNotFoundError as error:
        raise FrameError(path, path.stem, "is missing") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, FrameError):
            raise
        raise FrameError(path, path.stem, f"cannot be read ({_reason(error)})") from error


def _natural(stem: str) -> list[tuple[int, str]]:
    """A key that sorts frame10 after frame9."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", stem) if part]


def _check_numbering(folder: Path, files: list[Path]) -> None:
    """Raises where names repeat or numbered names leave a gap; names that are no numbers are let through."""
    for a, b in pairwise(files):
        if a.stem == b.stem:
            raise FrameError(folder, None, f"two frames have the name {a.stem}: {a.name} and {b.name}")
    numbered = [re.fullmatch(r"(.*?)(\d+)", file.stem) for file in files]
    pairs = [
        (a, int(a[2]), int(b[2]))
        for a, b in pairwise(numbered)
        if a is not None and b is not None and a[1] == b[1]
    ]
    step = min((second - first for _, first, second in pairs), default=1)
    if step == 0:
        name, first, _ = next(pair for pair in pairs if pair[1] == pair[2])
        raise FrameError(folder, None, f"two frames have the number {first}: {name[0]} is one of them")
    count = sum((second - first - 1) // step for _, first, second in pairs)
    if count:
        missing = (
            f"{name[1]}{number:0{len(name[2])}d}"
            for name, first, second in pairs
            for number in range(first + step, second, step)
        )
        names = list(islice(missing, 5))
        more = f" and {count - 5} more" if count > 5 else ""
        every = "" if step == 1 else f" (the others are numbered in steps of {step})"
        raise FrameError(
            folder,
            names[0],
            f"is missing{every}; missing in all: {', '.join(names)}{more}. Add or renumber frames",
        )


def _size(shape: tuple[int, ...]) -> str:
    return f"{shape[1]}x{shape[0]}"


def _reason(error: BaseException) -> str:
    """The system's own words, without the number and path that FFmpeg and the OS wrap them in."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return str(text).split(": '")[0]
