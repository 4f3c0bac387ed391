# SPDX-License-Identifier: Apache-2.0
"""What the launchers hand to the kernels: pointers, strides and compile-time facts of one call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..limits import merged
from ..problem import Scores

TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@dataclass(frozen=True)
class Positions:
    """Where flattened positions of a tensor lie: `arguments` and FLAT of `scores.offset_of`."""

    arguments: tuple[int, ...]
    flat: bool

    @staticmethod
    def of(tensor: Tensor, first: int) -> Positions:
        sizes, strides = merged(tensor, first)
        if len(sizes) > 3:
            raise ValueError(f"positions of shape {list(tensor.shape[first:])} take more than three strides")
        padding = 3 - len(sizes)
        outer, middle, inner = [1] * padding + sizes
        return Positions((middle, inner, *[0] * padding, *strides), outer == middle == 1)


@dataclass(frozen=True)
class Operands:
    """The score's operands. `query` and `memory_side` go to the kernels as they stand, `options` by name.

    An entry is a batch entry, or one of its heads: they have a stride of their own.
    """

    entries: int
    heads: int  # entries of one batch entry
    queries: int
    memory: int
    channels: int
    dtype: torch.dtype  # of the query
    device: torch.device
    query: tuple[
        Any, ...
    ]  # heads; pointer, batch and head stride, channel stride, position stride; selection
    memory_side: tuple[Any, ...]  # key, batch and head stride, channel stride, its positions; mask, ...
    options: dict[str, Any]

    @property
    def block_c(self) -> int:
        return int(self.options["BLOCK_C"])

    @property
    def form(self) -> str:
        return str(self.options["FORM"])

    @property
    def wide(self) -> bool:
        """Whether products are of float32 operands."""
        return bool(self.options["DTYPE"] == tl.float32)

    @staticmethod
    def of(p: Scores, *further: Tensor) -> Operands:
        """Of a memory read that also reads `further` tensors."""
        flat = (p.memory_mask, p.shrinkage, p.centers, p.precision)
        # Of one number per position: flattening these may copy, which costs nothing beside the keys.
        mask, shrinkage, centers, precision = (None if x is None else x.flatten(1).contiguous() for x in flat)
        form = p.similarity
        if form == "dot" and shrinkage is None and centers is None and p.scale > 0:
            form = "plain"
        return Operands._of(
            p.query_key.flatten(2)[:, None],
            p.memory_key[:, None],
            form,
            p.scale,
            further,
            selection=p.selection,
            mask=mask,
            shrinkage=shrinkage,
            centers=centers,
            precision=precision,
            width=p.query_key.shape[-1],
        )

    @staticmethod
    def of_heads(
        query: Tensor, key: Tensor, gate: Tensor | None, distance: bool, scale: float, *further: Tensor
    ) -> Operands:
        """Of attention: query (B, h, C/h, Q), key (B, h, C/h, M), gate (B, h, M)."""
        form = "distance" if distance else "plain" if gate is None and scale > 0 else "dot"
        rate = None if gate is None else gate.contiguous()  # as small beside the keys
        return Operands._of(query, key, form, scale, further, shrinkage=rate)

    @staticmethod
    def _of(
        q: Tensor,  # [B, heads, Ck, Q]
        k: Tensor,  # [B, heads, Ck, *m]
        form: str,
        scale: float,
        further: tuple[Tensor, ...],
        *,
        selection: Tensor | None = None,
        mask: Tensor | None = None,
        shrinkage: Tensor | None = None,
        centers: Tensor | None = None,
        precision: Tensor | None = None,
        width: int = 1,
    ) -> Operands:
        positions = Positions.of(k, 3)
        e = q[:, 0] if selection is None else selection.flatten(2)
        if mask is not None:
            mask = mask.view(torch.uint8)
        if shrinkage is not None:
            shrinkage = shrinkage.float()
        same = q.dtype == k.dtype == e.dtype and k.dtype != torch.float32
        # A square of float16 can overflow it, so with a selection float16 keys are multiplied as float32.
        narrow = same and not (selection is not None and k.dtype == torch.float16)
        channels = k.shape[2]
        return Operands(
            entries=k.shape[0] * k.shape[1],
            heads=k.shape[1],
            queries=q.shape[3],
            memory=k.shape[3:].numel(),
            channels=channels,
            dtype=q.dtype,
            device=q.device,
            query=(k.shape[1], q, *q.stride(), e, *e.stride()),
            memory_side=(
                *(k, *k.stride()[:3], *positions.arguments),
                *(k if x is None else x for x in (mask, shrinkage, centers, precision)),
                width,
                scale,
            ),
            options={
                "channels": channels,
                "BLOCK_C": max(16, triton.next_power_of_2(channels)),
                "FLAT": positions.flat,
                "FORM": form,
                "SELECTION": selection is not None,
                "SHRINKAGE": shrinkage is not None,
                "MASK": mask is not None,
                "PRIOR": centers is not None,
                "SPLIT": narrow and selection is not None,
                "DTYPE": TYPES[k.dtype] if narrow else tl.float32,
                "PRECISION": float32_precision(),
                "INDEX": index_type(q, e, k, *further),
            },
        )


@dataclass(frozen=True)
class Values:
    """What the dense kernels read: `arguments` go to them as they stand, `options` by name."""

    width: int  # channels of one entry
    rows: bool  # channels are innermost
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    @property
    def narrow(self) -> bool:
        """Whether they are multiplied in 16 bits."""
        return bool(self.options["VALUE_DTYPE"] != tl.float32)

    @property
    def block(self) -> int:
        """The smallest block that holds the width."""
        return max(16, triton.next_power_of_2(self.width))

    @staticmethod
    def of(value: Tensor, o: Operands) -> Values:
        """Of a memory read: (B, O, Cv, *m), all objects read with the same weights."""
        per_object, s_batch, s_object, s_channel = value_strides(value)
        strides = (per_object, s_batch, 0, s_object, s_channel)
        return Values._of(value, None, value.shape[1:3].numel(), strides, o)

    @staticmethod
    def of_heads(value: Tensor, identity: Tensor | None, o: Operands) -> Values:
        """Of attention: (B, h, Cv/h, M), each head with weights of its own."""
        width = value.shape[2]
        strides = (max(1, width), value.stride(0), value.stride(1), 0, value.stride(2))
        return Values._of(value, identity, width, strides, o)

    @staticmethod
    def _of(
        value: Tensor, identity: Tensor | None, width: int, strides: tuple[int, ...], o: Operands
    ) -> Values:
        positions = Positions.of(value, 3)
        # Weights are rounded to the values' type where the result has it too.
        dtype = value.dtype if value.dtype == o.dtype else torch.float32
        added = (value, 0, 0, 0, 0) if identity is None else (identity, *identity.stride())
        return Values(
            width,
            value.stride(2) == 1,
            (value, *strides, *positions.arguments, *added),
            {"VALUE_FLAT": positions.flat, "VALUE_DTYPE": TYPES[dtype], "IDENTITY": identity is not None},
        )


def float32_precision() -> str:
    """How float32 products are made: in three passes, or as tf32 where torch's settings allow it."""
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def slim(o: Operands, v: Values) -> bool:
    """Whether keys and values have as few channels as a head of AOT: a larger tile of scores fits."""
    return v.rows and max(o.block_c, v.block) <= 32 and not (o.options["SELECTION"] or o.options["PRIOR"])


