# SPDX-License-Identifier: Apache-2.0
"""The inference engine of all models: objects of a video followed frame by frame, with constant memory."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vosops.models.session import Session, SessionSettings, VideoModel

Frame = NDArray[np.uint8]

VOID = 255
"""Label of pixels that belong to no object; taken as background."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass
class _Present:
    """The last frame seen; the session remembers it with the next one, so that `add` can still change it."""

    frame: Frame
    image: Tensor  # [1, 3, H, W], prepared
    features: Any
    probabilities: Tensor  # [1, 1+O, H, W], prepared size
    object_ids: list[int]
    given: bool  # a mask was given on this frame


class Tracker:
    """Follows the objects of one video with a memory model: masks by `add`, then frame by frame by `step`.

    New objects may come on any frame, under any ids. On that frame the known objects are predicted first,
    give way inside the new mask, and `VideoModel.combine` settles the rest.

    Args:
        model: any `VideoModel` with float32 weights; moved to `device` and put into evaluation mode. Trackers
            with the same device and channels_last may share one, in threads as well.
        settings: of its memory; by default as its paper or published code has it.
        device: where to run; that of the model's parameters by default.
        dtype: float32, or bfloat16 or float16 for autocast: convolutions run in it, affinities stay float32.
        channels_last: memory format of the convolutions' weights and of images; None takes what was
            measured as faster (`prefers_channels_last`).

    Raises:
        TypeError, ValueError: a bad argument, named.

    Note:
        Cost: one encoding and one segmentation a frame, one memory value for each frame remembered. Memory:
        the present frame with its features and probabilities, and the session's memory (`memory_nbytes`).
        A frame enters the memory when the next one comes; the last of a video never does.

    Example:
        >>> tracker = Tracker(models.load("stcn", "stcn.pth"))
        >>> tracker.add(frames[0], mask)  # (480, 854, 3) uint8, (480, 854) integer ids
        >>> labels = [tracker.step(frame).argmax(0) for frame in frames[1:]]
    """

    def __init__(
        self,
        model: VideoModel,
        settings: SessionSettings | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        channels_last: bool | None = None,
    ) -> None:
        if not isinstance(model, VideoModel):
            raise TypeError(f"model must be a VideoModel, got {type(model).__name__}")
        if settings is not None and not isinstance(settings, SessionSettings):
            raise TypeError(f"settings must be SessionSettings, got {type(settings).__name__}")
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(map(str, DTYPES))}, got {dtype}")
        if channels_last not in (None, True, False):
            raise TypeError(f"channels_last must be a bool or None, got {channels_last!r}")
        weights = [*model.parameters(), *model.buffers()]
        other = {weight.dtype for weight in weights if weight.is_floating_point()} - {torch.float32}
        if other:
            raise TypeError(
                f"model must have float32 weights, got {', '.join(sorted(map(str, other)))}: call "
                "model.float(); convolutions run in a shorter type with dtype"
            )
        home = weights[0].device if weights else torch.device("cpu")
        self.device = home if device is None else torch.device(device)
        self.dtype = dtype
        self.settings = SessionSettings() if settings is None else settings
        if channels_last is None:
            channels_last = prefers_channels_last(self.device, dtype)
        self._format = torch.channels_last if channels_last else torch.contiguous_format
        self.model = model.to(self.device, memory_format=self._format).eval()  # type: ignore[call-overload]
        self._session: Session[Any] = self.model.open_session(self.settings)
        self._removed: set[int] = set()
        self._index = 0  # of the present frame
        self._present: _Present | None = None

    @property
    def object_ids(self) -> list[int]:
        """Ids of the objects, in the order of channels 1..O: the order in which they came."""
        return [] if self._present is None else list(self._present.object_ids)

    @property
    def memory_nbytes(self) -> int:
        """Bytes of memory allocated by the session."""
        return self._session.memory_nbytes

    @property
    def probabilities(self) -> Tensor:
        """Of the present frame (1 + O, H, W) float32, masks given on it included.

        Raises:
            RuntimeError: there is no frame yet.
        """
        if self._present is None:
            raise RuntimeError("there is no frame yet: call add(frame, mask) first")
        return self._restore(self._present.probabilities, self._present.frame)

    @torch.no_grad()
    def add(self, frame: Frame, mask: NDArray[Any]) -> None:
        """Takes the given mask of a frame: of the first one, of new objects, or to correct objects.

        Objects in `mask` are as it says on this frame, and the frame is remembered so. An object that was
        known before is corrected: what was remembered of it stays, as in XMem's published code
        (`LabelPropagator` lets it restart from this frame instead; to have that here, remove it and give it a
        new id). Objects that are not in `mask` go on; inside of it they give way.

        Args:
            frame: (H, W, 3) uint8 RGB: the frame of the last `step`, or the next one of the video (which is
                then stepped to first, for the objects known).
            mask: (H, W) integer ids of at least 0, 0 background, 255 void (taken as background).

        Raises:
            TypeError, ValueError: a bad argument, named, or an id that was removed; nothing has changed.
        """
        self._check_frame(frame)
        labels = check_labels(mask, frame.shape[:2])
        ids = [int(i) for i in np.unique(labels) if i]
        gone = sorted(self._removed.intersection(ids))
        if gone:
            raise ValueError(
                f"mask holds ids that were removed: {gone}. Ids are not used twice in one video: give what "
                "comes back a new id"
            )
        if self._present is None:
            frame = frame.copy()
            image, features = self._encode(frame)
            background = image.new_ones(1, 1, *image.shape[-2:], dtype=torch.float32)
            self._present = _Present(frame, image, features, background, [], False)
        elif not np.array_equal(frame, self._present.frame):
            self.step(frame)
        self._lay(torch.from_numpy(labels).to(self.device), ids)

    @torch.no_grad()
    def step(self, frame: Frame) -> Tensor:
        """Segments the next frame.

        Args:
            frame: (H, W, 3) uint8 RGB, of the first frame's size.

        Returns:
            (1 + O, H, W) float32 probabilities, background first, summing to 1; background alone when all
            objects were removed.

        Raises:
            RuntimeError: no mask was added yet.
            TypeError, ValueError: a bad frame; nothing has changed.
        """
        self._check_frame(frame)
        if self._present is None:
            raise RuntimeError("step needs objects to follow: call add(frame, mask) with the first frame")
        self._remember(self._present)
        # The caller's may change, and may lie in memory in ways that torch does not take (BGR reversed).
        frame = frame.copy()
        image, features = self._encode(frame)
        ids = self._session.object_ids
        if ids:
            with self._autocast():
                probabilities = self._session.segment(features).float()
        else:
            probabilities = image.new_ones(1, 1, *image.shape[-2:], dtype=torch.float32)
        self._index += 1
        self._present = _Present(frame, image, features, probabilities, ids, False)
        return self._restore(probabilities, frame)

    @torch.no_grad()
    def remove(self, object_ids: Iterable[int]) -> None:
        """Forgets objects: from the present frame on they are background. Their ids are not used again.

        Raises:
            TypeError, ValueError: an id is not followed, or named twice; nothing has changed.
        """
        try:
            ids = [operator.index(i) for i in object_ids]
        except TypeError:
            raise TypeError(f"object_ids must be integers, got {object_ids!r}") from None
        unknown = [i for i in ids if i not in self.object_ids]
        if unknown or len(set(ids)) < len(ids):
            raise ValueError(f"object_ids must be distinct ids of {self.object_ids}, got {ids}")
        if not ids or self._present is None:
            return
        present = self._present
        # Objects given on the present frame are not in the session yet.
        known = [i for i in ids if i in self._session.object_ids]
        if known:
            self._session.remove(known)
        kept = [i for i, object_id in enumerate(present.object_ids) if object_id not in ids]
        objects = present.probabilities[:, 1:][:, kept]
        present.object_ids = [present.object_ids[i] for i in kept]
        present.probabilities = torch.cat(((1 - objects.sum(1, keepdim=True)).clamp(min=0), objects), 1)
        self._removed.update(ids)

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on exactly: tensors and plain values (torch.load with weights_only).

        Features of the present frame are left out: `load_state_dict` computes them again.
        """
        present = self._present
        return {
            "model": type(self.model).__name__,
            "settings": repr(self.settings),
            "dtype": str(self.dtype),
            "memory": self._session.state_dict(),
            "removed": sorted(self._removed),
            "index": self._index,
            "present": None
            if present is None
            else {
                "frame": torch.from_numpy(present.frame.copy()),
                "probabilities": present.probabilities.clone(),
                "object_ids": list(present.object_ids),
                "given": present.given,
            },
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back the state of a tracker of the same model (weights included) and options.

        Every later step is then the same, bit for bit on the same machine and number of threads.

        Raises:
            ValueError: model, settings or dtype differ; nothing has changed.
            KeyError: `state` is not of `state_dict`; nothing has changed.
        """
        mine = {
            "model": type(self.model).__name__,
            "settings": repr(self.settings),
            "dtype": str(self.dtype),
        }
        for name, value in mine.items():
            if state[name] != value:
                raise ValueError(f"state was saved with {name} {state[name]}, this tracker has {value}")
        saved, removed, index = state["present"], set(state["removed"]), int(state["index"])
        session = self.model.open_session(self.settings)
        session.load_state_dict(state["memory"])
        present = None
        if saved is not None:
            frame = saved["frame"].numpy().copy()
            image, features = self._encode(frame, session)
            probabilities = saved["probabilities"].to(self.device, copy=True)
            present = _Present(
                frame, image, features, probabilities, list(saved["object_ids"]), saved["given"]
            )
        self._session, self._present, self._removed, self._index = session, present, removed, index

    def _lay(self, labels: Tensor, ids: list[int]) -> None:
        """Lays given labels (H, W) of `ids` over the present probabilities."""
        present = self._present
        assert present is not None
        given = torch.stack([labels == i for i in ids])[None].float()  # [1, O, H, W]
        given = self.model.prepare_mask(given)
        outside = 1 - given.amax(1, keepdim=True)
        background, *before = (present.probabilities * outside).unbind(1)
        objects = dict(zip(present.object_ids, before, strict=True))
        objects |= dict(zip(ids, given.unbind(1), strict=True))  # corrected ones keep their place
        present.object_ids = list(objects)
        together = torch.stack(list(objects.values()), 1)
        present.probabilities = self.model.combine(background[:, None], together)
        present.given = True

    def _remember(self, present: _Present) -> None:
        if not present.object_ids:
            return
        with self._autocast():
            self._session.remember(
                self._index,
                present.image,
                present.features,
                present.probabilities,
                present.object_ids,
                given=present.given,
            )

    def _encode(self, frame: Frame, session: Session[Any] | None = None) -> tuple[Tensor, Any]:
        pixels = torch.from_numpy(frame).to(self.device).permute(2, 0, 1)[None].float() / 255
        image = self.model.prepare(pixels).contiguous(memory_format=self._format)
        with self._autocast():
            return image, (session or self._session).encode(image)

    def _restore(self, probabilities: Tensor, frame: Frame) -> Tensor:
        """At the frame's size, and the caller's own: they may write to it.  # [1+O, H, W]"""
        size = (frame.shape[0], frame.shape[1])
        return self.model.restore(probabilities, size)[0].clone()

    def _autocast(self) -> AbstractContextManager[object]:
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def _check_frame(self, frame: object) -> None:
        if not isinstance(frame, np.ndarray):
            raise TypeError(f"frame must be an array (H, W, 3) uint8 RGB, got {type(frame).__name__}")
        if frame.dtype != np.uint8:
            raise TypeError(f"frame must have dtype uint8, got {frame.dtype}")
        if frame.ndim != 3 or frame.shape[2] != 3 or 0 in frame.shape:
            raise ValueError(f"frame must have shape (H, W, 3), RGB, got {list(frame.shape)}")
        if self._present is not None and frame.shape != self._present.frame.shape:
            raise ValueError(
                f"frame must keep the size of the frames before, {list(self._present.frame.shape[:2])}, "
                f"got {list(frame.shape[:2])}"
            )


def prefers_channels_last(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether convolutions run faster with channels innermost.

    On a CPU they do in every type (`formats` in benchmarks/results/frames.json). Elsewhere it was not
    measured, and torch's own layout stays.
    """
    return device.type == "cpu"


def check_labels(mask: object, size: tuple[int, ...]) -> NDArray[np.int64]:
    """A label map as int64 without void.

    Raises:
        TypeError, ValueError: it is none of the frame's size, or holds no object.
    """
    if not isinstance(mask, np.ndarray) or mask.dtype.kind not in "iu":
        got = str(mask.dtype) if isinstance(mask, np.ndarray) else type(mask).__name__
        raise TypeError(f"mask must be an array (H, W) of integer ids, got {got}")
    if mask.shape != tuple(size):
        raise ValueError(f"mask must have the frame's size {list(size)}, got {list(mask.shape)}")
    if mask.min() < 0:
        raise ValueError(f"mask must hold ids of at least 0, got {mask.min()}")
    labels = np.where(mask == VOID, 0, mask).astype(np.int64)
    if not labels.any():
        raise ValueError("mask must hold at least one object (an id other than 0 and 255), got none")
    return labels
