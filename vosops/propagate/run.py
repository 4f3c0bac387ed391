# SPDX-License-Identifier: Apache-2.0
"""Segmenting a video from its first mask: streaming, resumable, masks on disk as soon as they are known."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

import vosops
from vosops.data.frames import Frame, FrameError, FrameSource
from vosops.data.masks import VOID, LabelMap, Palette, davis_palette, object_ids, read_labels, write_mask
from vosops.data.writers import VideoWriter, evenly_spaced, overlay, video_writer, write_contact_sheet

from .run_folder import RunFolder, RunRefusedError, State

__all__ = ["RunError", "RunRefusedError", "Summary", "VideoSegmenter", "segment_video"]

Progress = Callable[[str, int, int | None], None]

_FPS = 24.0  # of an overlay whose frames came from a folder: that of DAVIS


class VideoSegmenter(Protocol):
    """What segments a video frame by frame; `LabelPropagator` and the models follow it."""

    @property
    def object_ids(self) -> list[int]:
        """Ids of the objects, in the order of channels 1..O."""

    def add(self, frame: NDArray[np.uint8], mask: NDArray[Any]) -> None:
        """Takes a frame (H, W, 3) uint8 RGB with its label map (H, W), integer ids, 0 background."""

    def step(self, frame: NDArray[np.uint8]) -> torch.Tensor:
        """Probabilities (1+O, H, W) of the next frame, background first."""

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on exactly: tensors and plain Python values, as torch.load allows them."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes a state back, in a new object built with the same options."""


class RunError(RuntimeError):
    """A run that stopped in the middle; what was written stays, and resume=True goes on.

    Attributes:
        frame: name of the frame at fault, None after the last frame.
    """

    def __init__(self, frame: str | None, message: str) -> None:
        super().__init__(message)
        self.frame = frame


@dataclass(frozen=True)
class Summary:
    """What a run did.

    Attributes:
        frames: of the video, all with a mask in `masks`.
        segmented: of them in this call; fewer after a resume.
        seconds: this call took for them, reading and writing included, without the overlay.
        object_ids: ids in the masks.
        masks: folder of the masks, <frame name>.png.
        overlay, contact_sheet: the files, None if not asked for.
    """

    frames: int
    segmented: int
    seconds: float
    object_ids: list[int]
    masks: Path
    overlay: Path | None
    contact_sheet: Path | None

    @property
    def fps(self) -> float:
        """Frames per second of this call, 0 if it segmented none."""
        return self.segmented / self.seconds if self.segmented else 0.0


