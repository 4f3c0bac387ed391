# SPDX-License-Identifier: Apache-2.0
"""What a segmentation model gives to `vosops.propagate.Tracker`: itself, and one session per video."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, Self, TypeVar

import torch.nn.functional as F
from torch import Tensor, nn

from vosops.memory.policies import Policy
from vosops.ops.aggregate import soft_aggregate

from .blocks import freeze_batch_norm

FeaturesT = TypeVar("FeaturesT")


@dataclass(frozen=True)
class SessionSettings:
    """How a session remembers and matches; None takes what the model's paper or published code uses.

    Args:
        memory_every: a frame is remembered for good if its index is at least this many frames after the
            last one that was.
        include_previous: the previous frame is remembered until the next one, whatever memory_every says.
        policy: what the memory keeps of the frames remembered (see `vosops.memory`); None is the model's own.
        top_k: memory positions kept per query; 0 reads densely.

    Raises:
        TypeError, ValueError: an option of another type, or out of its range, named.
    """

    memory_every: int | None = None
    include_previous: bool | None = None
    policy: Policy | None = None
    top_k: int | None = None

    def __post_init__(self) -> None:
        for name, low in (("memory_every", 1), ("top_k", 0)):
            value = getattr(self, name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an integer or None, got {type(value).__name__}")
            if value < low:
                raise ValueError(f"{name} must be at least {low}, got {value}")
        if self.include_previous not in (None, True, False):
            raise TypeError(f"include_previous must be a bool or None, got {self.include_previous!r}")
        if self.policy is not None and (isinstance(self.policy, type) or not isinstance(self.policy, Policy)):
            raise TypeError(f"policy must be a policy such as Bounded(20), or None, got {self.policy!r}")


class Session(ABC, Generic[FeaturesT]):
    """A model's memory of one video. Images and masks are in the padded coordinates of `VideoModel.prepare`.

    The caller's loop is encode, segment, remember: frame by frame, one video at a time (batch 1).
    """

    @property
    @abstractmethod
    def object_ids(self) -> list[int]:
        """Ids of the objects that `segment` returns, in the order of its channels 1..O."""

    @abstractmethod
    def encode(self, image: Tensor) -> FeaturesT:
        """Features of an image from `VideoModel.prepare` (1, 3 or more, H, W), whatever the objects."""

    @abstractmethod
    def segment(self, features: FeaturesT) -> Tensor:
        """Probabilities (1, 1+O, H, W) of the frame, background first, summing to 1; reads the memory."""

    @abstractmethod
    def remember(
        self,
        index: int,
        image: Tensor,  # [1, 3 or more, H, W], of prepare
        features: FeaturesT,
        probabilities: Tensor,  # [1, 1+O, H, W]
        object_ids: Sequence[int],
        *,
        given: bool,
    ) -> None:
        """Takes a frame that has been segmented: remembers it, or not, as its settings say.

        Args:
            index: of the frame in the video, above that of the frame before.
            image, features: of the frame.
            probabilities: of `segment`, or with a given mask laid over them.
            object_ids: O ids; those not seen before enter with this frame.
            given: a mask was given on this frame, of objects that enter or as a correction of known ones: it
                is always remembered, beside all that was before.
        """

    @abstractmethod
    def remove(self, object_ids: Sequence[int]) -> None:
        """Forgets objects."""

    @property
    @abstractmethod
    def memory_nbytes(self) -> int:
        """Bytes of memory allocated."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on exactly: tensors and plain values."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes a state back."""


def check_saved(state: dict[str, Any], mine: dict[str, Any]) -> None:
    """Checks that a state to take back was saved with a session's own settings.

    Raises:
        ValueError: one differs, named.
        KeyError: `state` is not of `state_dict`.
    """
    for name, value in mine.items():
        if state[name] != value:
            raise ValueError(f"state was saved with {name} {state[name]}, this session has {value}")


class VideoModel(nn.Module, ABC):
    """A video object segmentation model that a `Tracker` can run.

    Parameter names are those of the published checkpoints. Constructors download nothing.
    """

    stride: int = 16
    """Sides of prepared images are multiples of this."""

    @abstractmethod
    def forward(self, frames: Tensor, first_mask: Tensor) -> Tensor:
        """Segments a clip as in training: no top-k, every frame remembered, gradients to all weights.

        Args:
            frames: (B, T, 3, H, W) float in [0, 1], RGB; H and W multiples of `stride`.
            first_mask: (B, O, H, W) float masks of the objects on the first frame.

        Returns:
            Logits (B, T-1, 1+O, H, W) of frames 1..T-1; their softmax are the probabilities.

        Raises:
            TypeError, ValueError: an argument of another shape or dtype, named (`check_clip`).
        """

    def train(self, mode: bool = True) -> Self:
        """Training or evaluation mode; batch normalisation stays fixed in both."""
        super().train(mode)
        freeze_batch_norm(self)
        return self

    @abstractmethod
    def open_session(self, settings: SessionSettings) -> Session[Any]:
        """A new, empty memory for one video."""

    def prepare(self, frame: Tensor) -> Tensor:
        """A frame (1, 3, h, w) float in [0, 1], RGB, as the model takes it: (1, 3, H, W).

        By default zero-padded, centred, to multiples of `stride` (the smaller half above and left). A model
        may add channels of its own behind the colours, which only its session reads (STM returns a fourth
        one that tells frame from padding).
        """
        return F.pad(frame, self.padding(frame.shape[-2], frame.shape[-1]))

    def prepare_mask(self, mask: Tensor) -> Tensor:
        """Masks (1, N, h, w) of a frame, brought to the prepared size as `prepare` brings the frame."""
        return F.pad(mask, self.padding(mask.shape[-2], mask.shape[-1]))

    def restore(self, probabilities: Tensor, size: tuple[int, int]) -> Tensor:
        """Probabilities (1, N, H, W) at the frame's size (h, w) again."""
        left, _, top, _ = self.padding(*size)
        return probabilities[..., top : top + size[0], left : left + size[1]]

    def combine(self, background: Tensor, objects: Tensor) -> Tensor:
        """Probabilities (1, 1+O, H, W), background first, of a frame on which masks were given.

        By default the objects are aggregated again, and the predicted background does not count.

        Args:
            background: (1, 1, H, W) as predicted, 0 inside of the given masks.
            objects: (1, O, H, W) likewise, and as their masks where these were given.
        """
        return soft_aggregate(objects).softmax(1)

    def padding(self, height: int, width: int) -> tuple[int, int, int, int]:
        """(left, right, top, bottom) to the next multiples of `stride`, as `F.pad` takes them."""
        across, down = -width % self.stride, -height % self.stride
        return across // 2, across - across // 2, down // 2, down - down // 2


