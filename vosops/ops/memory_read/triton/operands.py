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
    """The score's operands. `query` and `memory` go to the kernels as they stand, `options` by name."""

    batch: int
    queries: int
    memory: int
    channels: int
    query: tuple[Any, ...]  # pointer, batch stride, channel stride, position stride; twice
    memory_side: tuple[Any, ...]  # key, batch stride, channel stride, its positions; mask, shrinkage, ...
    options: dict[str, Any]

    @property
    def block_c(self) -> int:
        return int(self.options["BLOCK_C"])

    @property
    def wide(self) -> bool:
        """Whether products are of float32 operands."""
        return bool(self.options["DTYPE"] == tl.float32)

    @staticmethod
    def of(p: Scores, *further: Tensor) -> Operands:
        """Of a call that also reads `further` tensors."""
        q = p.query_key.flatten(2)
        e = q if p.selection is None else p.selection.flatten(2)
        k = p.memory_key
        positions = Positions.of(k, 2)
        flat = (p.memory_mask, p.shrinkage, p.centers, p.precision)
        # Of one number per position: flattening these may copy, which costs nothing beside the keys.
        mask, shrinkage, centers, precision = (None if x is None else x.flatten(1).contiguous() for x in flat)
        if mask is not None:
            mask = mask.view(torch.uint8)
        if shrinkage is not None:
            shrinkage = shrinkage.float()
        same = q.dtype == k.dtype == e.dtype and k.dtype != torch.float32
        # A square of float16 can overflow it, so with a selection float16 keys are multiplied as float32.
        narrow = same and not (p.selection is not None and k.dtype == torch.float16)
        return Operands(
            batch=k.shape[0],
            queries=q.shape[2],
            memory=p.memory,
            channels=k.shape[1],
            query=(q, *q.stride(), e, *e.stride()),
            memory_side=(
                *(k, k.stride(0), k.stride(1), *positions.arguments),
                *(k if x is None else x for x in (mask, shrinkage, centers, precision)),
                p.query_key.shape[-1],
                p.scale,
            ),
            options={
                "channels": k.shape[1],
                "BLOCK_C": max(16, triton.next_power_of_2(k.shape[1])),
                "FLAT": positions.flat,
                "L2": p.similarity == "l2",
                "SELECTION": p.selection is not None,
                "SHRINKAGE": shrinkage is not None,
                "MASK": mask is not None,
                "PRIOR": centers is not None,
                "SPLIT": narrow and p.selection is not None,
                "DTYPE": TYPES[k.dtype] if narrow else tl.float32,
                "PRECISION": float32_precision(),
                "INDEX": index_type(q, e, k, *further),
            },
        )


def float32_precision() -> str:
    """How float32 products are made: in three passes, or as tf32 where torch's settings allow it."""
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"


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
