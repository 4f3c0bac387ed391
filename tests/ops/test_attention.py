# SPDX-License-Identifier: Apache-2.0
"""Values of attention on the compiled CPU backend against the float64 reference."""

from __future__ import annotations

import ctypes
import math

import pytest
import torch
from torch import Tensor

import vosops

from .helpers import relative_error
from .test_memory_read_cost import MIB, peak_extra, resident

pytestmark = pytest.mark.usefixtures("cpu_backend")

# Float32 sums of a few dozen products are good to about 1e-6; measured errors stay below a third of this.
TOLERANCE = 1e-5
FORMS = {
    "plain": {},
    "identity": {"identity": True},
    "gate": {"gate": 1},
    "everything": {"identity": True, "gate": "heads", "distance": True},
}


def problem(
    *,
    batch: int = 2,
    queries: int = 77,
    memory: int = 131,
    channels: int = 24,
    value_channels: int = 20,
    num_heads: int = 4,
    identity: bool = False,
    gate: int | str | None = None,
    distance: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> dict:
    """Arguments of attention."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    arguments = {
        "query": randn(batch, queries, channels),
        "key": randn(batch, memory, channels),
        "value": randn(batch, memory, value_channels),
        "num_heads": num_heads,
    }
    if identity:
        arguments["identity"] = randn(batch, memory, value_channels)
    if gate is not None:
        arguments["identity_gate"] = 1 + randn(batch, memory, num_heads if gate == "heads" else gate).tanh()
    if distance:
        arguments["distance"] = True
    return arguments


def changed(arguments: dict, change) -> dict:
    """The arguments with `change` applied to every tensor."""
    return {name: change(x) if isinstance(x, Tensor) else x for name, x in arguments.items()}


def attend64(arguments: dict, **options: object):
    with vosops.use_backend("reference"):
        return vosops.attention(**changed(arguments, Tensor.double), **options)


@pytest.mark.parametrize("top_k", [None, 1, 9, 500])
@pytest.mark.parametrize("form", FORMS)
def test_against_the_reference(form: str, top_k: int | None, isa: str) -> None:
    arguments = problem(**FORMS[form])
    read, usage = vosops.attention(**arguments, top_k=top_k, return_usage=True)
    expected, expected_usage = attend64(arguments, top_k=top_k, return_usage=True)
    assert read.shape == (2, 77, 20)
    assert usage.shape == (2, 131)
    assert relative_error(read, expected) < TOLERANCE
    assert relative_error(usage, expected_usage) < TOLERANCE
    assert abs(float(usage.sum()) - 2 * 77 * 4) < 1e-2, "the weights of every query and head sum to one"


@pytest.mark.parametrize(
    ("channels", "value_channels", "num_heads"), [(1, 1, 1), (8, 8, 8), (32, 34, 1), (64, 96, 2)]
)
@pytest.mark.parametrize(("queries", "memory"), [(1, 1), (1, 61), (64, 60), (130, 7)])
def test_any_size(
    queries: int, memory: int, channels: int, value_channels: int, num_heads: int, isa: str
) -> None:
    sizes = {"channels": channels, "value_channels": value_channels, "num_heads": num_heads}
    arguments = problem(batch=1, queries=queries, memory=memory, **sizes)
    for top_k in (None, 5):
        read = vosops.attention(**arguments, top_k=top_k)
        assert relative_error(read, attend64(arguments, top_k=top_k)) < TOLERANCE


@pytest.mark.parametrize("top_k", [None, 9])
def test_several_values_are_read_with_one_match(top_k: int | None, isa: str) -> None:
    arguments = problem(num_heads=2, gate=1)
    wide = torch.randn(2, 131, 102)
    both = {**arguments, "value": (arguments["value"], wide)}
    reads, usage = vosops.attention(**both, top_k=top_k, return_usage=True)
    assert isinstance(reads, tuple)
    assert relative_error(usage, attend64(arguments, top_k=top_k, return_usage=True)[1]) < TOLERANCE
    for read, value in zip(reads, both["value"], strict=True):
        alone = vosops.attention(**{**arguments, "value": value}, top_k=top_k)
        assert torch.equal(read, alone)


def test_scale_and_its_default(isa: str) -> None:
    arguments = problem()
    assert torch.equal(vosops.attention(**arguments), vosops.attention(**arguments, scale=(24 / 4) ** -0.5))
    read = vosops.attention(**arguments, scale=0.9)
    assert relative_error(read, attend64(arguments, scale=0.9)) < TOLERANCE


@pytest.mark.parametrize("top_k", [None, 9])
@pytest.mark.parametrize("layout", ["sequence_first", "channel_major", "strided"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides(layout: str, top_k: int | None, dtype: torch.dtype, isa: str) -> None:
    arguments = problem(**FORMS["everything"], dtype=dtype)
    expected = vosops.attention(**arguments, top_k=top_k)
    change = {
        "sequence_first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        "channel_major": lambda x: x.mT.contiguous().mT,
        "strided": lambda x: torch.stack((x, x + 7), -1).flatten(-2)[..., ::2],
    }[layout]
    moved = changed(arguments, change)
    assert not moved["key"].is_contiguous()
    torch.testing.assert_close(vosops.attention(**moved, top_k=top_k), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("top_k", [None, 9])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype: torch.dtype, top_k: int | None, isa: str) -> None:
    """Inputs are exact, sums are float32: what is left is one rounding of the result."""
    arguments = problem(**FORMS["everything"], dtype=dtype)
    read = vosops.attention(**arguments, top_k=top_k)
    assert read.dtype == dtype
    assert relative_error(read, attend64(arguments, top_k=top_k)) < torch.finfo(dtype).eps
    mixed = {**arguments, "query": arguments["query"].float()}
    wide = vosops.attention(**mixed, top_k=top_k)
    assert wide.dtype == torch.float32
    assert relative_error(wide, attend64(mixed, top_k=top_k)) < TOLERANCE


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_the_lowest_index_wins_ties(backend: str, isa: str) -> None:
    key = torch.ones(1, 50, 4)
    key[:, 20:] = 2
    value = torch.arange(50.0)[None, :, None].expand(1, 50, 2)
    with vosops.use_backend(backend):
        read = vosops.attention(torch.ones(1, 5, 4), key, value, num_heads=2, top_k=3)
    assert torch.equal(read, torch.full((1, 5, 2), 21.0))


@pytest.mark.parametrize("top_k", [None, 9])
def test_nan_stays_where_it_is(top_k: int | None, isa: str) -> None:
    arguments = problem()
    clean = vosops.attention(**arguments, top_k=top_k)
    heads = clean.unflatten(-1, (4, 5))
    query = arguments["query"].clone()
    query[1, 3, 7] = torch.nan  # head 1
    read = vosops.attention(**{**arguments, "query": query}, top_k=top_k).unflatten(-1, (4, 5))
    touched = torch.zeros(2, 77, 4, 1, dtype=torch.bool)
    touched[1, 3, 1] = True
    assert read[1, 3, 1].isnan().all()
    assert torch.equal(read.masked_fill(touched, 0), heads.masked_fill(touched, 0))
    key = arguments["key"].clone()
    key[0, 4, 23] = torch.nan  # head 3
    read = vosops.attention(**{**arguments, "key": key}, top_k=top_k).unflatten(-1, (4, 5))
    assert read[0, :, 3].isnan().all()
    read[0, :, 3] = heads[0, :, 3]
    assert torch.equal(read, heads)


@pytest.mark.parametrize("level", [-300.0, 200.0])
@pytest.mark.parametrize("top_k", [None, 9])
def test_scores_far_from_zero(level: float, top_k: int | None, isa: str) -> None:
    """A constant in all scores changes nothing, though exp of them over- or underflows."""
    arguments = problem(num_heads=1, channels=8)
    expected = vosops.attention(**arguments, top_k=top_k, scale=1.0)
    query = torch.cat((arguments["query"], torch.ones(2, 77, 1)), 2)
    key = torch.cat((arguments["key"], torch.full((2, 131, 1), level)), 2)
    read = vosops.attention(**{**arguments, "query": query, "key": key}, top_k=top_k, scale=1.0)
    torch.testing.assert_close(read, expected, rtol=0, atol=2e-4)  # float32 near 300 resolves 3e-5


@pytest.mark.parametrize("top_k", [None, 9])
@pytest.mark.parametrize("empty", ["batch", "queries", "value_channels"])
def test_empty_results(empty: str, top_k: int | None) -> None:
    arguments = changed(problem(**{empty: 0}), lambda x: x.requires_grad_())
    for backend in ("cpu", "reference"):
        with vosops.use_backend(backend):
            read, usage = vosops.attention(**arguments, top_k=top_k, return_usage=True)
        assert read.shape == (*arguments["query"].shape[:2], arguments["value"].shape[2])
        assert usage.shape == arguments["key"].shape[:2]
        read.sum().backward()


def test_repeats_and_threads_change_nothing(isa: str) -> None:
    arguments = problem(batch=1, queries=300, memory=900, **FORMS["everything"])
    threads = torch.get_num_threads()
    for top_k in (None, 20):
        first = vosops.attention(**arguments, top_k=top_k)
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            again = vosops.attention(**arguments, top_k=top_k)
            torch.set_num_threads(threads)
            assert torch.equal(again, first)


@pytest.mark.skipif(not hasattr(ctypes, "CDLL"), reason="reads /proc")
@pytest.mark.parametrize("top_k", [None, 32])
def test_never_holds_the_matrix(top_k: int | None) -> None:
    """A head's scores alone would be a quarter of the 27 MiB for all; identity and gate are never applied."""
    sizes = {"batch": 1, "queries": 600, "memory": 3000, "channels": 64, "value_channels": 64}
    arguments = problem(**sizes, identity=True, gate=1)
    assert peak_extra(lambda: vosops.attention(**arguments, top_k=top_k)) < 600 * 3000 * 4 * 4 / 4


def test_memory_does_not_grow() -> None:
    arguments = problem(queries=200, memory=1000, channels=64, value_channels=64)
    arguments["value"].requires_grad_()

    def settled() -> int:
        for _ in range(15):
            for top_k in (None, 16):
                vosops.attention(**arguments, top_k=top_k).sum().backward()
            arguments["value"].grad = None
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        return resident("VmRSS")

    settled()
    before = settled()
    # One leaked read a step would be 30 x 100 KiB.
    assert settled() - before < MIB


def test_an_infinite_key_matches_alone(isa: str) -> None:
    """-inf never matches; a query whose scores are all -inf reads zero, as in the memory read."""
    key = torch.tensor([[[1.0], [-math.inf], [2.0]]])
    value = torch.tensor([[[1.0], [10.0], [4.0]]])
    read = vosops.attention(torch.ones(1, 1, 1), key, value, num_heads=1)
    weights = torch.tensor([1.0, 2.0]).softmax(0)
    torch.testing.assert_close(read.flatten()[0], weights[0] + 4 * weights[1])
    nothing = vosops.attention(torch.ones(1, 1, 1), torch.full((1, 3, 1), -math.inf), value, num_heads=1)
    assert float(nothing) == 0
