# SPDX-License-Identifier: Apache-2.0
"""Small classes with the signatures of published code, by the formulas of the papers, dense.

`installed` puts them where the published modules would be, in a package of their own, and gives the code base
their digests.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from vosops.compat.patching import CodeBase, source_digest


def get_similarity(mk, ms, qk, qe, add_batch_dim=False):  # type: ignore[no-untyped-def]
    if add_batch_dim:
        mk, ms, qk, qe = mk[None], ms[None], qk[None], qe[None]
    mk, qk = mk.flatten(2), qk.flatten(2)
    if qe is None:
        score = 2 * mk.mT @ qk - mk.square().sum(1)[:, :, None]
    else:
        offset = mk[:, :, :, None] - qk[:, :, None]
        score = -(qe.flatten(2)[:, :, None] * offset.square()).sum(1)
    return score * (1 if ms is None else ms.flatten(1)[:, :, None]) / mk.shape[1] ** 0.5


def do_softmax(similarity, top_k=None, inplace=False, return_usage=False):  # type: ignore[no-untyped-def]
    if top_k is None:
        affinity = similarity.softmax(1)
    else:
        best, indices = similarity.topk(top_k, dim=1)
        affinity = torch.zeros_like(similarity).scatter(1, indices, best.softmax(1))
    return (affinity, affinity.sum(2)) if return_usage else affinity


def get_affinity(mk, ms, qk, qe):  # type: ignore[no-untyped-def]
    return do_softmax(get_similarity(mk, ms, qk, qe))


def readout(affinity, mv):  # type: ignore[no-untyped-def]
    return (mv.flatten(2) @ affinity).view(*mv.shape[:2], *mv.shape[3:])


class KeyValueMemoryStore:
    """XMem's: keys of all groups in one tensor, values per group, usage per position."""

    def __init__(self, count_usage: bool = True) -> None:
        self.key: Any = None
        self.shrinkage: Any = None
        self.v: list[Tensor] = []
        self.use = torch.zeros(0)

    def add(self, key, values, shrinkage):  # type: ignore[no-untyped-def]
        first = self.key is None
        self.key = key if first else torch.cat([self.key, key], -1)
        self.shrinkage = shrinkage if first else torch.cat([self.shrinkage, shrinkage], -1)
        for group, value in enumerate(values):
            if group < len(self.v):
                self.v[group] = torch.cat([self.v[group], value], -1)
            else:
                self.v.append(value)
        self.use = torch.cat([self.use, torch.zeros(key.shape[-1])])

    def update_usage(self, usage: Tensor) -> None:
        self.use += usage

    def get_v_size(self, group: int) -> int:
        return self.v[group].shape[2]

    def engaged(self) -> bool:
        return self.key is not None

    @property
    def value(self) -> list[Tensor]:
        return self.v

    @property
    def num_groups(self) -> int:
        return len(self.v)

    @property
    def size(self) -> int:
        return 0 if self.key is None else self.key.shape[-1]


class XMemManager:
    """XMem's MemoryManager as far as it reads."""

    def __init__(self, top_k: int, channels: int, *, long_term: bool = True) -> None:
        self.top_k, self.CV = top_k, channels
        self.enable_long_term = self.enable_long_term_usage = long_term
        self.work_mem, self.long_mem = KeyValueMemoryStore(), KeyValueMemoryStore()

    def match_memory(self, query_key, selection):  # type: ignore[no-untyped-def]
        long = self.enable_long_term and self.long_mem.engaged()
        reads = []
        for group, value in enumerate(self.work_mem.value):
            stores = [(self.work_mem, value)]
            if long and group < self.long_mem.num_groups:
                stores.insert(0, (self.long_mem, self.long_mem.value[group]))
            keys = torch.cat([store.key[:, :, -held.shape[2] :] for store, held in stores], 2)
            shrinkages = torch.cat([store.shrinkage[:, :, -held.shape[2] :] for store, held in stores], 2)
            scores = get_similarity(keys, shrinkages, query_key, selection)
            affinity, usage = do_softmax(scores, self.top_k, return_usage=True)
            if group == 0 and self.enable_long_term:
                self.work_mem.update_usage(usage[0, -self.work_mem.size :])
                if long:
                    self.long_mem.update_usage(usage[0, : self.long_mem.size])
            reads.append(torch.cat([held for _, held in stores], 2) @ affinity)
        return torch.cat(reads).view(-1, self.CV, *query_key.shape[2:])


class CutieStore:
    """Cutie's KeyValueMemoryStore: values per object."""

    def __init__(self) -> None:
        self.v: dict[int, Tensor] = {}

    def add(self, values: dict[int, Tensor]) -> None:
        for number, value in values.items():
            self.v[number] = torch.cat([self.v[number], value], -1) if number in self.v else value

    @property
    def value(self) -> dict[int, Tensor]:
        return self.v


