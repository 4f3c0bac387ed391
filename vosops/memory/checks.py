# SPDX-License-Identifier: Apache-2.0
"""Argument checks of the memory: each error names the argument, what was expected and what came."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vosops.ops.checks import check_device, check_shape, check_tensor
from vosops.ops.priors import CenterPrior, KernelPrior, MaskPrior, Prior

_KEY, _VALUE, _SHRINKAGE = "(B, Ck, H, W)", "(B, O, Cv, H, W)", "(B, 1, H, W)"
_MEMORY = "(B, T, H, W)"


class FrameShape(NamedTuple):
    """What the first frame of a memory settles for all others."""

    batch: int
    key_channels: int
    value_channels: int  # of one object
    height: int
    width: int
    shrinks: bool  # whether there is a shrinkage
    device: torch.device

    @property
    def grid(self) -> tuple[int, int]:
        return self.height, self.width


def check_frame(
    frame_index: int,
    key: Tensor,
    value: Tensor,
    object_ids: Sequence[int],
    shrinkage: Tensor | None,
    expected: FrameShape | None,
    newest: int | None,
) -> FrameShape:
    """Check a frame to append against the frames before; `expected` and `newest` are None for the first."""
    if isinstance(frame_index, bool) or not isinstance(frame_index, int):
        raise TypeError(f"frame_index must be an integer, got {type(frame_index).__name__}")
    if newest is not None and frame_index <= newest:
        raise ValueError(f"frame_index must be above the newest frame, {newest}, got {frame_index}")
    check_tensor("key", key, layout=_KEY)
    check_tensor("value", value, layout=_VALUE)
    if key.dim() != 4 or 0 in key.shape:
        raise ValueError(f"key must have shape {_KEY}, none of them 0, got {list(key.shape)}")
    if value.dim() != 5 or value.shape[2] == 0:
        raise ValueError(f"value must have shape {_VALUE}, Cv not 0, got {list(value.shape)}")
    shape = expected
    if shape is None:
        batch, channels, height, width = key.shape
        shape = FrameShape(batch, channels, value.shape[2], height, width, shrinkage is not None, key.device)
    else:
        key_shape = (shape.batch, shape.key_channels, *shape.grid)
        check_shape("key", key, key_shape, f"{_KEY} of the frames before")
        check_device("key", key, "the memory", shape.device)
    value_shape = (shape.batch, len(object_ids), shape.value_channels, *shape.grid)
    check_shape("value", value, value_shape, f"{_VALUE}, O = len(object_ids)")
    check_device("value", value, "key", shape.device)
    if (shrinkage is not None) != shape.shrinks:
        before = "one" if shape.shrinks else "none"
        raise ValueError(f"shrinkage: the frames before came with {before}, this one differs")
    if shrinkage is not None:
        check_tensor("shrinkage", shrinkage, layout=_SHRINKAGE)
        check_shape("shrinkage", shrinkage, (shape.batch, 1, *shape.grid), _SHRINKAGE)
        check_device("shrinkage", shrinkage, "key", shape.device)
    return shape


def check_ids(object_ids: Sequence[int]) -> list[int]:
    """Distinct integer ids of at least 1, one or more."""
    for object_id in object_ids:
        if isinstance(object_id, bool) or not isinstance(object_id, int):
            raise TypeError(f"object_ids must be integers, got {object_id!r}")
        if object_id < 1:
            raise ValueError(f"object_ids must be at least 1 (0 is the background), got {object_id}")
    if not object_ids:
        raise ValueError("object_ids must name at least one object, got none")
    if len(set(object_ids)) < len(object_ids):
        raise ValueError(f"object_ids must be distinct, got {list(object_ids)}")
    return list(object_ids)


def check_present(object_ids: Sequence[int], present: Sequence[int]) -> list[int]:
    """Of the ids that come with a frame those that enter with it; none that is present may be missing."""
    missing = [object_id for object_id in present if object_id not in object_ids]
    if missing:
        raise ValueError(f"object_ids lacks {missing}, which are present: give their values or remove()")
    return [object_id for object_id in object_ids if object_id not in present]


def check_leaving(object_ids: Iterable[int], present: Sequence[int]) -> list[int]:
    """The ids to forget, each of which must be present."""
    ids = check_ids(list(object_ids))
    unknown = sorted(set(ids) - set(present))
    if unknown:
        raise ValueError(f"object_ids: {unknown} are not in the memory, which holds {list(present)}")
    return ids


def check_read(
    shape: FrameShape, frames: Sequence[int], prior: Prior | None, memory_mask: Tensor | None
) -> None:
    """Check what comes per memory position; the rest is checked by `memory_read`."""
    memory_shape = (len(frames), *shape.grid)
    if memory_mask is not None:
        check_tensor("memory_mask", memory_mask, layout=_MEMORY, dtypes=(torch.bool,))
        check_shape("memory_mask", memory_mask, (shape.batch, *memory_shape), _MEMORY)
    if isinstance(prior, CenterPrior):
        _check_rows("prior.centers", prior.centers, (*memory_shape, 2), "(B, T, H, W, 2)")
        if isinstance(prior.sigma, Tensor):
            _check_rows("prior.sigma", prior.sigma, memory_shape, _MEMORY)
    if isinstance(prior, MaskPrior):
        _check_rows("prior.memory_object_mask", prior.memory_object_mask, memory_shape, _MEMORY)
    if isinstance(prior, KernelPrior) and prior.sigma_growth and list(frames) != sorted(frames):
        raise ValueError(
            "prior.sigma_growth needs slots in time order, but the policy has replaced frames in place: "
            f"frames are {list(frames)}; use EveryNth, or CenterPrior with a sigma per slot"
        )


def slice_prior(prior: Prior | None, slots: slice) -> Prior | None:
    """The prior on some slots only."""
    if isinstance(prior, CenterPrior):
        sigma = prior.sigma[:, slots] if isinstance(prior.sigma, Tensor) else prior.sigma
        return CenterPrior(prior.centers[:, slots], sigma)
    if isinstance(prior, MaskPrior):
        mask = prior.memory_object_mask[:, slots]
        return MaskPrior(prior.previous_mask, mask, prior.sigma, prior.strength, prior.spread)
    return prior


def _check_rows(name: str, tensor: Tensor, shape: tuple[int, ...], layout: str) -> None:
    """`tensor` has `shape` behind a batch; `memory_read` checks batch, dtype and device."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor {layout}, got {type(tensor).__name__}")
    if tuple(tensor.shape[1:]) != shape:
        expected = ["B", *shape]
        raise ValueError(f"{name} must have shape {layout} = {expected}, got {list(tensor.shape)}")