def check_clip(frames: Tensor, first_mask: Tensor, multiple: int = 1) -> None:
    """Checks the arguments of a model's `forward`.

    Args:
        frames, first_mask: as in `VideoModel.forward`.
        multiple: of which height and width must be, for models that do not pad.

    Raises:
        TypeError, ValueError: names the argument at fault.
    """
    for name, tensor, layout, rank in (
        ("frames", frames, "(B, T, 3, H, W)", 5),
        ("first_mask", first_mask, "(B, O, H, W)", 4),
    ):
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{name} must be a floating-point tensor {layout}, got {got}")
        if tensor.dim() != rank:
            raise ValueError(f"{name} must have shape {layout}, got {list(tensor.shape)}")
    batch, time, channels, height, width = frames.shape
    if time < 2 or channels != 3:
        raise ValueError(f"frames must have shape (B, T, 3, H, W) with T >= 2, got {list(frames.shape)}")
    if height % multiple or width % multiple:
        raise ValueError(f"frames must have sides that are multiples of {multiple}, got {[height, width]}")
    if first_mask.shape[1] == 0 or (first_mask.shape[0], *first_mask.shape[2:]) != (batch, height, width):
        raise ValueError(
            f"first_mask must have shape (B, O, H, W) = {[batch, 'O >= 1', height, width]}, "
            f"got {list(first_mask.shape)}"
        )