class CutieManager:
    """Cutie's MemoryManager as far as it reads values."""

    def __init__(self) -> None:
        self.use_long_term = True
        self.work_mem, self.long_mem = CutieStore(), CutieStore()

    def _get_visual_values_by_ids(self, obj_ids):  # type: ignore[no-untyped-def]
        value = torch.stack([self.work_mem.value[number] for number in obj_ids], dim=1)
        if self.use_long_term and obj_ids[0] in self.long_mem.value:
            long = torch.stack([self.long_mem.value[number] for number in obj_ids], dim=1)
            value = torch.cat([long, value], dim=-1)
        return value

    def _readout(self, affinity, v):  # type: ignore[no-untyped-def]
        return v @ (affinity if v.dim() == 3 else affinity[:, None])


class STCNBank:
    """STCN's MemoryBank."""

    def __init__(self, k: int, top_k: int = 20) -> None:
        self.num_objects, self.top_k = k, top_k
        self.CV: Any = None
        self.mem_k: Any = None
        self.mem_v: Any = None
        self.temp_k: Any = None
        self.temp_v: Any = None

    def match_memory(self, qk):  # type: ignore[no-untyped-def]
        keys, values = self.mem_k, self.mem_v
        if self.temp_k is not None:
            keys, values = torch.cat([keys, self.temp_k], 2), torch.cat([values, self.temp_v], 2)
        affinity = do_softmax(get_similarity(keys, None, qk, None), self.top_k)
        return (values @ affinity).view(self.num_objects, self.CV, *qk.shape[2:])

    def add_memory(self, key, value, is_temp=False):  # type: ignore[no-untyped-def]
        key, value = key.flatten(2), value.flatten(2)
        self.temp_k, self.temp_v = (key, value) if is_temp else (None, None)
        if self.mem_k is None:
            self.mem_k, self.mem_v, self.CV = key, value, value.shape[1]
        elif not is_temp:
            self.mem_k, self.mem_v = torch.cat([self.mem_k, key], 2), torch.cat([self.mem_v, value], 2)


class STCNReader(torch.nn.Module):
    """STCN's MemoryReader."""

    def get_affinity(self, mk, qk):  # type: ignore[no-untyped-def]
        return get_affinity(mk, None, qk, None)

    def readout(self, affinity, mv, qv):  # type: ignore[no-untyped-def]
        return torch.cat([readout(affinity, mv), qv], dim=1)


class STMMemory(torch.nn.Module):
    """STM's Memory."""

    def forward(self, m_in, m_out, q_in, q_out):  # type: ignore[no-untyped-def]
        scores = m_in.flatten(2).mT @ q_in.flatten(2) / m_in.shape[1] ** 0.5
        p = scores.softmax(1)
        return torch.cat([readout(p, m_out), q_out], 1), p


class MiVOSReader(torch.nn.Module):
    """MiVOS's MemoryReader of training."""

    def forward(self, mk, mv, qk, qv):  # type: ignore[no-untyped-def]
        return STMMemory()(mk, mv, qk, qv)[0]


class MiVOSEvalReader(torch.nn.Module):
    """MiVOS's EvalMemoryReader, one object at a time."""

    def __init__(self, top_k: int | None, km: float | None) -> None:
        super().__init__()
        self.top_k, self.km = top_k, km

    def forward(self, mk, mv, qk):  # type: ignore[no-untyped-def]
        height, width = qk.shape[2:]
        scores = mk.flatten(2).mT @ qk.flatten(2) / mk.shape[1] ** 0.5
        if self.km is not None:
            cells = torch.stack(torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij"), -1)
            cells = cells.view(-1, 2).float()
            centers = cells[scores.argmax(2)]  # [B, N, 2]
            distance = (centers[:, :, None] - cells).square().sum(-1)
            scores = scores - distance / (2 * self.km**2)
        return readout(do_softmax(scores, self.top_k), mv)


@contextmanager
def installed(compat: Any, places: dict[str, dict[str, Any]]) -> Iterator[dict[str, ModuleType]]:
    """Modules that hold stand-ins, recognised as the code base of a module of vosops.compat.

    Args:
        compat: vosops.compat.xmem or another.
        places: dotted module name -> attribute -> stand-in.

    Yields:
        the modules, by those names, under the package "stood_in".
    """
    modules = {name: ModuleType(f"stood_in.{name}") for name in places}
    for name, module in modules.items():
        vars(module).update(places[name])
        sys.modules[module.__name__] = module
    before: CodeBase = compat.CODE_BASE
    targets = []
    for target in before.targets:
        piece: Any = places.get(target.module, {})
        for part in target.name.split("."):
            piece = piece.get(part) if isinstance(piece, dict) else getattr(piece, part)
        targets.append(dataclasses.replace(target, digests=(source_digest(piece),)))
    compat.CODE_BASE = CodeBase(before.name, before.source, before.imports, tuple(targets), before.kept)
    try:
        yield modules
    finally:
        compat.CODE_BASE.disable()
        compat.CODE_BASE = before
        for module in modules.values():
            del sys.modules[module.__name__]
