# SPDX-License-Identifier: Apache-2.0
"""The sequences of a data set as an evaluation gives them: frames, the masks that are given, the truth."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vosops.data.frames import Frame, FrameSource, open_frames
from vosops.data.layouts import LayoutError, VideoFolders, image_files, mask_files, subfolders, video_folders
from vosops.data.masks import VOID, LabelMap, MaskError, Palette, object_ids, read_labels, read_mask


@dataclass(frozen=True)
class DataSequence:
    """One sequence of a data set.

    Attributes:
        name: of its folder.
        frames: folder of its images.
        names: of its frames, in order.
        given: names of the frames whose masks may hold objects that are given, the first of them the frame
            on which the sequence begins to be segmented.
        masks: folder of the masks.
        scored: every frame has a mask, so that a result can be scored.
    """

    name: str
    frames: Path
    names: tuple[str, ...]
    given: tuple[str, ...]
    masks: Path
    scored: bool

    @property
    def start(self) -> int:
        """Number of the frame on which the first objects are given."""
        return self.names.index(self.given[0])

    def read_given(self) -> tuple[dict[int, LabelMap], Palette]:
        """The given masks by the number of their frame after `start`, and the palette of the first.

        Each holds the objects that enter on its frame: an object is given where it is seen first. Void (255)
        is taken as background.

        Raises:
            MaskError: a mask that cannot be read, of another size than the frames, or a first one without
                an object.
        """
        size = open_frames(self.frames).size
        first, palette = read_mask(self.masks / f"{self.given[0]}.png", size)
        known = set(object_ids(first))
        found = {0: np.where(first == VOID, 0, first).astype(np.uint8)}
        for name in self.given[1:]:
            path = self.masks / f"{name}.png"
            labels = read_labels(path)
            if labels.shape != size:
                raise MaskError(f"{path}: the mask is {list(labels.shape)}, the frame {list(size)} (H, W)")
            entering = set(object_ids(labels)) - known
            if entering:
                number = self.names.index(name) - self.start
                found[number] = np.where(np.isin(labels, sorted(entering)), labels, 0).astype(np.uint8)
                known |= entering
        return found, palette


def find_sequences(root: Path, names: Sequence[str] | None = None) -> tuple[list[DataSequence], VideoFolders]:
    """The sequences of a data set in DAVIS's or YouTube-VOS's layout, longest first.

    In DAVIS's layout the first frame's mask is given; in YouTube-VOS's every object is given on the first
    frame whose mask shows it, and frames before the first mask have none.

    Args:
        root: the data set (`vosops.data.layouts.video_folders`).
        names: of the sequences; by default those of ImageSets/2017/val.txt in DAVIS's layout where there is
            such a list, else all that have masks.

    Raises:
        LayoutError: `root` is no data set; a sequence has no frames, or no mask of its first frame.

    Note:
        Reads names, no image. The order is a function of the files' names: equal on every machine.
    """
    folders = video_folders(root)
    listed = root / "ImageSets" / "2017" / "val.txt"
    if names is None:
        if folders.dense and listed.is_file():
            names = listed.read_text(encoding="utf-8").split()
        else:
            names = [folder.name for folder in subfolders(folders.masks)]
    if not names:
        raise LayoutError(f"{root}: there is no sequence to segment")
    if len(set(names)) < len(names):
        raise LayoutError(f"{root}: sequences must be named once, got {', '.join(names)}")
    found = [_sequence(folders, name) for name in names]
    return sorted(found, key=lambda sequence: (-len(sequence.names), sequence.name)), folders


def share(sequences: Sequence[DataSequence], rank: int, processes: int) -> list[DataSequence]:
    """The sequences of one process of several: each goes, longest first, to the one with the fewest frames.

    Args:
        sequences: as `find_sequences` orders them.
        rank: of the process, from 0.
        processes: how many there are.
    """
    loads = [0] * processes
    mine = []
    for sequence in sequences:
        lightest = loads.index(min(loads))
        loads[lightest] += len(sequence.names)
        if lightest == rank:
            mine.append(sequence)
    return mine


class Later(FrameSource):
    """A video without its first frames.

    Args:
        source: the whole video.
        start: number of the first frame left in.
    """

    def __init__(self, source: FrameSource, start: int) -> None:
        self._source, self._start = source, start
        self.path, self.size, self.fps = source.path, source.size, source.fps
        self.length = None if source.length is None else source.length - start

    def frames(self, start: int = 0) -> Iterator[tuple[str, Frame]]:
        return self._source.frames(self._start + start)

    def fingerprint(self, count: int) -> str:
        return self._source.fingerprint(self._start + count)


def _sequence(folders: VideoFolders, name: str) -> DataSequence:
    frames, masks = folders.images / name, folders.masks / name
    for folder in (frames, masks):
        if not folder.is_dir():
            raise LayoutError(f"{folder}: no such folder")
    names, labelled = tuple(image_files(frames)), set(mask_files(masks))
    if not names:
        raise LayoutError(f"{frames}: holds no frames")
    unknown = sorted(labelled - set(names))
    if unknown:
        raise LayoutError(f"{masks}: {unknown[0]}.png is the mask of a frame that {frames} does not have")
    given = names[:1] if folders.dense else tuple(name for name in names if name in labelled)
    if not given or given[0] not in labelled:
        raise LayoutError(f"{masks}: has no mask {names[0]}.png to begin with")
    return DataSequence(name, frames, names, given, masks, folders.dense and set(names) <= labelled)
