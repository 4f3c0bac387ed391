# SPDX-License-Identifier: Apache-2.0
"""Local attention on the operators of schema.py: compiled (C++) or, with a prefix, Triton."""

from __future__ import annotations

from torch import Tensor

from ..families import operator
from . import schema  # noqa: F401  defines the operators
from .problem import Window


def local_attention(p: Window, family: str) -> Tensor:
    read: Tensor = operator(family, "local_attention")(
        p.query,
        p.key,
        p.value,
        p.relative_bias,
        _table(p.relative_weight),
        _table(p.relative_offset),
        _table(p.relative_value),
        p.num_heads,
        p.window,
        p.dilation,
        p.scale,
    )[0]
    return read.to(p.value.dtype)


def _table(parameter: Tensor | None) -> Tensor | None:
    """Parameters of the size of a window are handed over as contiguous float32; maps as they are."""
    return None if parameter is None else parameter.float().contiguous()
