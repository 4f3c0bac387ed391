# SPDX-License-Identifier: Apache-2.0
"""What one call of local attention asks for, checked."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from torch import Tensor

from ..checks import check_device, check_shape, check_tensor

_MAP, _VALUE_MAP = "(B, C, H, W)", "(B, Cv, H, W)"


@dataclass(frozen=True)
class Window:
    """Operands of s_pD = scale <q_p, k_(p+D)> + relative term, and of the read."""

    query: Tensor  # [B, C, H, W]
    key: Tensor  # [B, C, H, W]
    value: Tensor  # [B, Cv, H, W]
    relative_bias: Tensor | None  # [B, h, window^2, H, W]
    relative_weight: Tensor | None  # [h * window^2, C / h]
    relative_offset: Tensor | None  # [h * window^2]
    relative_value: Tensor | None  # [h, Cv / h, window^2]
    num_heads: int
    window: int
    dilation: int
    scale: float

    def tensors(self) -> dict[str, Tensor]:
        named = ((field.name, getattr(self, field.name)) for field in fields(self))
        return {name: value for name, value in named if isinstance(value, Tensor)}


def build_window(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    num_heads: int,
    window: int,
    dilation: int,
    relative_bias: Tensor | None,
    relative_weight: Tensor | None,
    relative_offset: Tensor | None,
    relative_value: Tensor | None,
    scale: float | None,
) -> Window:
    """Check every argument; raises TypeError or ValueError, naming it."""
    for name, tensor, layout in (("query", query, _MAP), ("key", key, _MAP), ("value", value, _VALUE_MAP)):
        check_tensor(name, tensor, layout=layout)
        if tensor.dim() != 4:
            raise ValueError(f"{name} must have 4 dimensions {layout}, got shape {list(tensor.shape)}")
    batch, channels, height, width = query.shape
    check_shape("key", key, query.shape, f"{_MAP} of query")
    check_shape("value", value, (batch, value.shape[1], height, width), f"{_VALUE_MAP} on the map of query")
    _check_integer("num_heads", num_heads)
    _check_integer("window", window)
    _check_integer("dilation", dilation)
    if window % 2 == 0:
        raise ValueError(f"window must be odd, got {window}")
    for name, count in (("query", channels), ("value", value.shape[1])):
        if count == 0 or count % num_heads:
            raise ValueError(
                f"{name} must have a positive multiple of num_heads = {num_heads} channels, got {count}"
            )
    if relative_bias is not None and relative_weight is not None:
        raise ValueError("relative_bias and relative_weight are two forms of one term: give one of them")
    if relative_offset is not None and relative_weight is None:
        raise ValueError("relative_offset belongs to relative_weight, which is None")
    offsets = window * window
    shapes: tuple[tuple[str, Tensor | None, tuple[int, ...], str], ...] = (
        (
            "relative_bias",
            relative_bias,
            (batch, num_heads, offsets, height, width),
            "(B, h, window^2, H, W)",
        ),
        (
            "relative_weight",
            relative_weight,
            (num_heads * offsets, channels // num_heads),
            "(h * window^2, C / h)",
        ),
        ("relative_offset", relative_offset, (num_heads * offsets,), "(h * window^2,)"),
        (
            "relative_value",
            relative_value,
            (num_heads, value.shape[1] // num_heads, offsets),
            "(h, Cv / h, window^2)",
        ),
    )
    for name, relative, shape, layout in shapes:
        if relative is not None:
            check_tensor(name, relative, layout=layout)
            check_shape(name, relative, shape, layout)
    if scale is None:
        scale = (channels // num_heads) ** -0.5
    elif isinstance(scale, bool) or not isinstance(scale, int | float) or not math.isfinite(scale):
        raise ValueError(f"scale must be a finite number or None for 1/sqrt(C/h), got {scale!r}")
    p = Window(
        query,
        key,
        value,
        relative_bias,
        relative_weight,
        relative_offset,
        relative_value,
        num_heads,
        window,
        dilation,
        float(scale),
    )
    for name, tensor in p.tensors().items():
        check_device(name, tensor, "query", query.device)
    return p


def _check_integer(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
