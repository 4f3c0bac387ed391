# SPDX-License-Identifier: Apache-2.0
"""Values of attention through Triton against the float64 reference."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import vosops
from vosops.ops.memory_read.limits import LARGEST_TOP_K

from ..ops.helpers import relative_error
from ..ops.test_attention import FORMS, attend64, changed
from ..ops.test_attention import problem as cpu_problem
from .helpers import Arguments, on

pytestmark = pytest.mark.parametrize("backend", ["triton"], indirect=True)

# float32 products are made in three tf32 passes, good to about 1e-6 each.
TOLERANCE = 2e-5
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def spare_the_interpreter(device: torch.device, when: bool) -> None:
    """Skips what Triton's interpreter cannot run, or not in little time."""
    if device.type == "cpu" and when:
        pytest.skip("the interpreter has no bfloat16 and takes 30 ms for a query of a head with top_k")


def problem(device: torch.device, top_k: int | None = None, **options: Any) -> Arguments:
    """`ops.test_attention.problem` with sizes that no block divides; small where the interpreter runs it."""
    small = {
        "queries": 2 if top_k else 19,
        "memory": 45,
        "channels": 12,
        "value_channels": 10,
        "num_heads": 2,
    }
    large = {"queries": 333, "memory": 1001, "channels": 160, "value_channels": 90, "num_heads": 5}
    return on(device, cpu_problem(**{**(small if device.type == "cpu" else large), **options}))


def tolerance(dtype: torch.dtype) -> float:
    """The result is rounded once; the dense read also rounds its weights."""
    return TOLERANCE if dtype == torch.float32 else 2 * torch.finfo(dtype).eps


def check(arguments: Arguments, allowed: float, **options: Any) -> None:
    """Read and usage against the float64 reference on the same device."""
    read, usage = vosops.attention(**arguments, **options, return_usage=True)
    expected, expected_usage = attend64(arguments, **options, return_usage=True)
    assert read.shape == expected.shape
    assert read.dtype == torch.promote_types(arguments["query"].dtype, arguments["value"].dtype)
    assert relative_error(read, expected) < allowed
    assert relative_error(usage, expected_usage) < 5 * TOLERANCE


@pytest.mark.interpreter
@pytest.mark.parametrize("top_k", [None, 1, 7, 128])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_against_the_reference(
    form: str, dtype: torch.dtype, top_k: int | None, backend: str, device: torch.device
) -> None:
    wanted = (None,) if dtype == torch.float16 or form == "identity" else (None, 7)
    spare_the_interpreter(device, dtype == torch.bfloat16 or top_k not in wanted)
    arguments = problem(device, top_k, **FORMS[form], dtype=dtype)
    check(arguments, tolerance(dtype), top_k=top_k)


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("channels", "value_channels", "num_heads"),
    [(1, 1, 1), (8, 8, 8), (33, 34, 1), (128, 1040, 1), (256, 256, 8), (384, 96, 3)],
)
@pytest.mark.parametrize(("queries", "memory"), [(1, 1), (1, 61), (64, 64), (129, 65), (130, 7)])
def test_any_size(
    queries: int,
    memory: int,
    channels: int,
    value_channels: int,
    num_heads: int,
    backend: str,
    device: torch.device,
) -> None:
    spare_the_interpreter(device, channels > 33 or num_heads > 1 or queries > 1)
    sizes = {"channels": channels, "value_channels": value_channels, "num_heads": num_heads}
    arguments = problem(device, queries=queries, memory=memory, **sizes)
    for top_k in (None, 5):
        check(arguments, TOLERANCE, top_k=top_k)


@pytest.mark.interpreter
@pytest.mark.parametrize("top_k", [None, 9])
def test_several_values_are_read_with_one_match(
    top_k: int | None, backend: str, device: torch.device
) -> None:
    arguments = problem(device, top_k, gate=1)
    heads = arguments["num_heads"]
    wide = torch.randn(2, arguments["key"].shape[1], 21 * heads).to(device)
    both = {**arguments, "value": (arguments["value"], wide)}
    reads = vosops.attention(**both, top_k=top_k)
    assert isinstance(reads, tuple)
    for read, value in zip(reads, both["value"], strict=True):
        assert torch.equal(read, vosops.attention(**{**arguments, "value": value}, top_k=top_k))
        expected = attend64({**arguments, "value": value}, top_k=top_k)
        assert relative_error(read, expected) < TOLERANCE


