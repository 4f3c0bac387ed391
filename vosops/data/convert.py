# SPDX-License-Identifier: Apache-2.0
"""Other data sets in the layout of YouTube-VOS: frames linked, masks as indexed PNGs, meta.json."""

from __future__ import annotations

import json
import os
import shutil
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from .files import WriteError, remove_leftovers, replacing, write_file
from .layouts import mask_files
from .masks import LabelMap, MaskError, object_ids, read_labels, write_mask


class ConvertError(ValueError):
    """A data set that cannot be converted; the message names the file and says why."""


@dataclass(frozen=True)
class ConvertReport:
    """What `convert` did.

    Attributes:
        videos, masks: how many there are now.
        written: masks that this call wrote; the others were there.
    """

    videos: int
    masks: int
    written: int


class SourceVideo(ABC):
    """A video of another layout.

    Attributes:
        name: of its folder in the result.
        frames: image files, in order; their stems name the masks.
    """

    name: str
    frames: Sequence[Path]

    @abstractmethod
    def labels(self, index: int) -> LabelMap:
        """The label map (H, W) uint8 of frame `index`: 0 background, 255 void, ids that hold for all frames.

        Raises:
            ConvertError: the annotation cannot be used; names the file, and the object where there is one.
        """

    def categories(self) -> dict[int, str]:
        """The category of each id, as far as known."""
        return {}


def convert(
    videos: Sequence[SourceVideo],
    target: str | PathLike[str],
    on_progress: Callable[[int, int], None] | None = None,
) -> ConvertReport:
    """Writes videos in the layout of YouTube-VOS: JPEGImages, Annotations, meta.json.

    Frames are hard links where the file system allows it, else copies. A call that was stopped goes on where
    it was: masks that are there, whole since each takes its name only when complete, are not made again.

    Args:
        videos: of `youtube_vis_videos` or `vspw_videos`.
        target: the folder to write to; may exist.
        on_progress: called with the number of videos done and of all, in the caller's thread.

    Returns:
        ConvertReport.

    Raises:
        ConvertError: an annotation, frame or existing mask that cannot be used; names it. What was written
            stays, and the call can be repeated.
        WriteError: a file cannot be written; names it.

    Note:
        Cost: about 15 ms a mask of 1280x720 with three objects on one core; uses all of them.
    """
    target = Path(target)
    counts = Counter(video.name for video in videos)
    twice = sorted({name for name in counts if counts[name] > 1})
    if twice:
        raise ConvertError(f"videos must have different names, {twice[0]} comes {counts[twice[0]]} times")
    meta: dict[str, object] = {}
    masks = written = 0
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        futures = [pool.submit(_convert_video, video, target) for video in videos]
        try:
            for done, (video, future) in enumerate(zip(videos, futures, strict=True), 1):
                entry, new = future.result()
                meta[video.name] = entry
                masks += len(video.frames)
                written += new
                if on_progress is not None:
                    on_progress(done, len(videos))
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    text = json.dumps({"videos": meta}, indent=1).encode()
    write_file(target / "meta.json", lambda file: file.write(text))
    return ConvertReport(len(meta), masks, written)


def _convert_video(video: SourceVideo, target: Path) -> tuple[dict[str, object], int]:
    """Converts one video; its entry of meta.json, and the number of masks written."""
    images, annotations = target / "JPEGImages" / video.name, target / "Annotations" / video.name
    for folder in (images, annotations):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise WriteError(error.errno, f"cannot make {folder}: {error.strerror}") from error
        remove_leftovers(folder)
    there = mask_files(annotations)
    shown: dict[int, list[str]] = {}
    written = 0
    for index, frame in enumerate(video.frames):
        _link(frame, images / frame.name)
        if frame.stem in there:
            labels = _read_back(there[frame.stem])
        else:
            labels = video.labels(index)
            write_mask(annotations / f"{frame.stem}.png", labels)
            written += 1
        for number in object_ids(labels):
            shown.setdefault(number, []).append(frame.stem)
    categories = video.categories()
    objects = {
        str(number): {"category": categories.get(number, "object"), "frames": shown[number]}
        for number in sorted(shown)
    }
    return {"objects": objects}, written


def _read_back(path: Path) -> LabelMap:
    try:
        return read_labels(path)
    except MaskError as error:
        raise ConvertError(f"{error}; remove it, and convert again") from error


def _link(source: Path, target: Path) -> None:
    """A hard link, or a copy where links are impossible (another disk, a file system without them)."""
    if target.exists():
        return
    if not source.is_file():
        raise ConvertError(f"{source}: no such frame, though the annotations name it")
    with suppress(OSError):
        os.link(source, target)
        return
    with replacing(target) as temporary:
        shutil.copyfile(source, temporary)
