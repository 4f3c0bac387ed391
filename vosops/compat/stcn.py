# SPDX-License-Identifier: Apache-2.0
"""STCN's published code: the MemoryReader of training and the MemoryBank of evaluation."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .affinity import Affinity, Operands
from .growing import growing, plain
from .patching import CodeBase, Target
from .report import Report
from .xmem import get_affinity, readout


def _get_affinity(self: Any, mk: Tensor, qk: Tensor) -> Tensor:
    """MemoryReader.get_affinity: mk (B, Ck, T, H, W), qk (B, Ck, H, W) -> (B, T*H*W, H*W), not stored."""
    return get_affinity(mk, None, qk, None)


def _readout(self: Any, affinity: Tensor, mv: Tensor, qv: Tensor) -> Tensor:
    """MemoryReader.readout: mv (B, Cv, T, H, W), qv (B, Cq, H, W) -> (B, Cv + Cq, H, W)."""
    return torch.cat((readout(affinity, mv), qv), 1)


def _match_memory(self: Any, qk: Tensor) -> Tensor:
    """MemoryBank.match_memory: (1, Ck, H, W) -> (objects, Cv, H, W).

    One match for all objects; a temporary frame is read where it lies.
    """
    keys, values = [plain(self.mem_k)], [self.mem_v[None]]
    if self.temp_k is not None:
        keys.append(self.temp_k)
        values.append(self.temp_v[None])
    key = keys[0] if len(keys) == 1 else torch.cat(keys, 2)
    operands = Operands(key, qk.flatten(2))
    affinity = Affinity(operands, operands.match(self.top_k), key.dtype)
    return affinity.read(*values)[0].view(self.num_objects, self.CV, *qk.shape[-2:])


def _add_memory(published: Callable[..., None]) -> Callable[..., None]:
    """MemoryBank.add_memory on keys and values that grow in place."""

    @functools.wraps(published)
    def add_memory(self: Any, *arguments: Any, **keywords: Any) -> None:
        if self.mem_k is not None:
            self.mem_k, self.mem_v = growing(self.mem_k), growing(self.mem_v)
        published(self, *arguments, **keywords)

    return add_memory


_BANK = "inference_memory_bank"
CODE_BASE = CodeBase(
    name="STCN",
    source="github.com/hkchengrex/STCN",
    imports="inference_core or inference_core_yv for evaluation, model.network for training",
    targets=(
        Target(_BANK, "MemoryBank.match_memory", _match_memory, ("150347ea32e2",)),
        Target(_BANK, "MemoryBank.add_memory", _add_memory, ("e150f1eb6260",), wraps=True),
        Target("model.network", "MemoryReader.get_affinity", _get_affinity, ("d53192d7dba7",)),
        Target("model.network", "MemoryReader.readout", _readout, ("e98ffeb06c6d",)),
    ),
)


def enable() -> Report:
    """Replace STCN's memory read wherever its code is imported; see `CodeBase.enable`."""
    return CODE_BASE.enable()


def disable() -> None:
    """Put STCN's published code back; see `CodeBase.disable`."""
    CODE_BASE.disable()
