# SPDX-License-Identifier: Apache-2.0
"""Video object segmentation without training: labels follow the features that a memory read matches."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as functional
from numpy.typing import NDArray
from torch import Tensor

from vosops.memory import Balanced, Bounded, ByteBudget, EveryNth, MemoryBank, MemoryGroup
from vosops.memory.policies import Policy
from vosops.ops.memory_read import memory_read
from vosops.ops.priors import CenterPrior

from .features import KeyProjection, make_features
from .probabilities import with_background
from .tracker import check_labels

Frame = NDArray[np.uint8]

_SMALLEST = 16  # pixels a side
_REACH = 3.0  # standard deviations of the prior beyond which a memory position is left out
_BLOCK = 24  # cells a side of the queries read together
_FAINT = 1e-4  # object probability that is not worth a read


@dataclass(frozen=True)
class PropagationSettings:
    """Options of `LabelPropagator`; the defaults were chosen on the training split of DAVIS-2016.

    Args:
        features: "builtin", "torchvision:MODEL", "timm:MODEL" or two joined by "+" (see `make_features`).
        feature_weights: the backbone's weight file; without one its library downloads its own.
        stride: pixels per side of a cell.
        subcells: labels per side of a cell: a cell's value is its subcells x subcells patch of the mask.
        channels: of a key, after the projection.
        whitening: 0 keeps the variances of the features' principal components, 1 makes them equal.
        top_k: memory cells kept per query.
        scale: factor on the cosine of two keys; the inverse of a temperature.
        sigma: standard deviation of the spatial prior around a memory cell's own position, in cells.
        memory_frames: frames remembered besides the first, at least 1.
        memory_every: distance of those in frames; the previous frame is always among them.
        memory_bytes: most bytes of keys and values, None for what `memory_frames` takes.
        memory_dtype: storage dtype of keys and values: float32, bfloat16 or float16.
        memory_balanced: `memory_frames` are spread over the video (`vosops.memory.Balanced`), instead of the
            newest ones; memory_every does not count.

    Raises:
        TypeError, ValueError: an option out of its range, named.
    """

    features: str = "builtin"
    feature_weights: str | Path | None = None
    stride: int = 5
    subcells: int = 2
    channels: int = 48
    whitening: float = 0.5
    top_k: int = 10
    scale: float = 50.0
    sigma: float = 7.0
    memory_frames: int = 6
    memory_every: int = 1
    memory_bytes: int | None = None
    memory_dtype: torch.dtype = torch.float32
    memory_balanced: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.features, str):
            raise TypeError(f"features must be a name, got {type(self.features).__name__}")
        for name in (
            "stride",
            "subcells",
            "channels",
            "top_k",
            "memory_frames",
            "memory_every",
            "memory_bytes",
        ):
            value = getattr(self, name)
            if value is None and name == "memory_bytes":
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        for name, low in (("scale", 0.0), ("sigma", 0.0), ("whitening", None)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"{name} must be a number, got {type(value).__name__}")
            if not math.isfinite(value) or (low is not None and value <= low):
                raise ValueError(f"{name} must be finite and above 0, got {value}")
        if not 0 <= self.whitening <= 1:
            raise ValueError(f"whitening must lie in [0, 1], got {self.whitening}")
        if not isinstance(self.memory_balanced, bool):
            raise TypeError(f"memory_balanced must be a bool, got {type(self.memory_balanced).__name__}")
        if self.memory_dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"memory_dtype must be float32, bfloat16 or float16, got {self.memory_dtype}")

    def policy(self) -> Policy:
        """What the memory keeps."""
        frames = 1 + self.memory_frames
        policy: Policy = (
            Balanced(frames) if self.memory_balanced else Bounded(frames, EveryNth(self.memory_every))
        )
        return policy if self.memory_bytes is None else ByteBudget(self.memory_bytes, policy)


@dataclass
class _Present:
    """The last frame seen; it enters the memory with the next one, so that `add` can still change it."""

    frame: Frame
    key: Tensor  # [1, Ck, h, w]
    labels: dict[int, Tensor]  # object id to its soft mask [H, W]


class LabelPropagator:
    """Segments a video from the mask of its first frame, with `vosops.memory_read` and no training.

    Keys are descriptors of cells of `stride` pixels, values the patches of the soft mask in them. A query
    keeps its top_k memory cells by cosine * scale - |x_i - x_j|^2 / (2 sigma^2) and reads the
    softmax-weighted mean of their patches; the result is brought to the frame's size. The memory holds the
    first frame and the most recent ones; frames on which objects are added later are kept as long as it
    has room.

    Args:
        settings: PropagationSettings() by default.

    Raises:
        ValueError, FileNotFoundError, ImportError, RuntimeError: no such features (`make_features`).

    Note:
        Runs on the CPU. Queries are read in blocks, each against the memory within 3 sigma of it (beyond,
        the prior leaves less than 0.012 of the weight), and blocks out of reach of every object are
        background unread. Memory: (1 + memory_frames) * cells * (channels + objects * subcells^2) numbers,
        whatever the video's length.

    Source: matching by features with labels as values, top-k and a restricted neighbourhood is the label
    propagation of Wang et al., CVPR 2019 (sec. 4) and Jabri et al., NeurIPS 2020 (app. A); the Gaussian in
    place of a hard window is the spatial prior of KMN (Seong et al., ECCV 2020).

    Example:
        >>> propagator = LabelPropagator()
        >>> propagator.add(frames[0], mask)  # (480, 854, 3) uint8, (480, 854) integer ids
        >>> labels = [propagator.step(frame).argmax(0) for frame in frames[1:]]
    """

    def __init__(self, settings: PropagationSettings | None = None) -> None:
        self.settings = PropagationSettings() if settings is None else settings
        self._features = make_features(self.settings.features, self.settings.feature_weights)
        self._projection = KeyProjection(self.settings.channels, self.settings.whitening)
        self._bank = self._new_bank()
        self._object_ids: list[int] = []
        self._index = 0  # of the present frame
        self._present: _Present | None = None

    @property
    def object_ids(self) -> list[int]:
        """Ids of the objects, in the order of channels 1..O of `step`: ascending per `add`, in its order."""
        return list(self._object_ids)

    @property
    def memory_nbytes(self) -> int:
        """Bytes of keys and values allocated in the memory."""
        return self._bank.nbytes

    @torch.no_grad()
    def add(self, frame: Frame, mask: NDArray[Any]) -> None:
        """Takes the given mask of a frame: of the first one, of new objects, or to correct objects.

        Objects in `mask` are as it says from here on; an object that was known before restarts from this
        frame, without its memory. Objects that are not in `mask` go on; where `mask` has other objects they
        give way.

        Args:
            frame: (H, W, 3) uint8 RGB: the frame of the last `step`, or the next one of the video (which is
                then stepped to first, for the objects known).
            mask: (H, W) integer ids, 0 background, 255 void (taken as background).

        Raises:
            TypeError, ValueError: a bad argument, named, or memory_bytes too small for two frames; nothing
                has changed.
        """
        self._check_frame(frame)
        labels = check_labels(mask, frame.shape[:2])
        ids = [int(i) for i in np.unique(labels) if i]
        self._check_budget(frame, len({*ids, *self._object_ids}))
        if self._present is None:
            maps = self._features(frame, self._grid(frame))
            self._projection.fit(maps)
            self._present = _Present(frame.copy(), self._projection(maps), {})
        elif not np.array_equal(frame, self._present.frame):
            self.step(frame)
        present = self._present
        given = torch.from_numpy(labels)
        known = [i for i in ids if i in self._bank.object_ids]
        if known:
            self._bank.remove(known)
        for object_id in self._object_ids:
            present.labels[object_id] = present.labels[object_id].masked_fill(given != 0, 0)
        for object_id in ids:
            present.labels[object_id] = (given == object_id).float()
        self._object_ids += [i for i in ids if i not in self._object_ids]

    @torch.no_grad()
    def step(self, frame: Frame) -> Tensor:
        """Segments the next frame.

        Args:
            frame: (H, W, 3) uint8 RGB, of the first frame's size.

        Returns:
            (1 + O, H, W) float32 probabilities, background first, summing to 1.

        Raises:
            RuntimeError: no mask was added yet.
            TypeError, ValueError: a bad frame.
        """
        self._check_frame(frame)
        if self._present is None:
            raise RuntimeError("step needs objects to follow: call add(frame, mask) with the first frame")
        key = self._projection(self._features(frame, self._grid(frame)))
        self._remember(self._present)
        fine = self._read(key)  # [O, h * side, w * side]
        size = (frame.shape[0], frame.shape[1])
        objects = functional.interpolate(fine[None], size, mode="bilinear", align_corners=False)[0]
        probabilities = with_background(objects.clamp(0, 1))
        kept = probabilities[1:].clone()  # the caller may write to the result
        labels = dict(zip(self._object_ids, kept.unbind(0), strict=True))
        self._index += 1
        self._present = _Present(frame.copy(), key, labels)
        return probabilities

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on exactly: tensors and plain values (torch.load with weights_only)."""
        present = self._present
        return {
            "settings": self._described(),
            "projection": self._projection.state_dict(),
            "memory": self._bank.state_dict(),
            "object_ids": list(self._object_ids),
            "index": self._index,
            "present": None
            if present is None
            else {
                "frame": torch.from_numpy(present.frame.copy()),
                "key": present.key.clone(),
                "labels": {object_id: mask.clone() for object_id, mask in present.labels.items()},
            },
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back the state of a propagator with the same settings; every later step is then the same.

        Raises:
            ValueError: the settings differ; nothing has changed.
            KeyError: `state` is not of `state_dict`; nothing has changed.
        """
        described, saved = self._described(), state["settings"]
        for name, value in described.items():
            if saved[name] != value:
                raise ValueError(
                    f"state was saved with {name}={saved[name]!r}, this propagator has {value!r}"
                )
        bank, projection, present = self._new_bank(), state["projection"], state["present"]
        bank.load_state_dict(state["memory"])
        object_ids, index = list(state["object_ids"]), int(state["index"])
        if present is not None:
            labels = {int(i): mask.clone() for i, mask in present["labels"].items()}
            present = _Present(present["frame"].numpy().copy(), present["key"].clone(), labels)
        self._projection.load_state_dict(projection)
        self._bank, self._object_ids, self._index, self._present = bank, object_ids, index, present

    def _new_bank(self) -> MemoryBank:
        dtype = self.settings.memory_dtype
        return MemoryBank(self.settings.policy(), key_dtype=dtype, value_dtype=dtype)

    def _described(self) -> dict[str, Any]:
        """The settings as plain values; a weight file counts by its name, so that it may move."""
        described = asdict(self.settings)
        weights = self.settings.feature_weights
        described["feature_weights"] = None if weights is None else Path(weights).name
        described["memory_dtype"] = str(self.settings.memory_dtype)
        return described

    def _grid(self, frame: Frame) -> tuple[int, int]:
        """Cells of a frame; they cover it without a remainder, so a cell may be a little off `stride`."""
        height, width = (max(2, round(side / self.settings.stride)) for side in frame.shape[:2])
        return height, width

    def _check_frame(self, frame: object) -> None:
        if not isinstance(frame, np.ndarray):
            raise TypeError(f"frame must be an array (H, W, 3) uint8 RGB, got {type(frame).__name__}")
        if frame.dtype != np.uint8:
            raise TypeError(f"frame must have dtype uint8, got {frame.dtype}")
        if frame.ndim != 3 or frame.shape[2] != 3:
            raise ValueError(f"frame must have shape (H, W, 3), RGB, got {list(frame.shape)}")
        if min(frame.shape[:2]) < _SMALLEST:
            raise ValueError(
                f"frame must have at least {_SMALLEST} pixels a side, got {list(frame.shape[:2])}"
            )
        if self._present is not None and frame.shape != self._present.frame.shape:
            raise ValueError(
                f"frame must have the first frame's shape {list(self._present.frame.shape)}, "
                f"got {list(frame.shape)}"
            )

    def _check_budget(self, frame: Frame, objects: int) -> None:
        """Tells at the start what the memory would refuse with the second frame."""
        options = self.settings
        if options.memory_bytes is None:
            return
        numbers = options.channels + objects * options.subcells**2
        height, width = self._grid(frame)
        needed = 2 * height * width * numbers * options.memory_dtype.itemsize
        if options.memory_bytes < needed:
            raise ValueError(
                f"memory_bytes must be at least {needed}, two frames of this size with {objects} objects, "
                f"got {options.memory_bytes}"
            )

    def _remember(self, present: _Present) -> None:
        """Puts the frame seen last into the memory."""
        grid = (present.key.shape[2], present.key.shape[3])
        masks = torch.stack([present.labels[object_id] for object_id in self._object_ids])  # [O, H, W]
        side = self.settings.subcells
        fine = functional.adaptive_avg_pool2d(masks, (grid[0] * side, grid[1] * side))
        values = functional.pixel_unshuffle(fine[:, None], side)  # [O, side^2, h, w]
        self._bank.append(self._index, present.key, values[None], self._object_ids)

    def _read(self, key: Tensor) -> Tensor:
        """Soft labels of a frame, on the cells' subcells.  # [O, h * side, w * side]"""
        reads = {
            object_id: cells
            for group in self._bank.groups
            for object_id, cells in zip(group.object_ids, self._read_group(key, group), strict=True)
        }
        cells = torch.stack([reads[object_id] for object_id in self._object_ids])
        return functional.pixel_shuffle(cells, self.settings.subcells)[:, 0]

    def _read_group(self, key: Tensor, group: MemoryGroup) -> Tensor:
        height, width = key.shape[2:]
        reach = math.ceil(_REACH * self.settings.sigma)
        read = key.new_zeros(*group.value.shape[1:3], height, width)  # [O, side^2, h, w]
        for top in range(0, height, _BLOCK):
            for left in range(0, width, _BLOCK):
                rows = slice(max(0, top - reach), min(height, top + _BLOCK + reach))
                columns = slice(max(0, left - reach), min(width, left + _BLOCK + reach))
                value = group.value[..., rows, columns]
                if value.amax() < _FAINT:
                    continue
                block = key[..., top : top + _BLOCK, left : left + _BLOCK]
                centers = _positions(rows, columns, top, left).expand(value.shape[3], -1, -1, -1)
                mask = None if group.memory_mask is None else group.memory_mask[..., rows, columns]
                found = memory_read(
                    block,
                    group.key[..., rows, columns],
                    value,
                    scale=self.settings.scale,
                    top_k=self.settings.top_k,
                    prior=CenterPrior(centers[None], self.settings.sigma),
                    memory_mask=mask,
                )
                assert isinstance(found, Tensor)
                read[..., top : top + _BLOCK, left : left + _BLOCK] = found[0]
        return read


def _positions(rows: slice, columns: slice, top: int, left: int) -> Tensor:
    """Cells of a window, relative to a block's first cell.  # [rows, columns, 2]"""
    grid = (
        torch.arange(rows.start - top, rows.stop - top, dtype=torch.float32),
        torch.arange(columns.start - left, columns.stop - left, dtype=torch.float32),
    )
    return torch.stack(torch.meshgrid(*grid, indexing="ij"), -1)