@pytest.mark.interpreter
@pytest.mark.parametrize("top_k", [None, 6])
@pytest.mark.parametrize("form", ["plain", "everything"])
@pytest.mark.parametrize("scale", [1.7, 0.0, -0.7])
def test_any_scale(scale: float, form: str, top_k: int | None, backend: str, device: torch.device) -> None:
    """A positive one is left to the exponents; with another one the larger product is not the better."""
    spare_the_interpreter(device, top_k is not None and (scale != -0.7 or form != "plain"))
    check(problem(device, top_k, **FORMS[form]), TOLERANCE, top_k=top_k, scale=scale)


@pytest.mark.interpreter
@pytest.mark.parametrize("top_k", [None, 9])
@pytest.mark.parametrize("layout", ["sequence_first", "channel_major", "strided"])
def test_strides(layout: str, top_k: int | None, backend: str, device: torch.device) -> None:
    spare_the_interpreter(device, top_k is not None and layout != "strided")
    arguments = problem(device, top_k, **FORMS["everything"])
    change = {
        "sequence_first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        "channel_major": lambda x: x.mT.contiguous().mT,
        "strided": lambda x: torch.stack((x, x + 7), -1).flatten(-2)[..., ::2],
    }[layout]
    moved = changed(arguments, change)
    assert not moved["key"].is_contiguous()
    expected = vosops.attention(**arguments, top_k=top_k)
    torch.testing.assert_close(vosops.attention(**moved, top_k=top_k), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.interpreter
@pytest.mark.parametrize("top_k", [None, 9])
@pytest.mark.parametrize("stored", DTYPES[1:])
def test_mixed_dtypes(stored: torch.dtype, top_k: int | None, backend: str, device: torch.device) -> None:
    """A memory in low precision read with float32 queries gives float32, exact for what is stored."""
    spare_the_interpreter(device, stored == torch.bfloat16)
    arguments = problem(device, top_k, **FORMS["everything"])
    mixed = {**changed(arguments, lambda x: x.to(stored)), "query": arguments["query"]}
    check(mixed, TOLERANCE, top_k=top_k)


@pytest.mark.interpreter
def test_the_lowest_index_wins_ties(backend: str, device: torch.device) -> None:
    key = torch.ones(1, 50, 4, device=device)
    key[:, 20:] = 2
    value = torch.arange(50.0, device=device)[None, :, None].expand(1, 50, 2)
    read = vosops.attention(torch.ones(1, 5, 4, device=device), key, value, num_heads=2, top_k=3)
    torch.testing.assert_close(read, torch.full_like(read, 21.0))


@pytest.mark.interpreter
@pytest.mark.parametrize("top_k", [None, 9])
def test_nan_stays_where_it_is(top_k: int | None, backend: str, device: torch.device) -> None:
    arguments = problem(device, top_k)
    heads = arguments["num_heads"]
    clean = vosops.attention(**arguments, top_k=top_k).unflatten(-1, (heads, -1))
    query = arguments["query"].clone()
    query[1, 1, 7] = torch.nan
    head = 7 // (query.shape[2] // heads)
    read = vosops.attention(**{**arguments, "query": query}, top_k=top_k).unflatten(-1, (heads, -1))
    assert read[1, 1, head].isnan().all()
    read[1, 1, head] = clean[1, 1, head]
    assert torch.equal(read, clean)
    key = arguments["key"].clone()
    key[0, 4, -1] = torch.nan
    read = vosops.attention(**{**arguments, "key": key}, top_k=top_k).unflatten(-1, (heads, -1))
    assert read[0, :, -1].isnan().all()
    read[0, :, -1] = clean[0, :, -1]
    assert torch.equal(read, clean)


@pytest.mark.interpreter
@pytest.mark.parametrize("top_k", [None, 2])
def test_an_infinite_key_matches_alone(top_k: int | None, backend: str, device: torch.device) -> None:
    """-inf never matches; a query whose scores are all -inf reads zero."""
    query = torch.ones(1, 1, 1, device=device)
    key = torch.tensor([[[1.0], [-math.inf], [2.0]]], device=device)
    value = torch.tensor([[[1.0], [10.0], [4.0]]], device=device)
    weights = torch.tensor([1.0, 2.0]).softmax(0)
    read = vosops.attention(query, key, value, num_heads=1, top_k=top_k)
    torch.testing.assert_close(read.flatten()[0].cpu(), weights[0] + 4 * weights[1])
    read = vosops.attention(query, torch.full_like(key, -math.inf), value, num_heads=1, top_k=top_k)
    assert float(read) == 0


@pytest.mark.interpreter
@pytest.mark.parametrize("level", [-300.0, 200.0])
@pytest.mark.parametrize("top_k", [None, 9])
def test_scores_far_from_zero(level: float, top_k: int | None, backend: str, device: torch.device) -> None:
    """A constant in all scores changes nothing, though exp of them over- or underflows."""
    arguments = problem(device, top_k, num_heads=1, channels=8, batch=1)
    expected = vosops.attention(**arguments, top_k=top_k, scale=1.0)
    query, key = arguments["query"], arguments["key"]
    query = torch.cat((query, torch.ones_like(query[..., :1])), 2)
    key = torch.cat((key, torch.full_like(key[..., :1], level)), 2)
    read = vosops.attention(**{**arguments, "query": query, "key": key}, top_k=top_k, scale=1.0)
    torch.testing.assert_close(read, expected, rtol=0, atol=3e-4)  # float32 near 300 resolves 3e-5


@pytest.mark.interpreter
@pytest.mark.parametrize("top_k", [None, 9])
@pytest.mark.parametrize("empty", ["batch", "queries", "value_channels"])
def test_empty_results(empty: str, top_k: int | None, backend: str, device: torch.device) -> None:
    arguments = problem(device, top_k, **{empty: 0})
    leaves = changed(arguments, lambda x: x.clone().requires_grad_())
    read, usage = vosops.attention(**leaves, top_k=top_k, return_usage=True)
    assert read.shape == (*arguments["query"].shape[:2], arguments["value"].shape[2])
    assert usage.shape == arguments["key"].shape[:2]
    read.sum().backward()
    for name in ("query", "key", "value"):
        assert (leaves[name].grad == 0).all()


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("top_k", [None, 25])
def test_one_query_against_a_large_memory(
    dtype: torch.dtype, top_k: int | None, backend: str, device: torch.device
) -> None:
    """Few queries: the memory is split among programs and their parts merged."""
    spare_the_interpreter(device, dtype == torch.bfloat16)
    memory = 100_000 if device.type == "cuda" else 2_000
    arguments = problem(device, batch=1, queries=1, memory=memory, channels=32, dtype=dtype, num_heads=2)
    read = vosops.attention(**arguments, top_k=top_k)
    assert relative_error(read, attend64(arguments, top_k=top_k)) < 2 * tolerance(dtype)


@pytest.mark.interpreter
@pytest.mark.parametrize("top_k", [None, 5])
def test_results_repeat_bit_by_bit(top_k: int | None, backend: str, device: torch.device) -> None:
    arguments = problem(device, top_k, **FORMS["everything"])
    first, first_usage = vosops.attention(**arguments, top_k=top_k, return_usage=True)
    for _ in range(1 if device.type == "cpu" else 20):
        read, usage = vosops.attention(**arguments, top_k=top_k, return_usage=True)
        assert torch.equal(read, first)
        assert torch.equal(usage, first_usage)


@pytest.mark.interpreter
def test_more_than_the_memory_holds_is_all_of_it(backend: str, device: torch.device) -> None:
    arguments = problem(device, queries=3)
    assert torch.equal(vosops.attention(**arguments, top_k=5000), vosops.attention(**arguments))


@pytest.mark.interpreter
def test_a_refused_call_says_why(backend: str, device: torch.device) -> None:
    arguments = problem(device, memory=200)
    with pytest.raises(vosops.BackendError, match=f"it keeps at most {LARGEST_TOP_K}"):
        vosops.attention(**arguments, top_k=LARGEST_TOP_K + 1)
    with pytest.raises(vosops.BackendError, match="C/h = 129 channels a head, it serves at most 128"):
        vosops.attention(**problem(device, channels=258, num_heads=2))
    with pytest.raises(vosops.BackendError, match="float64"):
        vosops.attention(**changed(arguments, Tensor.double))
