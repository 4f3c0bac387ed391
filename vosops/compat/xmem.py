# SPDX-License-Identifier: Apache-2.0
"""XMem's published code: its four memory functions, its memory manager's match and its value bank.

The functions have the published signatures and can be used alone. What they return are tensors that are not
stored (`affinity`): similarity, top-k softmax and readout run as one fused read, without a (B, N, P) matrix.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .affinity import Affinity, Operands, Similarity
from .growing import growing, plain
from .patching import CodeBase, Target
from .report import Report


def get_similarity(mk: Tensor, ms: Tensor | None, qk: Tensor, qe: Tensor | None) -> Tensor:
    """XMem's similarity of memory positions and queries, -r sum_c e (k - q)^2 / sqrt(Ck).

    Without `qe` it is STCN's 2 <k, q> - |k|^2, without `ms` nothing multiplies it.

    Args:
        mk: (B, Ck, *N) memory keys.
        ms: (B, 1, *N) shrinkage r, or None.
        qk: (B, Ck, *P) query keys.
        qe: (B, Ck, *P) selection e, or None.

    Returns:
        (B, N, P), computed only if something other than these functions asks for its numbers. Under autocast
        it is float32.

    Raises:
        TypeError, ValueError: the shapes or dtypes do not go together.

    Source: XMem (Cheng and Schwing, ECCV 2022), eq. 2.
    """
    operands = Operands(
        plain(mk).flatten(2),
        qk.flatten(2),
        None if ms is None else ms.flatten(1)[:, None],
        None if qe is None else qe.flatten(2),
    )
    # Inside a compiled graph the compiler fuses what it can; a lazy tensor would break the graph.
    if torch.compiler.is_compiling():
        return operands.dense()
    return Similarity(operands)


def do_softmax(
    similarity: Tensor, top_k: int | None = None, inplace: bool = False, return_usage: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """The softmax over memory positions, of the top_k best of each query or of all.

    Args:
        similarity: (B, N, P), of `get_similarity` or any other.
        top_k: positions kept per query; None or more than N keeps all.
        inplace: an ordinary `similarity` is overwritten by the result.
        return_usage: also return how much each position was used.

    Returns:
        The affinity (B, N, P); with return_usage also its sum over queries (B, N). The maximum is subtracted
        first, so that scores below -104 or above 88, which give NaN as published, give the right answer.

    Raises:
        TypeError, ValueError: top_k is no positive integer.

    Note:
        Of `get_similarity`: 4 B N P Ck operations with top_k, and O(B P top_k) memory.
    """
    if isinstance(similarity, Similarity) and similarity.lazy:
        affinity: Tensor = similarity.affinity(top_k)
    else:
        affinity = _dense_softmax(similarity, top_k)
        if inplace:
            affinity = similarity.copy_(affinity)
    if return_usage:
        return affinity, affinity.sum(dim=2)
    return affinity


def get_affinity(mk: Tensor, ms: Tensor | None, qk: Tensor, qe: Tensor | None) -> Tensor:
    """`do_softmax` over all positions of `get_similarity`: (B, N, P), as training reads it."""
    affinity = do_softmax(get_similarity(mk, ms, qk, qe))
    assert isinstance(affinity, Tensor)
    return affinity


def readout(affinity: Tensor, mv: Tensor) -> Tensor:
    """The values that each query reads.

    Args:
        affinity: (B, T*H*W, H*W).
        mv: (B, Cv, T, H, W).

    Returns:
        (B, Cv, H, W). Differentiable in the keys, shrinkage, selection and values.

    Raises:
        ValueError: mv has another number of dimensions, or of positions than the affinity.

    Note:
        Of a lazy affinity: 2 B P Cv top_k operations with top_k, 2 B P N (Ck + Cv) without; extra memory
        O(P Cv).
    """
    if mv.dim() != 5 or affinity.dim() != 3 or affinity.shape[1] != mv[0, 0].numel():
        raise ValueError(
            f"mv must be (B, Cv, T, H, W) with the T*H*W positions of affinity (B, T*H*W, H*W); "
            f"got mv {tuple(mv.shape)}, affinity {tuple(affinity.shape)}"
        )
    batch, channels, _, height, width = mv.shape
    value = plain(mv).flatten(2)
    read = affinity.read(value[:, None]) if isinstance(affinity, Affinity) else torch.bmm(value, affinity)
    return read.view(batch, channels, height, width)


def _dense_softmax(similarity: Tensor, top_k: int | None) -> Tensor:
    if top_k is None or top_k >= similarity.shape[1]:
        return similarity.softmax(1)
    best, indices = similarity.topk(top_k, dim=1)
    return torch.zeros_like(similarity).scatter(1, indices, best.softmax(1).to(similarity.dtype))


def _match_memory(self: Any, query_key: Tensor, selection: Tensor | None) -> Tensor:
    """MemoryManager.match_memory: (1, Ck, H, W) -> (objects, Cv, H, W), counting usage.

    One match per group of objects that entered together; values are read where they lie, long-term and
    working memory apart.
    """
    grid, work = query_key.shape[-2:], self.work_mem
    long = self.long_mem if self.enable_long_term and self.long_mem.engaged() else None
    reads = []
    for group, value in enumerate(work.value):
        held = work.size if group == 0 else work.get_v_size(group)  # the newest positions of the memory
        keys, shrinkages, values = [work.key[:, :, -held:]], [work.shrinkage[:, :, -held:]], [value[None]]
        if long is not None and group < long.num_groups:
            size = long.get_v_size(group)
            keys.insert(0, long.key[:, :, -size:])
            shrinkages.insert(0, long.shrinkage[:, :, -size:])
            values.insert(0, long.value[group][None])
        similarity = get_similarity(_joined(keys), _joined(shrinkages), query_key, selection)
        assert isinstance(similarity, Similarity)
        affinity = similarity.affinity(self.top_k)
        if group == 0 and self.enable_long_term:
            _count_usage(self, affinity.usage())
        reads.append(affinity.read(*values)[0])
    return torch.cat(reads).view(-1, self.CV, *grid)


def _count_usage(manager: Any, usage: Tensor) -> None:
    """Usage (1, N) of the first group, which matches every position: long-term ones, then working ones."""
    work = manager.work_mem.size
    manager.work_mem.update_usage(usage[:, -work:].flatten())
    if manager.enable_long_term_usage and manager.long_mem.engaged():
        manager.long_mem.update_usage(usage[:, :-work].flatten())


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def _add(published: Callable[..., None]) -> Callable[..., None]:
    """KeyValueMemoryStore.add on values that grow in place."""

    @functools.wraps(published)
    def add(self: Any, *arguments: Any, **keywords: Any) -> None:
        self.v = [growing(value) for value in self.v]
        published(self, *arguments, **keywords)

    return add


_FUNCTIONS = "model.memory_util"
CODE_BASE = CodeBase(
    name="XMem",
    source="github.com/hkchengrex/XMem",
    imports="inference.inference_core (and model.network)",
    targets=(
        Target(_FUNCTIONS, "get_similarity", get_similarity, ("2e222762ad4b",)),
        Target(_FUNCTIONS, "do_softmax", do_softmax, ("b0c8286b62a8",)),
        Target(_FUNCTIONS, "get_affinity", get_affinity, ("1c46541cb64a",)),
        Target(_FUNCTIONS, "readout", readout, ("0b7d43edac68",)),
        Target("inference.memory_manager", "MemoryManager.match_memory", _match_memory, ("ef51572da4d6",)),
        Target("inference.kv_memory_store", "KeyValueMemoryStore.add", _add, ("1f14c080ba00",), wraps=True),
    ),
    kept=(
        ("MemoryManager.consolidation", "runs fused through the functions it calls"),
        ("KeyValueMemoryStore.remove_obsolete_features", "long-term eviction is as published"),
    ),
)


def enable() -> Report:
    """Replace XMem's memory read wherever its code is imported; see `CodeBase.enable`."""
    return CODE_BASE.enable()


def disable() -> None:
    """Put XMem's published code back; see `CodeBase.disable`."""
    CODE_BASE.disable()
