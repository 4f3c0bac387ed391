# SPDX-License-Identifier: Apache-2.0
"""A memory tensor that `torch.cat([memory, new], -1)` extends in place instead of copying it all."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .lazy import LazyTensor

_ROOM = 1.5  # of the positions held; a growing memory is then copied at most three times over in all


class _Storage:
    """Rows (..., capacity, C), the first `used` of which are positions of a memory."""

    def __init__(self, rows: Tensor, used: int) -> None:
        self.rows, self.used = rows, used


class Growing(Tensor):
    """A memory (..., C, N) that published code extends with `torch.cat([memory, new], -1)`.

    The result is stored position-major, the layout that a read likes, with room for more; a later cat writes
    the new positions there. The memory that was extended stays valid, as the rows it has never change; to
    extend it once more copies it. Everything else is done as on an ordinary tensor and gives ordinary ones;
    a copy or a pickled one is ordinary, too.

    Make one with `growing(tensor)`, which copies nothing.

    Note:
        Storage that is not used is at most half of that in use. Where a gradient is recorded, and for any
        other cat, torch.cat is what runs.
    """

    _storage: _Storage | None

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return memo.setdefault(id(self), plain(self).clone())

    def __reduce_ex__(self, protocol: Any) -> Any:
        return plain(self).__reduce_ex__(protocol)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(issubclass(kind, LazyTensor) for kind in types):
            return NotImplemented  # it serves the call, or becomes an ordinary tensor first
        if func is torch.cat:
            result = _extended(*args, **(kwargs or {}))
            if result is not None:
                return result
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


def growing(tensor: Tensor) -> Growing:
    """The same tensor (..., C, N), to be extended by torch.cat; nothing is copied before that."""
    if isinstance(tensor, Growing):
        return tensor
    return _made(tensor, None)


def plain(tensor: Tensor) -> Tensor:
    """The same tensor as an ordinary one."""
    return tensor.as_subclass(Tensor) if isinstance(tensor, Growing) else tensor


def _made(tensor: Tensor, storage: _Storage | None) -> Growing:
    result = tensor.as_subclass(Growing)
    result._storage = storage
    return result


def _extended(tensors: Any, dim: int = 0, **others: Any) -> Growing | None:
    """The cat of a Growing and what follows it, along the last dimension; None where that is no growth."""
    memory, *new = tensors
    if not isinstance(memory, Growing) or not new or others or dim not in (-1, memory.dim() - 1):
        return None
    shape, kind = memory.shape[:-1], (memory.dtype, memory.device)
    if any(x.shape[:-1] != shape or (x.dtype, x.device) != kind for x in new) or memory.dim() < 2:
        return None
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return None
    held = memory.shape[-1]
    total = held + sum(x.shape[-1] for x in new)
    storage = getattr(memory, "_storage", None)
    # Storage made in inference mode could never be written outside of it.
    with torch.inference_mode(False), torch.no_grad():
        if storage is None or storage.used != held or total > storage.rows.shape[-2]:
            room = max(total, int(held * _ROOM))
            rows = torch.empty((*shape[:-1], room, shape[-1]), dtype=memory.dtype, device=memory.device)
            rows[..., :held, :] = plain(memory).mT
            storage = _Storage(rows, held)
        for x in new:
            end = storage.used + x.shape[-1]
            storage.rows[..., storage.used : end, :] = plain(x).mT
            storage.used = end
        return _made(storage.rows[..., :total, :].mT, storage)