def segment_video(
    segmenter: VideoSegmenter,
    source: FrameSource,
    mask: NDArray[Any],
    out_dir: str | Path,
    *,
    palette: Palette | None = None,
    resume: bool = False,
    max_size: int | None = None,
    write_overlay: bool = True,
    save_every: int = 10,
    settings: Mapping[str, Any] | None = None,
    on_progress: Progress | None = None,
) -> Summary:
    """Segments a video from the mask of its first frame.

    Writes masks/<name>.png (indexed, at the video's size) per frame as soon as it is known, then overlay.mp4
    and contact_sheet.png from the frames and masks read again one by one. Until the end, state.pt holds the
    segmenter's state, saved every `save_every` frames and at a failure: `resume` repeats at most that many
    frames after a kill, and its files equal, byte for byte, those of an uninterrupted run.

    Args:
        segmenter: new, before its first `add`.
        source: of `open_frames`.
        mask: (H, W) integer ids of the first frame, 0 background, 255 void (taken as background); ids up to
            254 need not be consecutive.
        out_dir: folder to write to; new or empty unless `resume`.
        palette: (256, 3) uint8 RGB of the masks; the DAVIS palette by default.
        resume: go on with the run in out_dir; with none there, begin.
        max_size: longer side, pixels, that the segmenter works at; the video's own by default.
        write_overlay: write overlay.mp4 and contact_sheet.png.
        save_every: frames between two saved states, at least 1.
        settings: what a resumed run must repeat, as JSON values; the segmenter's options.
        on_progress: called as on_progress(stage, done, total), stage "segment" or "overlay", total None if
            unknown.

    Returns:
        The Summary.

    Raises:
        TypeError, ValueError: a bad argument, before any work.
        RunRefusedError: out_dir cannot be written, is not empty, or holds a run of another request; before
            any work.
        RunError: a frame could not be read, segmented or written; names it, says from where resume goes on.

    Note:
        Memory: one frame, its probabilities (1+O, H, W) float32 at the video's size, and the segmenter's own.
        A failure inside `step` leaves the segmenter's state unknown, so resume then goes on from the last
        saved state instead of the failed frame.
    """
    labels = _check_mask(mask, source.size)
    palette = davis_palette() if palette is None else palette
    if palette.shape != (256, 3) or palette.dtype != np.uint8:
        raise ValueError(f"palette must be (256, 3) uint8, got {palette.dtype} {list(palette.shape)}")
    if save_every < 1:
        raise ValueError(f"save_every must be at least 1, got {save_every}")
    scaling = _Scaling(source.size, max_size, labels)
    request = {
        "vosops": vosops.__version__,
        "input": source.fingerprint(1),
        "size": list(source.size),
        "mask": hashlib.sha256(labels.tobytes() + palette.tobytes()).hexdigest(),
        "max_size": max_size,
        "segmenter": type(segmenter).__name__,
        "settings": dict(settings or {}),
    }
    folder = RunFolder(Path(out_dir), request)
    state, finished = folder.begin(resume)
    if state is not None and state.fingerprint != source.fingerprint(state.next_frame):
        raise RunRefusedError(
            f"cannot resume in {out_dir}: frames of {source.path} before {state.name} have changed"
        )
    if finished is not None and source.length not in (None, finished):
        raise RunRefusedError(
            f"cannot resume in {out_dir}: that run is complete with {finished} frames, {source.path} now has "
            f"{source.length}. Choose another folder"
        )

    begun = perf_counter()
    run = _Run(segmenter, source, labels, palette, folder, scaling, save_every, on_progress)
    frames, segmented = (finished, 0) if finished is not None else run.segment(state)
    seconds = perf_counter() - begun
    movie, sheet = folder.path / "overlay.mp4", folder.path / "contact_sheet.png"
    if write_overlay and not (finished is not None and movie.exists() and sheet.exists()):
        try:
            run.draw(frames, movie, sheet)
        except (OSError, ValueError) as error:
            message = f"all {frames} masks are in {folder.masks}, but {error}. Go on with resume (--resume)"
            raise RunError(None, message) from error
    folder.finish(frames)
    return Summary(
        frames,
        segmented,
        seconds,
        object_ids(labels),
        folder.masks,
        movie if write_overlay else None,
        sheet if write_overlay else None,
    )


@dataclass
class _Run:
    segmenter: VideoSegmenter
    source: FrameSource
    labels: LabelMap
    palette: Palette
    folder: RunFolder
    scaling: _Scaling
    save_every: int
    on_progress: Progress | None

    def segment(self, state: State | None) -> tuple[int, int]:
        """Segments from `state` to the end; returns the video's number of frames and those done now."""
        start = done = saved = written = 0
        name, labels = "", self.labels  # of frame done - 1
        at: str | None = None  # the frame in work
        known = False  # whether the segmenter's state is the one after `done` frames
        try:
            if state is not None:
                self.segmenter.load_state_dict(state.segmenter)
                start = done = saved = state.next_frame
                at, name, labels = state.name, state.name, state.labels.numpy()
                write_mask(self.folder.mask(name), labels, self.palette)
                written = done
            known = True
            for at, frame in self.source.frames(start):
                known = False
                labels = self._segment_frame(frame, first=done == 0)
                name, done, known = at, done + 1, True
                write_mask(self.folder.mask(name), labels, self.palette)
                written = done
                if done % self.save_every == 0:
                    self._save(done, name, labels)
                    saved = done
                self._report("segment", done, self.source.length)
            if saved < done:
                self._save(done, name, labels)
        except BaseException as error:
            note = ""
            if known and saved < done:
                try:
                    self._save(done, name, labels)
                    saved = done
                except Exception as unsaved:
                    note = "" if str(unsaved) == str(error) else f"; {unsaved}"
            if not isinstance(error, Exception):
                raise
            raise self._failure(error, at, written, saved, note) from error
        return done, done - start

    def draw(self, frames: int, movie: Path, sheet: Path) -> None:
        """Writes the overlay video and the contact sheet, reading frames and masks once more."""
        chosen = set(evenly_spaced(frames, 12))

        def draw_frames(writer: VideoWriter) -> Iterator[tuple[str, Frame]]:
            for number, (name, frame) in enumerate(self.source):
                picture = overlay(frame, read_labels(self.folder.mask(name)), self.palette)
                writer.write(picture)
                if number in chosen:
                    yield name, picture
                self._report("overlay", number + 1, frames)

        with video_writer(movie, self.source.size, self.source.fps or _FPS) as writer:
            # The sheet takes its pictures as they pass: it keeps small ones, not twelve whole frames.
            write_contact_sheet(sheet, draw_frames(writer))

    def _segment_frame(self, frame: Frame, first: bool) -> LabelMap:
        small = self.scaling.frame(frame)
        if first:
            self.segmenter.add(small, self.scaling.labels)
            return self.labels
        probabilities = self.segmenter.step(small)
        ids = [0, *self.segmenter.object_ids]
        expected = (len(ids), *small.shape[:2])
        if tuple(probabilities.shape) != expected:
            raise ValueError(f"step must return probabilities {expected}, got {tuple(probabilities.shape)}")
        if not bool(probabilities.sum().isfinite()):
            raise ValueError("step returned probabilities that are not finite")
        return _likeliest(self.scaling.probabilities(probabilities), ids)

    def _save(self, done: int, name: str, labels: LabelMap) -> None:
        fingerprint = self.source.fingerprint(done)
        state = self.segmenter.state_dict()
        self.folder.save(State(done, name, torch.from_numpy(labels.copy()), fingerprint, state))

    def _failure(self, error: Exception, at: str | None, written: int, saved: int, note: str) -> RunError:
        frame = error.frame if isinstance(error, FrameError) else at
        text = str(error) or type(error).__name__
        if not isinstance(error, FrameError):
            text = f"frame {at}: {text}" if at else text
        resumed = f"goes on from frame number {saved}" if saved else "begins again"
        return RunError(
            frame, f"{text}. {written} masks are in {self.folder.masks}; resume (--resume) {resumed}{note}"
        )

    def _report(self, stage: str, done: int, total: int | None) -> None:
        if self.on_progress is not None:
            self.on_progress(stage, done, total)


