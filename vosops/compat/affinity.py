# SPDX-License-Identifier: Apache-2.0
"""Similarity and affinity as published code passes them on, (B, N, P), without being stored."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from vosops.ops.memory_read import Match, memory_gather, memory_match, memory_read, reference
from vosops.ops.memory_read.problem import build_scores

from .growing import plain
from .lazy import LazyTensor, like_matmul

_FULL = slice(None)


@dataclass(frozen=True)
class Operands:
    """What a similarity is computed from; see `vosops.memory_read`.

    Args:
        memory_key: (B, Ck, N).
        query_key: (B, Ck, P).
        shrinkage: (B, 1, N) or None.
        selection: (B, Ck, P) or None.
        similarity: "l2" or "dot".

    Raises:
        TypeError, ValueError: they do not go together.
    """

    memory_key: Tensor
    query_key: Tensor
    shrinkage: Tensor | None = None
    selection: Tensor | None = None
    similarity: Literal["dot", "l2"] = "l2"

    def __post_init__(self) -> None:
        self._scores()

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """All of them."""
        return self.memory_key, self.query_key, self.shrinkage, self.selection

    def _scores(self) -> Any:
        return build_scores(
            self.query_key, self.memory_key, self.similarity, None, self.shrinkage, self.selection, None
        )

    def dense(self) -> Tensor:
        """The similarity (B, N, P), contiguous; float32 at least, also under autocast."""
        with torch.autocast(self.query_key.device.type, enabled=False):
            return reference.scores(self._scores()).mT.contiguous()

    def at(self, memory: Any, queries: Any) -> Operands:
        """Some of the memory positions and queries: a slice, mask or index for each."""
        changed: dict[str, Tensor] = {}
        if not _is_full(memory):
            changed["memory_key"] = self.memory_key[:, :, memory]
            if self.shrinkage is not None:
                changed["shrinkage"] = self.shrinkage[:, :, memory]
        if not _is_full(queries):
            changed["query_key"] = self.query_key[:, :, queries]
            if self.selection is not None:
                changed["selection"] = self.selection[:, :, queries]
        return replace(self, **changed)  # type: ignore[arg-type]

    def match(self, top_k: int) -> Match:
        """`vosops.memory_match` of them."""
        return memory_match(
            self.query_key,
            self.memory_key,
            top_k=top_k,
            similarity=self.similarity,
            shrinkage=self.shrinkage,
            selection=self.selection,
        )

    def read(self, value: Tensor) -> Tensor:
        """`vosops.memory_read` without top-k: (B, O, Cv, N) -> (B, O, Cv, P)."""
        read = memory_read(
            self.query_key,
            self.memory_key,
            value,
            similarity=self.similarity,
            shrinkage=self.shrinkage,
            selection=self.selection,
        )
        assert isinstance(read, Tensor)
        return read


class Similarity(LazyTensor):
    """The scaled similarity (B, N, P) of `operands`, not stored."""

    operands: Operands

    @staticmethod
    def __new__(cls, operands: Operands) -> Any:
        key, query = operands.memory_key, operands.query_key
        dtype = torch.promote_types(key.dtype, query.dtype)
        if torch.is_autocast_enabled(key.device.type):
            dtype = torch.promote_types(dtype, torch.float32)
        shape = (key.shape[0], key.shape[2], query.shape[2])
        self = super().__new__(cls, shape, dtype, key.device, operands.tensors)
        self.operands = operands
        return self

    def compute(self) -> Tensor:
        return self.operands.dense().to(self.dtype)

    def affinity(self, top_k: int | None) -> Affinity:
        """The softmax over the memory positions: of the `top_k` best of each query, or of all."""
        match = None if top_k is None else self.operands.match(top_k)
        return Affinity(self.operands, match, self.dtype)


class Affinity(LazyTensor):
    """The softmax over memory positions (B, N, P) of a similarity, not stored.

    Args:
        operands: of the similarity.
        match: what top-k kept; None for the softmax over all positions.
        dtype: what the published tensor has.
    """

    operands: Operands
    match: Match | None

    @staticmethod
    def __new__(cls, operands: Operands, match: Match | None, dtype: torch.dtype) -> Any:
        key, query = operands.memory_key, operands.query_key
        shape = (key.shape[0], key.shape[2], query.shape[2])
        sources = operands.tensors if match is None else (match.weights,)
        self = super().__new__(cls, shape, dtype, key.device, sources)
        self.operands, self.match = operands, match
        return self

    def compute(self) -> Tensor:
        if self.match is None:
            return self.operands.dense().softmax(1).to(self.dtype)
        indices, weights = self.match.indices, self.match.weights
        # An index below 0 stands for a position that cannot match: its weight is 0 or NaN wherever it goes.
        dense = weights.new_zeros(self.shape).scatter_add(1, indices.clamp(min=0).mT, weights.mT)
        return dense.to(self.dtype)

    def usage(self) -> Tensor:
        """(B, N): the sum over queries, float32 at least."""
        if self.match is None or not self.lazy:
            return self.materialize().sum(2)
        batch, memory = self.shape[:2]
        indices, weights = self.match.indices.clamp(min=0), self.match.weights
        rows = indices + torch.arange(batch, device=indices.device)[:, None, None] * memory
        flat = weights.new_zeros(batch * memory).index_add(0, rows.flatten(), weights.flatten())
        return flat.view(batch, memory)

    def read(self, *parts: Tensor) -> Tensor:
        """The product of values and affinity: (B, O, Cv, P) of values (B, O, Cv, N).

        Args:
            parts: values (B, O, Cv, N_i), their N_i together N: banks that need not be concatenated.
        """
        parts = tuple(plain(part) for part in parts)
        if self.lazy and self.match is not None:
            return like_matmul(gather_parts(self.match, parts))
        value = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
        if self.lazy:
            return like_matmul(self.operands.read(value))
        weights = self.materialize().to(value.dtype)
        return torch.bmm(value.flatten(1, 2), weights).unflatten(1, value.shape[1:3])


def gather_parts(match: Match, parts: tuple[Tensor, ...]) -> Tensor:
    """`vosops.memory_gather` of values that lie in several tensors, without concatenating them.

    Args:
        match: over the N positions of all parts, in their order; Q queries, k kept.
        parts: (B, O, Cv, N_i).

    Returns:
        (B, O, Cv, *q).

    Note:
        Cost: one gather of Q k rows per part; a row of another part is row 0 with weight 0.
    """
    if len(parts) == 1:
        return memory_gather(match, parts[0])
    read, start, wide = None, 0, torch.promote_types(parts[0].dtype, torch.float32)
    for part in parts:
        end = start + part.shape[-1]
        inside = (match.indices >= start) & (match.indices < end)
        share = Match(
            torch.where(inside, match.indices - start, 0),
            torch.where(inside, match.weights, 0),
            match.query_shape,
        )
        piece = memory_gather(share, part, dtype=wide)
        read, start = piece if read is None else read + piece, end
    assert read is not None
    return read.to(parts[0].dtype)


def _is_full(index: Any) -> bool:
    return isinstance(index, slice) and index == _FULL


def _similarity_at(similarity: Any, index: Any) -> Any:
    """similarity[:, memory, queries]; a selection of both by tensors would pair them up."""
    if not (similarity.lazy and isinstance(index, tuple) and 2 <= len(index) <= 3 and _is_full(index[0])):
        return NotImplemented
    memory, queries = index[1], index[2] if len(index) == 3 else _FULL
    lists = [isinstance(part, Tensor) and part.dim() == 1 for part in (memory, queries)]
    if all(lists) or not all(
        chosen or isinstance(part, slice) for chosen, part in zip(lists, (memory, queries), strict=True)
    ):
        return NotImplemented
    return Similarity(similarity.operands.at(memory, queries))


def _cat_similarities(tensors: Any, dim: int = 0, **others: Any) -> Any:
    """Over memory positions, of similarities to the same queries."""
    tensors = tuple(tensors)
    if dim not in (1, -2) or others or not all(isinstance(x, Similarity) and x.lazy for x in tensors):
        return NotImplemented
    first = tensors[0].operands
    if any(
        x.operands.query_key is not first.query_key
        or x.operands.selection is not first.selection
        or (x.operands.shrinkage is None) != (first.shrinkage is None)
        or x.operands.similarity != first.similarity
        for x in tensors
    ):
        return NotImplemented
    keys = torch.cat([x.operands.memory_key for x in tensors], 2)
    shrinkage = None
    if first.shrinkage is not None:
        shrinkage = torch.cat([x.operands.shrinkage for x in tensors], 2)
    return Similarity(replace(first, memory_key=keys, shrinkage=shrinkage))


def _product(value: Any, affinity: Any, **others: Any) -> Any:
    """value @ affinity for values (n, C, N): n entries of the batch, or n objects of its one entry."""
    if others or not isinstance(affinity, Affinity) or isinstance(value, LazyTensor) or not affinity.lazy:
        return NotImplemented
    batch, memory = affinity.shape[:2]
    if value.dim() not in (2, 3) or value.shape[-1] != memory:
        return NotImplemented
    if value.dim() == 2:
        return affinity.read(value.expand(batch, *value.shape)[:, None])[:, 0]
    if batch == 1:
        return affinity.read(value[None])[0]
    return affinity.read(value[:, None])[:, 0] if value.shape[0] == batch else NotImplemented


def _sum(affinity: Any, dim: Any = None, **others: Any) -> Any:
    """affinity.sum(2), the usage."""
    if others or dim not in (2, -1, (2,), [2]) or affinity.match is None or not affinity.lazy:
        return NotImplemented
    return affinity.usage().to(affinity.dtype)


Similarity.fused = {
    Tensor.__getitem__: _similarity_at,
    torch.cat: _cat_similarities,
    torch.concat: _cat_similarities,
}
Affinity.fused = {
    Tensor.__matmul__: _product,
    Tensor.matmul: _product,
    torch.matmul: _product,
    Tensor.bmm: _product,
    torch.bmm: _product,
    Tensor.sum: _sum,
    torch.sum: _sum,
}
