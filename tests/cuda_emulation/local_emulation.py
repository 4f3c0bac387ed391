# SPDX-License-Identifier: Apache-2.0
"""The CUDA device code of local attention on CPU tensors."""

from __future__ import annotations

import ctypes
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import emulation

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
TENSORS = (
    "query", "key", "value", "relative_bias", "relative_weight", "relative_offset", "relative_value",
)  # fmt: skip


class MapView(ctypes.Structure):
    """local_harness.cpp"""

    _fields_ = (("data", ctypes.c_void_p), ("dtype", ctypes.c_int32), ("stride", ctypes.c_int64 * 4))


class LocalCall(ctypes.Structure):
    """local_harness.cpp"""

    _fields_ = emulation.fields(
        (MapView, "query key value bias grad"), (ctypes.c_int64, "bias_head_stride"),
        (ctypes.c_void_p, "weight weight_offset relative_value"),
        (ctypes.c_int32, "half batch heads height width window channels value_channels"),
        (ctypes.c_float, "scale"), (ctypes.c_int32, "strip_rows chunks group splits"),
        (ctypes.c_void_p, "read lse delta grad_query grad_key grad_value grad_bias grad_weight"),
        (ctypes.c_void_p, "grad_offset grad_relative"),
    )  # fmt: skip


def _view(x: Tensor, *dims: int) -> MapView:
    strides = (x.stride(d) if x.shape[d] > 1 else 0 for d in dims or range(4))
    return MapView(x.data_ptr(), _DTYPES[x.dtype], (ctypes.c_int64 * 4)(*strides))


def library(folder: Path) -> ctypes.CDLL:
    built = emulation.compile_harness(folder, "local_harness.cpp")
    assert built.size_of_local() == ctypes.sizeof(LocalCall)
    return built


def attend(
    built: ctypes.CDLL,
    options: dict[str, Any],
    grad: Tensor | None = None,
    *,
    strip_rows: int = 8,
    chunks: int = 1,
    group: int = 2,
    splits: int = 2,
    seed: int = 0,
) -> dict[str, Tensor]:
    """read and lse, and with `grad` (of the read) every operand's gradient; NaN where nothing was written.

    options: of vosops.local_attention. The rest is how the work is cut: rows of a strip, value chunks of a
    block, planes that the backward pass takes at once, shares of a table's gradient.
    """
    p = LocalCall()
    query, value, h = options["query"], options["value"], options["num_heads"]
    p.half, p.heads, p.window = query.dtype == torch.float16, h, options["window"]
    (p.batch, channels, p.height, p.width), value_channels = query.shape, value.shape[1]
    p.channels, p.value_channels = channels // h, value_channels // h
    p.scale = p.channels**-0.5
    p.strip_rows, p.chunks, p.group, p.splits = strip_rows, chunks, group, splits
    p.query, p.key, p.value = (_view(options[name]) for name in TENSORS[:3])
    if "relative_bias" in options:
        bias = options["relative_bias"]
        p.bias, p.bias_head_stride = _view(bias, 0, 2, 3, 4), bias.stride(1)
    tables = {name: options[name].float().contiguous() for name in TENSORS[4:] if name in options}
    for field, name in (
        ("weight", "relative_weight"),
        ("weight_offset", "relative_offset"),
        ("relative_value", "relative_value"),
    ):
        setattr(p, field, tables[name].data_ptr() if name in tables else None)
    out = {
        "read": torch.full((p.batch, value_channels, p.height, p.width), math.nan),
        "lse": torch.full((p.batch, h, p.height, p.width), math.nan),
    }
    p.read, p.lse = out["read"].data_ptr(), out["lse"].data_ptr()
    built.emulate_local(ctypes.byref(p), 0, seed)
    if grad is None:
        return out
    grad = grad.float().contiguous()
    delta = (grad * out["read"]).unflatten(1, (h, -1)).sum(2).contiguous()
    p.grad, p.delta = _view(grad), delta.data_ptr()
    for name in TENSORS:
        if name in options:
            out["grad_" + name] = torch.full(options[name].shape, math.nan)
            field = "grad_" + name.removeprefix("relative_")
            field = {"grad_value": "grad_relative"}.get(field, field) if "relative" in name else field
            setattr(p, field, out["grad_" + name].data_ptr())
    built.emulate_local(ctypes.byref(p), 1, seed)
    return out