class _Scaling:
    """Between the video's size and the size the segmenter works at."""

    def __init__(self, size: tuple[int, int], max_size: int | None, labels: LabelMap) -> None:
        if max_size is not None and max_size < 16:
            raise ValueError(f"max_size must be at least 16 pixels, got {max_size}")
        factor = 1.0 if max_size is None else min(1.0, max_size / max(size))
        self._size = size
        self._small = (max(1, round(size[0] * factor)), max(1, round(size[1] * factor)))
        self.labels = labels
        if self._small != size:
            self.labels = np.asarray(
                cv2.resize(labels, self._small[::-1], interpolation=cv2.INTER_NEAREST_EXACT), np.uint8
            )
        lost = sorted(set(object_ids(labels)) - set(object_ids(self.labels)))
        if lost:
            raise ValueError(
                f"max_size={max_size} is too small for the mask: objects {lost} vanish; give a larger one"
            )

    def frame(self, frame: Frame) -> Frame:
        if self._small == self._size:
            return frame
        return np.asarray(cv2.resize(frame, self._small[::-1], interpolation=cv2.INTER_AREA), np.uint8)

    def probabilities(self, probabilities: torch.Tensor) -> torch.Tensor:
        if self._small == self._size:
            return probabilities
        resized = F.interpolate(probabilities[None].float(), self._size, mode="bilinear", align_corners=False)
        return resized[0]


def _likeliest(probabilities: torch.Tensor, ids: list[int]) -> LabelMap:
    """The id of the largest probability, the first of equals: torch's argmax over channels is slow."""
    best = probabilities[0].clone()
    labels = torch.zeros(best.shape, dtype=torch.uint8, device=best.device)
    for probability, object_id in zip(probabilities[1:], ids[1:], strict=True):
        labels.masked_fill_(probability > best, object_id)
        torch.maximum(best, probability, out=best)
    return np.asarray(labels.cpu().numpy(), np.uint8)


def _check_mask(mask: NDArray[Any], size: tuple[int, int]) -> LabelMap:
    """The mask as uint8 ids without void."""
    if not isinstance(mask, np.ndarray) or mask.ndim != 2 or mask.dtype.kind not in "iu":
        got = f"{mask.dtype} {list(mask.shape)}" if isinstance(mask, np.ndarray) else type(mask).__name__
        raise TypeError(f"mask must be an array (H, W) of integer ids, got {got}")
    if mask.shape != size:
        raise ValueError(f"mask must have the frames' size {list(size)}, got {list(mask.shape)}")
    if mask.min() < 0 or mask.max() > VOID:
        raise ValueError(f"mask must hold ids from 0 to 255, got {mask.min()} to {mask.max()}")
    labels = np.where(mask == VOID, 0, mask).astype(np.uint8)
    if not labels.any():
        raise ValueError("mask must hold at least one object (ids 1 to 254), got none")
    return labels
