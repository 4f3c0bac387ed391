# SPDX-License-Identifier: Apache-2.0
"""The CUDA device code compiled for the host (cuda_emulation.h), behind functions on CPU tensors."""

from __future__ import annotations

import ctypes
import math
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

HERE = Path(__file__).parent
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.bool: 0}


class View(ctypes.Structure):
    """harness.cpp"""

    _fields_ = (
        ("data", ctypes.c_void_p), ("dtype", ctypes.c_int32), ("batch_stride", ctypes.c_int64),
        ("object_stride", ctypes.c_int64), ("channel_stride", ctypes.c_int64), ("dims", ctypes.c_int32),
        ("size", ctypes.c_int64 * 6), ("stride", ctypes.c_int64 * 6),
    )  # fmt: skip


def fields(*groups: tuple[object, str]) -> tuple[tuple[str, object], ...]:
    return tuple((name, kind) for kind, names in groups for name in names.split())


class MatchCall(ctypes.Structure):
    """harness.cpp"""

    _fields_ = fields(
        (View, "query key shrinkage selection mask"), (ctypes.c_void_p, "centers precision"),
        (ctypes.c_int32, "batch channels queries memory grid_width l2"), (ctypes.c_float, "scale"),
        (ctypes.c_int32, "k capacity"), (ctypes.c_void_p, "indices weights"),
    )  # fmt: skip


class GatherCall(ctypes.Structure):
    """harness.cpp"""

    _fields_ = fields(
        (View, "value"), (ctypes.c_int32, "batch objects channels queries memory k"),
        (ctypes.c_void_p, "indices weights read"),
    )  # fmt: skip


def _view(x: Tensor | None, first: int) -> View:
    """`first` leading dimensions: batch [, object [, channel]]; the rest are positions."""
    out = View()
    if x is None:
        return out
    out.data, out.dtype, d = x.data_ptr(), _DTYPES[x.dtype], 0
    out.batch_stride = x.stride(0) if x.shape[0] > 1 else 0
    out.channel_stride = x.stride(first - 1) if first > 1 else 0
    out.object_stride = x.stride(1) if first > 2 else 0
    for size, stride in zip(x.shape[first:], x.stride()[first:], strict=True):
        if size == 1:
            continue
        if d and out.stride[d - 1] == size * stride:  # neighbours that are contiguous with one another
            out.size[d - 1] *= size
            out.stride[d - 1] = stride
            continue
        out.size[d], out.stride[d] = size, stride
        d += 1
    out.dims = max(d, 1)
    out.size[0] = out.size[0] or 1
    return out


def compile_harness(folder: Path, source: str) -> ctypes.CDLL:
    """`source`, compiled into `folder`; skips where the CUDA headers are missing."""
    headers = next(
        (path for path in ("/usr/local/cuda/include", "/usr/include") if Path(path, "cuda_fp16.h").exists()),
        None,
    )
    compiler = shutil.which("g++")
    if not headers or not compiler:
        pytest.skip("needs g++ and the CUDA toolkit's headers (cuda_fp16.h)")
    target = folder / f"lib{Path(source).stem}.so"
    command = [
        compiler, "-std=c++20", "-O2", "-fno-strict-aliasing", "-U_FORTIFY_SOURCE", "-Wall", "-Wextra",
        "-Werror", "-Wno-unknown-pragmas", "-shared", "-fPIC", "-isystem", headers, "-I", str(HERE),
        "-I", str(HERE.parents[1] / "csrc"), str(HERE / source), "-o", str(target),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(target))


def library(folder: Path) -> ctypes.CDLL:
    built = compile_harness(folder, "harness.cpp")
    assert built.size_of_match() == ctypes.sizeof(MatchCall)
    assert built.size_of_gather() == ctypes.sizeof(GatherCall)
    return built


def match(
    built: ctypes.CDLL,
    query_key: Tensor,
    memory_key: Tensor,
    top_k: int,
    *,
    l2: bool = True,
    shrinkage: Tensor | None = None,
    selection: Tensor | None = None,
    memory_mask: Tensor | None = None,
    centers: Tensor | None = None,
    precision: Tensor | None = None,
    splits: int = 1,
    sample: int = 0,
    seed: int = 0,
) -> tuple[Tensor, Tensor, str]:
    """Indices, weights, and how the keys were loaded. `sample`: tiles that the first threshold comes from."""
    p = MatchCall()
    p.query, p.key = _view(query_key, 2), _view(memory_key, 2)
    p.shrinkage, p.selection, p.mask = (
        _view(shrinkage, 2),
        _view(selection, 2),
        _view(memory_mask, 1),
    )
    p.centers = None if centers is None else centers.data_ptr()
    p.precision = None if precision is None else precision.data_ptr()
    p.batch, p.channels = query_key.shape[:2]
    p.queries, p.memory = math.prod(query_key.shape[2:]), math.prod(memory_key.shape[2:])
    p.grid_width, p.l2, p.scale = query_key.shape[-1], l2, p.channels**-0.5
    p.k = min(top_k, p.memory)
    p.capacity = min(max(p.k + 64, 112), 192)
    indices = torch.full((p.batch, p.queries, p.k), -7)
    weights = torch.full((p.batch, p.queries, p.k), -7.0)
    p.indices, p.weights = indices.data_ptr(), weights.data_ptr()
    run = built.emulate_match(ctypes.byref(p), splits, sample, seed)
    return indices, weights, ("channels", "positions8", "positions4", "scattered")[run]


def gather(
    built: ctypes.CDLL, indices: Tensor, weights: Tensor, value: Tensor, grad: Tensor, *, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, bool]:
    """Read, gradients of weights and values, and whether the channels were read in runs."""
    p = GatherCall()
    p.value = _view(value, 3)
    p.batch, p.objects, p.channels = value.shape[:3]
    p.queries, p.k, p.memory = indices.shape[1], indices.shape[2], math.prod(value.shape[3:])
    p.indices, p.weights = indices.data_ptr(), weights.data_ptr()
    read, grad_weights = torch.full_like(grad, math.nan), torch.full_like(weights, math.nan)
    grad_value = torch.full((*value.shape[:3], p.memory), math.nan)
    p.read = read.data_ptr()
    runs = built.emulate_gather(ctypes.byref(p), seed)
    pointers = (ctypes.c_void_p(x.data_ptr()) for x in (grad, grad_weights, grad_value))
    built.emulate_gather_backward(ctypes.byref(p), *pointers, seed)
    return read, grad_weights, grad_value, bool(runs)
