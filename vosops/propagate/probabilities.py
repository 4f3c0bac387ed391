# SPDX-License-Identifier: Apache-2.0
"""Probabilities of a run on disk, one file a frame: written beside a segmenter, read as one.

Format: a folder with `probabilities.json` and one `00000.npz`, `00001.npz`, ... per frame. The json has
`format` (1), `vosops` (version), `size` [H, W], `first` (sha256 of the first frame and its mask) and
`settings` (any JSON values). A frame's npz (`numpy.load` reads it) has `object_ids` (O,) int64 and
`probabilities` (O, H, W) uint8: each object's probability times 255, rounded. The background is what the
objects leave.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import vosops
from vosops.data.files import remove_leftovers, write_file

from .augment import check_frame
from .run import VideoSegmenter
from .tracker import check_labels

Frame = NDArray[np.uint8]

_FORMAT = 1
_MANIFEST = "probabilities.json"
_PARTS = {"object_ids", "probabilities"}


class ProbabilitiesError(ValueError):
    """A folder or file of probabilities that cannot be used; the message names it and says why."""


def with_background(objects: Tensor) -> Tensor:
    """Probabilities (1+O, H, W) that sum to 1 of objects (O, H, W) >= 0: the background is what they leave.

    Where the objects together pass 1 they are scaled down to it.
    """
    total = objects.sum(0, keepdim=True)
    objects = objects / total.clamp(min=1)
    return torch.cat(((1 - total).clamp(min=0), objects))


def write_probabilities(path: str | Path, probabilities: Tensor, object_ids: Sequence[int]) -> None:
    """Writes a frame's probabilities, atomically.

    Args:
        path: the .npz.
        probabilities: (1+O, H, W) of any floating dtype, in [0, 1], background first.
        object_ids: O distinct ids, of channels 1..O.

    Raises:
        TypeError, ValueError: a bad argument, or probabilities that are not finite; nothing is written.
        WriteError: the file cannot be written; names it.

    Note:
        An object's probability read back differs by at most 1/510, the background's by at most O/510; where
        rounded objects together pass 1 they are scaled to it, which adds at most O/510. Cost: 3 ms and 15 KB
        for three objects at 854x480.
    """
    if not isinstance(probabilities, Tensor) or not probabilities.is_floating_point():
        got = probabilities.dtype if isinstance(probabilities, Tensor) else type(probabilities).__name__
        raise TypeError(f"probabilities must be a floating-point tensor (1+O, H, W), got {got}")
    ids = [int(i) for i in object_ids]
    if probabilities.dim() != 3 or len(probabilities) != 1 + len(ids) or len(set(ids)) < len(ids):
        raise ValueError(
            f"probabilities must have shape (1+O, H, W) for O distinct object_ids, got "
            f"{list(probabilities.shape)} and ids {ids}"
        )
    if not bool(probabilities.isfinite().all()):
        raise ValueError("probabilities must be finite")
    levels = (probabilities[1:].float().clamp(0, 1) * 255).round().byte().cpu().numpy()
    write_file(
        Path(path),
        lambda file: np.savez_compressed(file, object_ids=np.array(ids, np.int64), probabilities=levels),
    )


def read_probabilities(path: str | Path) -> tuple[Tensor, list[int]]:
    """Reads a frame's probabilities.

    Returns:
        (1+O, H, W) float32, background first, summing to 1; and the O ids.

    Raises:
        ProbabilitiesError: the file is missing, damaged, or holds something else.

    Note:
        Cost: 4 ms for three objects at 854x480.
    """
    try:
        with np.load(path, allow_pickle=False) as parts:
            if set(parts) != _PARTS:
                raise ProbabilitiesError(f"{path}: holds {sorted(parts)}, expected {sorted(_PARTS)}")
            ids, levels = parts["object_ids"], parts["probabilities"]
    except FileNotFoundError as error:
        raise ProbabilitiesError(f"{path}: no such file") from error
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        if isinstance(error, ProbabilitiesError):
            raise
        raise ProbabilitiesError(f"{path}: cannot be read ({error})") from error
    if levels.dtype != np.uint8 or levels.ndim != 3 or ids.shape != levels.shape[:1]:
        raise ProbabilitiesError(
            f"{path}: holds probabilities {levels.dtype} {list(levels.shape)} for {ids.size} ids, expected "
            "uint8 (O, H, W) for O ids"
        )
    return with_background(torch.from_numpy(levels).float() / 255), [int(i) for i in ids]


class SavingSegmenter:
    """Runs a segmenter and saves the probabilities of every frame.

    It is a `VideoSegmenter` itself: what it gives is the segmenter's own, not rounded. Frames are counted
    from 0, the first one of `add`, whose file holds the given mask; a mask given on a later frame is not in
    that frame's file, only in what follows from it.

    Args:
        segmenter: new, before its first `add`.
        folder: to write to, made if needed. If it holds probabilities already, they must be of the same first
            frame, mask, size and settings: they are written again.
        settings: what tells this run from others (model, weights, options), as JSON values.

    Raises:
        TypeError: settings are no JSON values.

    Note:
        After a kill, a resumed run (`segment_video`) writes the frames again from its last state on; the
        files are those of an uninterrupted run, byte for byte.
    """

    def __init__(
        self, segmenter: VideoSegmenter, folder: str | Path, settings: Mapping[str, Any] | None = None
    ) -> None:
        try:
            self._settings: Any = json.loads(json.dumps(dict(settings or {})))
        except TypeError as error:
            raise TypeError(f"settings must be JSON values: {error}") from error
        self._segmenter: Any = segmenter
        self._folder = Path(folder)
        self._manifest: dict[str, Any] | None = None
        self._index = -1  # of the present frame
        self._present = ""  # its digest

    @property
    def object_ids(self) -> list[int]:
        """Ids of the objects, in the order of channels 1..O."""
        return list(self._segmenter.object_ids)

    @property
    def memory_nbytes(self) -> int:
        """Bytes of memory of the segmenter (of one that tells)."""
        return int(self._segmenter.memory_nbytes)

    def add(self, frame: Frame, mask: NDArray[Any]) -> None:
        """Takes a frame with its mask, as the segmenter's own `add`.

        Raises:
            TypeError, ValueError: a bad argument; nothing has changed. And what the segmenter raises.
            ProbabilitiesError: the folder holds probabilities of another run; nothing has changed.
            WriteError: a file cannot be written; names it.
        """
        check_frame(frame, None)
        labels = check_labels(mask, frame.shape[:2])
        digest = _digest(frame)
        if self._manifest is not None:
            if digest != self._present:
                self.step(frame)
            self._segmenter.add(frame, mask)
            return
        manifest = {
            "format": _FORMAT,
            "vosops": vosops.__version__,
            "size": list(frame.shape[:2]),
            "first": hashlib.sha256(digest.encode() + labels.tobytes()).hexdigest(),
            "settings": self._settings,
        }
        self._check_folder(manifest)
        self._segmenter.add(frame, mask)
        text = json.dumps(manifest, indent=2, sort_keys=True) + "\n"
        write_file(self._folder / _MANIFEST, lambda file: file.write(text.encode()))
        ids = self.object_ids
        given = torch.from_numpy(np.stack([labels == i for i in ids])).float()
        write_probabilities(frame_file(self._folder, 0), with_background(given), ids)
        self._manifest, self._index, self._present = manifest, 0, digest

    def step(self, frame: Frame) -> Tensor:
        """Segments the next frame and saves what it found: (1+O, H, W), background first.

        Raises:
            WriteError: the file cannot be written; names it. And what the segmenter raises.
        """
        found: Tensor = self._segmenter.step(frame)
        write_probabilities(frame_file(self._folder, self._index + 1), found, self.object_ids)
        self._index, self._present = self._index + 1, _digest(frame)
        return found

    def remove(self, object_ids: Iterable[int]) -> None:
        """Forgets objects, for a segmenter that can (`Tracker.remove`).

        Raises:
            TypeError: the segmenter has no `remove`; and what that raises.
        """
        if not hasattr(self._segmenter, "remove"):
            raise TypeError(f"{type(self._segmenter).__name__} cannot remove objects")
        self._segmenter.remove(object_ids)

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on exactly: the segmenter's state, and which frame is the present one."""
        return {
            "manifest": None if self._manifest is None else json.dumps(self._manifest, sort_keys=True),
            "settings": json.dumps(self._settings, sort_keys=True),
            "index": self._index,
            "present": self._present,
            "segmenter": self._segmenter.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes a state back, in a new object with the same segmenter, folder and settings.

        Raises:
            ValueError: the settings differ, or the folder lacks what this run saved; nothing has changed.
        """
        mine = json.dumps(self._settings, sort_keys=True)
        if state["settings"] != mine:
            raise ValueError(f"state was saved with settings {state['settings']}, this segmenter has {mine}")
        manifest = None if state["manifest"] is None else json.loads(state["manifest"])
        if manifest is not None:
            self._check_folder(manifest)
            newest = frame_file(self._folder, state["index"])
            if not newest.exists():
                raise ProbabilitiesError(
                    f"{self._folder} lacks {newest.name}: it is not the folder of this run"
                )
        self._segmenter.load_state_dict(state["segmenter"])
        self._manifest, self._index, self._present = manifest, int(state["index"]), str(state["present"])

    def _check_folder(self, manifest: dict[str, Any]) -> None:
        """Makes the folder, and refuses one that holds another run."""
        self._folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(self._folder)
        if (self._folder / _MANIFEST).exists():
            held = _read_manifest(self._folder)
            changed = [
                name for name in sorted(held.keys() | manifest.keys()) if held.get(name) != manifest.get(name)
            ]
            if changed:
                raise ProbabilitiesError(
                    f"{self._folder} holds probabilities of another run ({', '.join(changed)} differ): "
                    "choose another folder"
                )


class SavedProbabilities:
    """Reads what a `SavingSegmenter` wrote, as a segmenter: an offline ensemble is one of these.

    `step` gives the next frame's saved probabilities and looks at nothing but the frame's size. Objects that
    were saved but are not given here count as background; given ones that were not saved are not among
    `object_ids`.

    Args:
        folder: of the probabilities.

    Raises:
        ProbabilitiesError: it holds none, or of another format.

    Note:
        One frame is read at a time, and nothing of it is kept.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.manifest = _read_manifest(self.folder)
        """What probabilities.json says, with the run's settings."""
        self._given: list[int] = []
        self._object_ids: list[int] = []
        self._index = -1
        self._present = ""

    @property
    def object_ids(self) -> list[int]:
        """Ids of the objects, in the order of channels 1..O: that of the run."""
        return list(self._object_ids)

    @property
    def memory_nbytes(self) -> int:
        """0: it remembers nothing."""
        return 0

    def add(self, frame: Frame, mask: NDArray[Any]) -> None:
        """Takes a frame with its mask: of the first one, or of objects that were added later in the run too.

        Args:
            frame: (H, W, 3) uint8 RGB, of the saved size: the frame of the last `step`, or the next one.
            mask: (H, W) integer ids, 0 background, 255 void.

        Raises:
            TypeError, ValueError: a bad argument; nothing has changed.
            ProbabilitiesError: none of the objects of the first mask was saved, or from another mask.
        """
        self._check_size(frame)
        labels = check_labels(mask, frame.shape[:2])
        ids = [int(i) for i in np.unique(labels) if i]
        digest = _digest(frame)
        if self._index < 0:
            saved, known = read_probabilities(frame_file(self.folder, 0))
            common = [i for i in known if i in ids]
            if not common:
                raise ProbabilitiesError(
                    f"{self.folder} holds objects {known}, the mask has {ids}: none in common"
                )
            for i in common:
                if not np.array_equal(saved[1 + known.index(i)].numpy() > 0.5, labels == i):
                    raise ProbabilitiesError(f"{self.folder} was saved from another mask of object {i}")
            self._given, self._object_ids, self._index, self._present = ids, common, 0, digest
            return
        if digest != self._present:
            self.step(frame)
        self._given += [i for i in ids if i not in self._given]
        following = frame_file(self.folder, self._index + 1)
        if following.exists():
            self._object_ids = [i for i in read_probabilities(following)[1] if i in self._given]

    def step(self, frame: Frame) -> Tensor:
        """The saved probabilities (1+O, H, W) float32 of the next frame, background first, summing to 1.

        Raises:
            RuntimeError: no mask was added yet.
            TypeError, ValueError: a bad frame, or of another size.
            ProbabilitiesError: the frame was not saved, or its file is damaged; names it.
        """
        self._check_size(frame)
        if self._index < 0:
            raise RuntimeError("step needs objects to follow: call add(frame, mask) with the first frame")
        path = frame_file(self.folder, self._index + 1)
        if not path.exists():
            raise ProbabilitiesError(
                f"{self.folder} holds {self._index + 1} frames, the video goes on: its run is not complete"
            )
        saved, known = read_probabilities(path)
        if list(saved.shape[1:]) != self.manifest["size"]:
            raise ProbabilitiesError(f"{path}: has the size {list(saved.shape[1:])}, not that of its folder")
        self._object_ids = [i for i in known if i in self._given]
        self._index, self._present = self._index + 1, _digest(frame)
        if self._object_ids == known:
            return saved
        return with_background(saved[[1 + known.index(i) for i in self._object_ids]])

    def remove(self, object_ids: Iterable[int]) -> None:
        """Forgets objects: from the next frame on they are background.

        Raises:
            ValueError: an id is not there; nothing has changed.
        """
        ids = list(object_ids)
        unknown = [i for i in ids if i not in self._object_ids]
        if unknown:
            raise ValueError(f"object_ids must be ids of {self._object_ids}, got {ids}")
        self._given = [i for i in self._given if i not in ids]
        self._object_ids = [i for i in self._object_ids if i not in ids]

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on exactly: plain values."""
        return {
            "first": self.manifest["first"],
            "given": list(self._given),
            "object_ids": list(self._object_ids),
            "index": self._index,
            "present": self._present,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes a state back, in a new object on the same folder, wherever that lies now.

        Raises:
            ValueError: the state is of another run's folder; nothing has changed.
        """
        if state["first"] != self.manifest["first"]:
            raise ValueError(
                f"state was saved with the probabilities of another run than {self.folder} holds"
            )
        self._given, self._object_ids = list(state["given"]), list(state["object_ids"])
        self._index, self._present = int(state["index"]), str(state["present"])

    def _check_size(self, frame: object) -> None:
        size = check_frame(frame, None)
        if list(size) != self.manifest["size"]:
            raise ValueError(
                f"frame must have the size of the probabilities in {self.folder}, {self.manifest['size']}, "
                f"got {list(size)}"
            )


def frame_file(folder: Path, index: int) -> Path:
    """The file of a frame, counted from 0."""
    return folder / f"{index:05d}.npz"


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / _MANIFEST
    try:
        manifest = dict(json.loads(path.read_text()))
        version, size, _ = manifest["format"], list(manifest["size"]), str(manifest["first"])
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ProbabilitiesError(f"{folder} holds no {_MANIFEST}, so no probabilities") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ProbabilitiesError(f"{path} is damaged") from error
    if version != _FORMAT or len(size) != 2:
        raise ProbabilitiesError(
            f"{path} has format {version!r} and size {size}, expected {_FORMAT} and [H, W]"
        )
    return manifest


def _digest(frame: Frame) -> str:
    return hashlib.sha256(np.ascontiguousarray(frame).tobytes()).hexdigest()
