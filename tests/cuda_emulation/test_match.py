# SPDX-License-Identifier: Apache-2.0
"""The CUDA top-k match, its device code run on the host, against float64."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import vosops
from tests.ops.helpers import check_match
from vosops.ops.memory_read import reference
from vosops.ops.memory_read.problem import Scores

from . import emulation

BF16, FP16 = torch.bfloat16, torch.float16
Change = Callable[[dict[str, Tensor]], None]


def draw(
    dtype: torch.dtype = BF16,
    batch: int = 1,
    channels: int = 64,
    query: tuple[int, ...] = (5, 13),
    memory: tuple[int, ...] = (2, 10, 13),
    layout: str = "rows",
    extras: str = "",
    amplitude: float = 1.0,
) -> dict[str, Tensor]:
    """Arguments of emulation.match; `extras` names the optional ones."""
    generator = torch.Generator().manual_seed(len(extras) + channels + batch)
    keys = amplitude * torch.randn(batch, channels, *memory, generator=generator)
    keys = keys.to(dtype)
    if layout.startswith("rows"):
        keys = keys.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout.endswith("slice"):  # of a longer memory: dimensions that do not merge
        room = torch.cat([keys.movedim(1, -1), keys.movedim(1, -1)], -2) if layout == "rows slice" else None
        keys = torch.cat([keys, keys], -1) if room is None else room.movedim(-1, 1)
        keys = keys[..., : memory[-1]]
    out = {"query_key": (amplitude * torch.randn(batch, channels, *query, generator=generator)).to(dtype)}
    out["memory_key"] = keys
    count = math.prod(memory)
    optional = {
        "shrinkage": lambda: torch.rand(batch, 1, *memory, generator=generator) + 0.5,
        "selection": lambda: torch.rand(batch, channels, *query, generator=generator).to(dtype),
        "memory_mask": lambda: torch.rand(batch, *memory, generator=generator) > 0.3,
        "centers": lambda: 10 * torch.rand(batch, count, 2, generator=generator),
        "precision": lambda: torch.rand(batch, count, generator=generator) * 0.2 + 0.01,
    }
    return out | {name: optional[name]() for name in extras.split()}


def verify(
    built: ctypes.CDLL,
    arguments: dict[str, Tensor],
    top_k: int,
    *,
    band: float = 2e-5,
    l2: bool = True,
    **how: int,
) -> tuple[Tensor, Tensor, str]:
    indices, weights, run = emulation.match(built, **arguments, top_k=top_k, l2=l2, **how)
    wide = {name: x.double() if x.is_floating_point() else x for name, x in arguments.items()}
    optional = [wide.get(name) for name in ("shrinkage", "selection", "memory_mask")]
    scale = arguments["query_key"].shape[1] ** -0.5
    p = Scores(
        wide["query_key"], wide["memory_key"], *optional, "l2" if l2 else "dot", scale,
        wide.get("centers"), wide.get("precision"),
    )  # fmt: skip
    scores = reference.scores(p)
    poisoned = scores.isnan().any(-1)
    assert weights[poisoned].isnan().all()
    # Rows that NaN touched are done with; the rest must be as if it were not there.
    scores = torch.where(poisoned[..., None], -math.inf, scores)
    indices = torch.where(poisoned[..., None], -1, indices)
    weights = torch.where(poisoned[..., None], 0, weights)
    shape = tuple(arguments["query_key"].shape[2:])
    check_match(vosops.Match(indices, weights, shape), scores, top_k, band)
    best = scores.gather(-1, indices.clamp(min=0)).masked_fill(indices < 0, -math.inf)
    assert (best[..., 1:] <= best[..., :-1] + band).all(), "not best first"
    return indices, weights, run


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("extras", ["", "shrinkage", "selection", "shrinkage selection"])
@pytest.mark.parametrize(("splits", "sample"), [(1, 0), (3, 3)])
def test_scores(built: ctypes.CDLL, dtype: torch.dtype, extras: str, splits: int, sample: int) -> None:
    verify(built, draw(dtype, extras=extras), 7, splits=splits, sample=sample)


def test_dot(built: ctypes.CDLL) -> None:
    verify(built, draw(), 30, l2=False, splits=2, sample=2)


@pytest.mark.parametrize(
    "extras", ["memory_mask centers precision", "selection memory_mask centers precision"]
)
def test_mask_and_prior(built: ctypes.CDLL, extras: str) -> None:
    verify(built, draw(FP16, batch=2, extras=extras), 9, splits=2)


@pytest.mark.parametrize(
    ("layout", "memory", "run"),
    [
        ("rows", (2, 10, 13), "channels"),
        ("rows slice", (2, 10, 13), "channels"),
        ("columns", (2, 12, 12), "positions8"),
        ("columns", (2, 10, 13), "positions4"),
        ("columns", (1, 11, 13), "scattered"),
        ("slice", (2, 10, 13), "scattered"),
    ],
)
@pytest.mark.parametrize("extras", ["", "selection"])
def test_layouts(built: ctypes.CDLL, layout: str, memory: tuple[int, ...], run: str, extras: str) -> None:
    assert verify(built, draw(memory=memory, layout=layout, extras=extras), 7)[2] == run


@pytest.mark.parametrize("channels", [8, 24, 72, 128])
def test_channels(built: ctypes.CDLL, channels: int) -> None:
    verify(built, draw(channels=channels, extras="selection"), 5)
    verify(built, draw(channels=channels, layout="columns", memory=(1, 12, 12)), 5)


@pytest.mark.parametrize("top_k", [1, 48, 128, 1000])
def test_top_k(built: ctypes.CDLL, top_k: int) -> None:
    memory = (1, 7, 13) if top_k > 128 else (3, 10, 13)
    verify(built, draw(query=(3, 7), memory=memory), top_k, splits=2, sample=2 if top_k <= 48 else 0)


def test_one_position_and_three_batch_entries(built: ctypes.CDLL) -> None:
    verify(built, draw(batch=3, query=(2, 3, 4), memory=(1, 1, 1)), 3)


@pytest.mark.parametrize("seed", range(3))
def test_any_order_of_the_threads(built: ctypes.CDLL, seed: int) -> None:
    arguments = draw(FP16, query=(9, 11), extras="selection memory_mask")
    first = verify(built, arguments, 30, splits=2, sample=2)
    again = verify(built, arguments, 30, splits=2, sample=2, seed=seed + 1)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])


@pytest.mark.parametrize("top_k", [9, 100])
@pytest.mark.parametrize("sample", [0, 2])
def test_ties_go_to_the_lowest_index(built: ctypes.CDLL, top_k: int, sample: int) -> None:
    arguments = draw(memory=(2, 10, 13))
    for value in (0.0, 1.0):
        arguments["memory_key"].fill_(value)
        sampled = sample if top_k <= 48 else 0
        indices = verify(built, arguments, top_k, splits=3, sample=sampled)[0]
        assert (indices == torch.arange(top_k)).all()


@pytest.mark.parametrize(("top_k", "sample"), [(30, 0), (30, 3), (20, 0), (100, 0), (128, 0)])
def test_scores_that_only_rise(built: ctypes.CDLL, top_k: int, sample: int) -> None:
    arguments = draw(memory=(2, 20, 13))
    keys = arguments["memory_key"]
    arguments["query_key"].fill_(1)
    keys.copy_(torch.linspace(0, 10, keys[0, 0].numel()).view(keys.shape[2:]).expand_as(keys))
    verify(built, arguments, top_k, l2=False, sample=sample, band=3e-4)


def nan_key(x: dict[str, Tensor]) -> None:
    x["memory_key"][0, 3, 0, 5, 5] = math.nan


def nan_query(x: dict[str, Tensor]) -> None:
    x["query_key"][0, 3, 2, 2] = math.nan


def masked_nan(x: dict[str, Tensor]) -> None:
    nan_key(x)
    x["memory_mask"][0, 0, 5, 5] = False


def infinite_shrinkage(x: dict[str, Tensor]) -> None:
    x["shrinkage"][0, 0, 0, :5] = math.inf


def nothing_matches(x: dict[str, Tensor]) -> None:
    x["memory_mask"].fill_(False)


def few_match(x: dict[str, Tensor]) -> None:
    nothing_matches(x)
    x["memory_mask"][0, 1, 3, ::4] = True


@pytest.mark.parametrize(
    "change", [nan_key, nan_query, masked_nan, infinite_shrinkage, nothing_matches, few_match]
)
@pytest.mark.parametrize("extras", ["shrinkage memory_mask", "shrinkage memory_mask selection"])
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_values_that_are_not_numbers(
    built: ctypes.CDLL, change: Change, extras: str, dtype: torch.dtype
) -> None:
    arguments = draw(dtype, extras=extras)
    change(arguments)
    verify(built, arguments, 7, splits=2, sample=2)


@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_float16_keys_whose_squares_overflow(built: ctypes.CDLL, layout: str) -> None:
    arguments = draw(FP16, layout=layout, extras="shrinkage selection centers precision")
    keys = arguments["memory_key"]
    keys[0, 7, :, :, 3] = 300
    keys[0, 9, :, :, 5] = 1000
    keys[0, 9, 0, 0, 3] = 60000
    arguments["query_key"][0, 7, 2] = 301  # the wide keys are this row's best
    verify(built, arguments, 7, splits=2, sample=2, band=5e-3)


def test_large_keys(built: ctypes.CDLL) -> None:
    verify(built, draw(FP16, extras="shrinkage selection", amplitude=50), 7, band=0.02)
