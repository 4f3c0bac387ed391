# SPDX-License-Identifier: Apache-2.0
"""The folder a segmentation writes to: run.json says what was asked, state.pt where it stands."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import torch

from vosops.data.files import remove_leftovers, write_file


class RunRefusedError(ValueError):
    """A run that cannot begin or go on in this folder; nothing was written."""


@dataclass
class State:
    """Where a run stands, and what a resumed run needs.

    Attributes:
        next_frame: number of the frame to segment next.
        name: of the last segmented frame.
        labels: (H, W) uint8, its label map; a run stopped by a write error has no mask file of it.
        fingerprint: of the input's frames before next_frame.
        segmenter: the segmenter's own state.
    """

    next_frame: int
    name: str
    labels: torch.Tensor
    fingerprint: str
    segmenter: dict[str, Any]


class RunFolder:
    """An output folder with masks/, run.json and, until the run is complete, state.pt.

    run.json holds no times, so a resumed run leaves the same bytes as an uninterrupted one.
    """

    def __init__(self, path: Path, request: Mapping[str, Any]) -> None:
        """Nothing is touched here; `request` (JSON values) is what a resumed run must repeat."""
        self.path, self.masks = path, path / "masks"
        try:
            self._request = json.loads(json.dumps(dict(request)))
        except TypeError as error:
            raise TypeError(f"settings must be JSON values: {error}") from error
        self._record, self._state = path / "run.json", path / "state.pt"

    def begin(self, resume: bool) -> tuple[State | None, int | None]:
        """Makes the folder ready for writing.

        Returns:
            The state to go on from (None: from the first frame), and the number of frames if the run is
            complete.

        Raises:
            RunRefusedError: the folder cannot be written, is not empty (no `resume`), or holds another run.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            remove_leftovers(self.path)
            used = any(self.path.iterdir())
            if used and not resume:
                raise RunRefusedError(
                    f"{self.path} is not empty: resume=True (--resume on the command line) goes on with the "
                    "run there, or choose another folder"
                )
            write_file(self.path / "write_test", lambda file: file.write(b"vosops"))
            (self.path / "write_test").unlink()
        except OSError as error:
            raise RunRefusedError(
                f"cannot write to the output folder {self.path}: {error.strerror or error}"
            ) from error
        frames = self._check_record() if used else None
        try:
            if not used:
                self._write_record(None)
            self.masks.mkdir(exist_ok=True)
            remove_leftovers(self.masks)
        except OSError as error:
            raise RunRefusedError(f"cannot write to the output folder {self.path}: {error}") from error
        return (self._load_state() if frames is None else None), frames

    def mask(self, name: str) -> Path:
        return self.masks / f"{name}.png"

    def save(self, state: State) -> None:
        """Replaces state.pt atomically.

        Raises:
            WriteError: it cannot be written; the one before stays.
        """

        def write(file: IO[bytes]) -> None:
            watched = _WatchedFile(file)
            try:
                torch.save(vars(state), cast(IO[bytes], watched))
            except RuntimeError:
                if watched.error is not None:
                    raise watched.error from None
                raise

        write_file(self._state, write)

    def finish(self, frames: int) -> None:
        """Marks the run complete: a state is needed no more."""
        self._write_record(frames)
        self._state.unlink(missing_ok=True)

    def _write_record(self, frames: int | None) -> None:
        record = {"request": self._request, "complete": frames is not None, "frames": frames}
        text = json.dumps(record, indent=2, sort_keys=True) + "\n"
        write_file(self._record, lambda file: file.write(text.encode()))

    def _check_record(self) -> int | None:
        try:
            record = json.loads(self._record.read_text())
            before, frames = record["request"], record["frames"]
        except FileNotFoundError as error:
            raise RunRefusedError(
                f"cannot resume in {self.path}: it holds no run.json, so no run of vosops"
            ) from error
        except (ValueError, KeyError, TypeError) as error:
            raise RunRefusedError(
                f"cannot resume: {self._record} is damaged; start again in another folder"
            ) from error
        changes = list(_differences(before, self._request))
        if changes:
            raise RunRefusedError(
                f"cannot resume in {self.path}: it was begun with {'; '.join(changes)}. "
                "Repeat what it was begun with, or choose another folder"
            )
        return None if frames is None else int(frames)

    def _load_state(self) -> State | None:
        if not self._state.exists():
            return None
        try:
            return State(**torch.load(self._state, weights_only=True))
        except Exception as error:
            raise RunRefusedError(
                f"cannot resume: {self._state} cannot be read ({str(error).splitlines()[0]}); "
                "delete it to begin from the first frame"
            ) from error


class _WatchedFile:
    """Keeps the OSError of a failed write: torch.save turns it into a RuntimeError of its archive writer."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self._file.flush()


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two requests, in words: 'max_size=320 (now null)'."""
    found = []
    for key in sorted(before.keys() | now.keys()):
        a, b = before.get(key), now.get(key)
        if a == b:
            continue
        if isinstance(a, dict) and isinstance(b, dict):
            found += _differences(a, b)
        elif key in ("mask", "input"):
            found.append(f"another {key}")
        else:
            found.append(f"{key}={json.dumps(a)} (now {json.dumps(b)})")
    return found
