# SPDX-License-Identifier: Apache-2.0
"""Cutie's published code: its four memory functions, its memory manager's readout and its value banks.

The functions are XMem's with one more argument; see `xmem`. The manager's read of a bucket of objects takes
the values of every object, long-term and working, where they lie.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import xmem
from .affinity import Affinity
from .growing import growing, plain
from .lazy import LazyTensor
from .patching import CodeBase, Target
from .report import Report
from .xmem import do_softmax, get_affinity, readout

__all__ = ["CODE_BASE", "disable", "do_softmax", "enable", "get_affinity", "get_similarity", "readout"]


def get_similarity(
    mk: Tensor, ms: Tensor | None, qk: Tensor, qe: Tensor | None, add_batch_dim: bool = False
) -> Tensor:
    """Cutie's similarity of memory positions and queries: XMem's.

    Args:
        mk: (B, Ck, *N) memory keys.
        ms: (B, 1, *N) shrinkage, or None.
        qk: (B, Ck, *P) query keys.
        qe: (B, Ck, *P) selection, or None.
        add_batch_dim: all of them come without B, which is then 1.

    Returns:
        (B, N, P), computed only if something other than these functions asks for its numbers.

    Raises:
        TypeError, ValueError: the shapes or dtypes do not go together.
    """
    if add_batch_dim:
        mk, qk = mk[None], qk[None]
        ms, qe = None if ms is None else ms[None], None if qe is None else qe[None]
    return xmem.get_similarity(mk, ms, qk, qe)


class BucketValues(LazyTensor):
    """The values (B, O, Cv, N) of the objects of a bucket, which are read without stacking them.

    Args:
        objects: per object its banks (B, Cv, N_i), long-term first; the same N_i for all.
    """

    objects: list[tuple[Tensor, ...]]
    fused = {}  # noqa: RUF012

    @staticmethod
    def __new__(cls, objects: list[tuple[Tensor, ...]]) -> Any:
        first = objects[0]
        shape = (first[0].shape[0], len(objects), first[0].shape[1], sum(part.shape[2] for part in first))
        sources = [part for parts in objects for part in parts]
        self = super().__new__(cls, shape, first[0].dtype, first[0].device, sources)
        self.objects = objects
        return self

    def compute(self) -> Tensor:
        return torch.stack([torch.cat(parts, -1) for parts in self.objects], 1)


def _values(self: Any, obj_ids: list[int]) -> Tensor:
    """MemoryManager._get_visual_values_by_ids: (B, O, Cv, N), not stacked."""
    banks = [self.work_mem.value]
    if self.use_long_term and obj_ids[0] in self.long_mem.value:
        banks.insert(0, self.long_mem.value)
    return BucketValues([tuple(plain(bank[number]) for bank in banks) for number in obj_ids])


def _readout(self: Any, affinity: Tensor, v: Tensor) -> Tensor:
    """MemoryManager._readout: affinity (B, N, P), v (B, [O,] Cv, N) -> (B, [O,] Cv, P)."""
    if not isinstance(affinity, Affinity):
        v = v.materialize() if isinstance(v, LazyTensor) else v
        return v @ (affinity[:, None] if v.dim() == 4 else affinity)
    if isinstance(v, BucketValues) and v.lazy and affinity.match is not None:
        return torch.cat([affinity.read(*(part[:, None] for part in parts)) for parts in v.objects], 1)
    value = v.materialize() if isinstance(v, LazyTensor) else v
    return affinity.read(value) if value.dim() == 4 else affinity.read(value[:, None])[:, 0]


def _add(published: Callable[..., None]) -> Callable[..., None]:
    """KeyValueMemoryStore.add on values that grow in place."""

    @functools.wraps(published)
    def add(self: Any, *arguments: Any, **keywords: Any) -> None:
        self.v = {number: growing(value) for number, value in self.v.items()}
        published(self, *arguments, **keywords)

    return add


_FUNCTIONS = "cutie.model.utils.memory_utils"
_MANAGER = "cutie.inference.memory_manager"
CODE_BASE = CodeBase(
    name="Cutie",
    source="github.com/hkchengrex/Cutie",
    imports="cutie.inference.inference_core (and cutie.model.cutie)",
    targets=(
        Target(_FUNCTIONS, "get_similarity", get_similarity, ("06cab5bc31f6",)),
        Target(_FUNCTIONS, "do_softmax", do_softmax, ("b0c8286b62a8",)),
        Target(_FUNCTIONS, "get_affinity", get_affinity, ("1c46541cb64a",)),
        Target(_FUNCTIONS, "readout", readout, ("0b7d43edac68",)),
        Target(_MANAGER, "MemoryManager._readout", _readout, ("2fd30a84519e",)),
        Target(_MANAGER, "MemoryManager._get_visual_values_by_ids", _values, ("8398c65ea677",)),
        Target(
            "cutie.inference.kv_memory_store", "KeyValueMemoryStore.add", _add, ("a4cc1a2b53b4",), wraps=True
        ),
    ),
    kept=(
        ("MemoryManager.read", "runs fused through what it calls"),
        ("MemoryManager.consolidation", "runs fused through what it calls"),
    ),
)


def enable() -> Report:
    """Replace Cutie's memory read wherever its code is imported; see `CodeBase.enable`."""
    return CODE_BASE.enable()


def disable() -> None:
    """Put Cutie's published code back; see `CodeBase.disable`."""
    CODE_BASE.disable()
