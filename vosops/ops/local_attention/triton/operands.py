# SPDX-License-Identifier: Apache-2.0
"""What the launchers of local attention hand to the kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...memory_read.triton.operands import TYPES, float32_precision, index_type

STRIP = 16  # of tiles.py


@dataclass(frozen=True)
class Operands:
    """`tensors` and `sizes` go to the kernels as they stand, `options` by name."""

    shape: tuple[int, int, int, int]  # batch, heads, height, width
    channels: int  # of a head
    value_channels: int
    dilation: int
    tensors: tuple[Any, ...]
    sizes: tuple[Any, ...]
    options: dict[str, Any]

    @property
    def empty(self) -> bool:
        return 0 in self.shape

    def blocks(self, most_channels: int, most_values: int) -> dict[str, int]:
        """BLOCK_C and BLOCK_V: the channels of a head, or as many at a time."""
        return {
            "BLOCK_C": min(most_channels, max(16, triton.next_power_of_2(self.channels))),
            "BLOCK_V": min(most_values, max(16, triton.next_power_of_2(self.value_channels))),
        }

    @property
    def wide(self) -> bool:
        """Whether products are of float32 operands."""
        return tl.float32 in (self.options["DTYPE"], self.options["VALUE_DTYPE"])

    @property
    def offset_blocks(self) -> int:
        """Rows of a window times the parts of 16 offsets that each has."""
        return self.window * int(self.options["PARTS"])

    @property
    def window(self) -> int:
        return int(self.sizes[-2])

    def tiles(self, rows: int) -> int:
        """Tiles of `rows` strips in one head of one batch entry."""
        height, width = self.shape[2:]
        down, across = (triton.cdiv(size, self.dilation) for size in (height, width))
        planes = min(self.dilation, height) * min(self.dilation, width)
        return planes * triton.cdiv(down, rows) * triton.cdiv(across, STRIP)

    @staticmethod
    def of(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        relative_bias: Tensor | None,
        relative_weight: Tensor | None,
        relative_offset: Tensor | None,
        relative_value: Tensor | None,
        num_heads: int,
        window: int,
        dilation: int,
        scale: float,
    ) -> Operands:
        """Of the operators' arguments; the tables are contiguous."""
        batch, channels, height, width = query.shape
        channels, value_channels = channels // num_heads, value.shape[1] // num_heads
        bias = query if relative_bias is None else relative_bias
        bias_strides = (0,) * 5 if relative_bias is None else relative_bias.stride()
        maps = [query, key, value, bias]
        narrow = query.dtype == key.dtype != torch.float32
        tables = (relative_weight, relative_offset, relative_value)
        return Operands(
            shape=(batch, num_heads, height, width),
            channels=channels,
            value_channels=value_channels,
            dilation=dilation,
            tensors=(
                *(query, *query.stride(), key, *key.stride(), value, *value.stride()),
                *(bias, *bias_strides),
                *(query if table is None else table for table in tables),
            ),
            sizes=(num_heads, height, width, dilation, window, scale),
            options={
                "channels": channels,
                "value_channels": value_channels,
                "PARTS": triton.cdiv(window, STRIP),
                "BIAS": relative_bias is not None,
                "WEIGHT": relative_weight is not None,
                "OFFSET": relative_offset is not None,
                "RELATIVE": relative_value is not None,
                "DTYPE": TYPES[query.dtype] if narrow else tl.float32,
                "VALUE_DTYPE": TYPES[value.dtype],
                "PRECISION": float32_precision(),
                "INDEX": _index(maps, value),
            },
        )


def _index(maps: list[Tensor], value: Tensor) -> tl.dtype:
    """What offsets fit into: also those of contiguous results and gradients beside expanded operands."""
    widest = max(x[0].numel() for x in (maps[0], value)) if value.shape[0] else 0
    return tl.int64 if widest >= 2**31 - 2**24 else index_type(*maps)