def column_tile(o: Operands) -> tuple[int, int, int]:
    """(BLOCK_Q, BLOCK_M, warps) of kernels that keep a memory block and pass over the queries."""
    selects = bool(o.options["SELECTION"])
    if o.wide and selects:
        return 16, 16, 4
    if o.wide:
        return 32 if o.block_c <= 64 else 16, 32, 8
    return 64, 32 if selects else 64, 4 if o.block_c <= 64 and not selects else 8


def index_type(*tensors: Tensor) -> tl.dtype:
    """What offsets inside one batch entry of every tensor fit into; with room for what masks cut off."""
    reach = max(
        sum((size - 1) * stride for size, stride in zip(x.shape[1:], x.stride()[1:], strict=True))
        for x in tensors
    )
    return tl.int32 if reach < 2**31 - 2**24 else tl.int64


def value_strides(value: Tensor) -> tuple[int, int, int, int]:
    """Value channels per object, and the strides of batch, object and channel; where one stride spans the
    channels of all objects they count as one object's."""
    objects, channels = value.shape[1:3]
    if objects == 1 or value.stride(1) == channels * value.stride(2):
        return max(1, objects * channels), value.stride(0), 0, value.stride(2)
    return max(1, channels), value.stride(0), value.stride(1), value.stride(2)
