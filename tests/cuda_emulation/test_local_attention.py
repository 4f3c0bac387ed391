# SPDX-License-Identifier: Apache-2.0
"""CUDA local attention and its gradient, its device code run on the host, against float64."""

from __future__ import annotations

import ctypes
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import vosops

from . import local_emulation

BF16, FP16 = torch.bfloat16, torch.float16
# Of the largest element. Weights and the gradients of the scores are rounded to 8 or 11 bits.
BOUND = {BF16: 6e-3, FP16: 8e-4}


def draw(
    dtype: torch.dtype = BF16,
    batch: int = 1,
    channels: int = 16,
    value_channels: int = 16,
    height: int = 9,
    width: int = 11,
    heads: int = 1,
    window: int = 5,
    relative: str = "weight value",
    layout: str = "rows",
    table_dtype: torch.dtype | None = None,
) -> dict[str, Any]:
    """Arguments of local_attention; `relative` names the relative terms, "rows" has channels innermost."""
    generator = torch.Generator().manual_seed(channels + window + height)

    def wide(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def randn(*shape: int) -> Tensor:
        return wide(*shape).to(dtype)

    def place(x: Tensor) -> Tensor:
        if layout == "columns":
            return x
        if layout == "slice":  # of a wider map
            return torch.cat([x, x], 3)[..., : x.shape[3]]
        return x.movedim(1, -1).contiguous().movedim(-1, 1)

    n2 = window * window
    options: dict[str, Any] = {
        "query": place(randn(batch, channels, height, width)),
        "key": place(randn(batch, channels, height, width)),
        "value": place(randn(batch, value_channels, height, width)),
        "num_heads": heads,
        "window": window,
    }
    tables = table_dtype or dtype
    if "weight" in relative:
        options["relative_weight"] = 0.3 * wide(heads * n2, channels // heads).to(tables)
        options["relative_offset"] = wide(heads * n2).to(tables)
    if "bias" in relative:
        options["relative_bias"] = randn(batch, heads, n2, height, width)
    if "value" in relative:
        options["relative_value"] = wide(heads, value_channels // heads, n2).to(tables)
    return options


def expected(options: dict[str, Any], grad: Tensor | None = None) -> dict[str, Tensor]:
    wide = {name: x.double() if isinstance(x, Tensor) else x for name, x in options.items()}
    leaves = {name: x.requires_grad_() for name, x in wide.items() if isinstance(x, Tensor)}
    with vosops.use_backend("reference"):
        read = vosops.local_attention(**wide)
    if grad is None:
        return {"read": read.detach()}
    read.backward(grad.double())
    return {"read": read.detach()} | {
        f"grad_{name}": x.grad for name, x in leaves.items() if x.grad is not None
    }


def verify(
    built: ctypes.CDLL, options: dict[str, Any], *, backward: bool = True, bound: float = 1, **how: int
) -> dict[str, Tensor]:
    dtype = options["query"].dtype
    grad = torch.randn(options["value"].shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    given = grad if backward else None
    got, right = local_emulation.attend(built, options, given, **how), expected(options, given)
    for name, x in right.items():
        error = (got[name].double() - x).abs().max() / x.abs().max().clamp(min=0.1)
        assert error < BOUND[dtype] * bound, (name, float(error))
    return got


SHAPES: tuple[dict[str, Any], ...] = (
    {"window": 15, "height": 17, "width": 18, "channels": 32, "value_channels": 32},
    {"window": 15, "height": 3, "width": 5, "heads": 2, "value_channels": 32},  # smaller than the window
    {"window": 7, "height": 8, "width": 8, "channels": 24, "value_channels": 8},  # one tile; odd chunks
    {"window": 3, "batch": 2, "heads": 2, "channels": 16, "value_channels": 48},
    {"window": 1, "height": 1, "width": 1, "channels": 8, "value_channels": 8},
    {"window": 5, "channels": 128, "value_channels": 264, "height": 5, "width": 9},  # three value chunks
    {"window": 11, "relative": "", "height": 10, "width": 20},
    {"window": 13, "relative": "bias value", "heads": 2, "batch": 2, "height": 6, "width": 9},
)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_shapes(built_local: ctypes.CDLL, shape: dict[str, Any], dtype: torch.dtype) -> None:
    verify(built_local, draw(dtype, **shape))


@pytest.mark.parametrize("layout", ["columns", "slice"])
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_layouts(built_local: ctypes.CDLL, layout: str, dtype: torch.dtype) -> None:
    shape = {"batch": 2, "channels": 16, "value_channels": 80, "heads": 2, "window": 3, "height": 5}
    options, rows = draw(dtype, **shape, layout=layout), draw(dtype, **shape)
    got, plain = verify(built_local, options), verify(built_local, rows)
    for name, x in got.items():
        assert torch.equal(x, plain[name]), name


def test_strides_of_bias(built_local: ctypes.CDLL) -> None:
    options = draw(FP16, relative="bias", heads=2, batch=2)
    plain = verify(built_local, options)
    bias = options["relative_bias"].float()
    options["relative_bias"] = bias.permute(4, 2, 0, 3, 1).contiguous().permute(2, 4, 1, 3, 0)
    for name, x in verify(built_local, options).items():
        assert torch.equal(x, plain[name]), name


@pytest.mark.parametrize("cut", [{"strip_rows": 2, "group": 1, "splits": 1}, {"strip_rows": 4, "group": 3}])
def test_cuts(built_local: ctypes.CDLL, cut: dict[str, int]) -> None:
    """However the work is cut, and in whatever order the threads run, and twice the same."""
    options = draw(batch=2, heads=2, height=7, width=10, window=7)
    first = verify(built_local, options, **cut)
    again = verify(built_local, options, **cut, seed=1)
    for name, x in first.items():
        assert torch.equal(x, again[name]), name


@pytest.mark.parametrize("chunks", [1, 2])
def test_value_chunks(built_local: ctypes.CDLL, chunks: int) -> None:
    verify(built_local, draw(value_channels=392, height=4, window=3), backward=False, chunks=chunks)


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_float32_tables_keep_more_than_16_bits(built_local: ctypes.CDLL, dtype: torch.dtype) -> None:
    options = draw(dtype, heads=2, relative="weight value", table_dtype=torch.float32)
    options["relative_weight"] *= 30  # rounded to 16 bits, it alone would be off by more than the bound
    for name in ("query", "key"):
        options[name] = options[name] / 4
    verify(built_local, options, backward=False, bound=0.7)


def cells(options: dict[str, Any], y: int, x: int) -> Tensor:
    """Positions whose window holds (y, x)."""
    height, width = options["query"].shape[2:]
    r = options["window"] // 2
    near_y, near_x = (torch.arange(height) - y).abs() <= r, (torch.arange(width) - x).abs() <= r
    return near_y[:, None] & near_x


@pytest.mark.parametrize("broken", [math.nan, math.inf])
@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_what_is_not_a_number_spreads_to_its_window_only(
    built_local: ctypes.CDLL, broken: float, layout: str
) -> None:
    options = draw(heads=2, channels=16, value_channels=32, height=10, width=12, layout=layout)
    y, x = 4, 9
    plain = local_emulation.attend(built_local, options)["read"]
    for name, channel, reads in (("query", 3, range(16)), ("key", 9, range(16, 32)), ("value", 20, (20,))):
        touched = options | {name: options[name].clone(memory_format=torch.preserve_format)}
        touched[name][0, channel, y, x] = broken
        got, right = local_emulation.attend(built_local, touched)["read"], expected(touched)["read"]
        near = cells(options, y, x)
        if name == "query":
            near = torch.zeros_like(near)
            near[y, x] = True
        spread = torch.zeros_like(got, dtype=torch.bool)
        spread[0, list(reads)] = near
        assert torch.equal(got[~spread], plain[~spread]), name
        assert torch.equal(got.isnan(), right.isnan()), name
        torch.testing.assert_close(got.double(), right, rtol=0.03, atol=0.03, equal_nan=True)


def test_gradients_of_what_is_not_a_number_stay_in_the_window(built_local: ctypes.CDLL) -> None:
    options = draw(height=10, width=18, window=5, relative="")
    options["query"][0, 3, 4, 9] = math.nan
    grad = torch.ones(options["value"].shape, dtype=BF16)
    got, right = local_emulation.attend(built_local, options, grad), expected(options, grad)
    for name in ("grad_query", "grad_key", "grad_value"):
        torch.testing.assert_close(got[name].double(), right[name], rtol=0.03, atol=0.03, equal_nan=True)


def test_bias_that_is_not_a_number_outside_of_the_frame(built_local: ctypes.CDLL) -> None:
    options = draw(relative="bias")
    plain = local_emulation.attend(built_local, options)
    options["relative_bias"][:, :, 0, 0] = math.nan  # the offset above the first row
    again = local_emulation.attend(built_local, options)
    assert torch.equal(plain["read"], again["read"])


def test_nothing_matches(built_local: ctypes.CDLL) -> None:
    options = draw(relative="bias value")
    options["relative_bias"][0, 0, :, 3, 4] = -math.inf
    options["relative_bias"][0, 0, 1:, 5, 4] = -math.inf
    got = verify(built_local, options)
    assert (got["read"][..., 3, 4] == 0).all()
    assert got["lse"][0, 0, 3, 4] == math.inf
    assert (got["grad_query"][..., 3, 4] == 0).all()


def test_large_scores(built_local: ctypes.CDLL) -> None:
    options = draw(FP16, channels=64, window=7, relative="weight value")
    options["query"] *= 8
    options["key"] *= 8
    verify(built_local, options, bound=3)
